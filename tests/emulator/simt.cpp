#include "simt.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "block.h"
#include "buffers.h"

namespace simt {

Options options;
size_t shared_limit = 227 << 10;
Counts counts;
thread_local Thread* self = nullptr;
constinit thread_local Block* current = nullptr;

namespace {

thread_local std::string last_error;

void go_to(GpuThread& from, GpuThread& to) {
  current->running = &to;
  ++current->switches;
  self = &to.view;
  Fiber::switch_to(from.fiber, to.fiber);
}

// The next thread of a warp, after this lane, that can go on, or null.
GpuThread* next_ready_lane(int warp, int lane) {
  const int step = options.order == Order::kReverse ? kWarp - 1 : 1;
  for (int i = 0; i < kWarp; ++i) {
    lane = (lane + step) % kWarp;
    const int at = warp * kWarp + lane;
    if (at < current->size && current->threads[at]->state == State::kReady) return current->threads[at].get();
  }
  return nullptr;
}

// The next thread after this turn that can go on, or null.
GpuThread* next_ready(int turn) {
  for (int i = 1; i <= current->size; ++i) {
    GpuThread& candidate = *current->threads[current->order[(turn + i) % current->size]];
    if (candidate.state == State::kReady) return &candidate;
  }
  return nullptr;
}

[[noreturn]] void leave(GpuThread& from) {
  Fiber::switch_to(from.fiber, current->main, true);
  std::abort();
}

[[noreturn]] void fail_stuck() {
  static const char* const kPlaces[] = {"nothing",           "a shuffle",        "a vote",
                                        "a warp barrier",    "a matrix product", "a matrix load",
                                        "a quad's exchange", "a block barrier"};
  int waiting[8] = {};
  for (int i = 0; i < current->size; ++i) {
    const GpuThread& thread = *current->threads[i];
    if (thread.state == State::kWaiting) ++waiting[(int)thread.at];
  }
  std::string text = "deadlock:";
  for (int i = 0; i < 8; ++i) {
    if (waiting[i]) text += " " + std::to_string(waiting[i]) + " threads wait at " + kPlaces[i] + ",";
  }
  fail(text + " and " + std::to_string(current->size - current->alive) + " have ended");
}

void thread_main() {
  GpuThread& me = *current->running;
  Fiber::arrived(me.fiber, current->main);
  happens_after(&current->started);
  (*current->body)();
  happens_before(&current->ended);
  me.copies.clear();
  me.state = State::kDone;
  --current->alive;
  Warp& warp = current->warps[me.view.warp];
  warp.alive &= ~(1u << me.view.lane);
  if (current->alive && current->at_barrier) {
    fail("a thread ends while " + std::to_string(current->at_barrier) +
         " threads of its block wait at a block barrier");
  }
  GpuThread* const next = next_ready(me.turn);
  if (!next && current->alive) fail_stuck();
  if (!next) leave(me);
  current->running = next;
  ++current->switches;
  self = &next->view;
  Fiber::switch_to(me.fiber, next->fiber, true);
  std::abort();
}

// With 0xff. An ordinary memset would be a race to ThreadSanitizer.
void fill(char* memory, size_t bytes) {
  volatile uint64_t* const words = reinterpret_cast<volatile uint64_t*>(memory);
  for (size_t i = 0; i < bytes / 8; ++i) words[i] = ~uint64_t{0};
  for (size_t i = bytes / 8 * 8; i < bytes; ++i) const_cast<volatile char&>(memory[i]) = (char)0xff;
}

// An order of n things.
std::vector<int> ordered(int n) {
  std::vector<int> order(n);
  for (int i = 0; i < n; ++i) order[i] = options.order == Order::kReverse ? n - 1 - i : i;
  if (options.order == Order::kShuffled) {
    uint32_t state = options.seed;
    for (int i = n - 1; i > 0; --i) {
      state = state * 1664525u + 1013904223u;
      std::swap(order[i], order[(state >> 8) % (i + 1)]);
    }
  }
  return order;
}

// What run() was asked for.
struct Grid {
  Dim blocks, block, threads;

  // The size of a block, which the grid's edge may cut.
  Dim size_of(Dim index) const {
    return {std::min(block.x, threads.x - index.x * block.x), std::min(block.y, threads.y - index.y * block.y),
            std::min(block.z, threads.z - index.z * block.z)};
  }
};

void resize(Block& block, int size) {
  if (block.size == size && !block.order.empty()) return;
  block.size = size;
  while ((int)block.threads.size() < size) block.threads.push_back(std::make_unique<GpuThread>());
  block.warps.resize((size + kWarp - 1) / kWarp);
  block.order = ordered(size);
  for (int i = 0; i < size; ++i) block.threads[block.order[i]]->turn = i;
}

void run_block(Block& block, Dim index, const Grid& grid) {
  const Dim threads = grid.size_of(index);
  resize(block, threads.count());
  block.alive = block.size;
  block.at_barrier = 0;
  block.poisoned.clear();
  for (BlockMemory& piece : block.memory) piece.given = false;
  char* const shared = reinterpret_cast<char*>(block.shared.data());
  std::fill(shared, shared + block.shared.size() * sizeof(std::max_align_t), (char)0xff);
  for (Warp& warp : block.warps) warp.restart();
  for (int i = 0; i < block.size; ++i) {
    GpuThread& thread = *block.threads[i];
    const unsigned u = i;
    thread.state = State::kReady;
    thread.at = Meeting::kNone;
    thread.copies.clear();
    thread.view = {{u % threads.x, u / threads.x % threads.y, u / (threads.x * threads.y)},
                   index,
                   grid.blocks,
                   threads,
                   i % kWarp,
                   i / kWarp,
                   grid.block,
                   grid.threads,
                   shared,
                   &thread.copies};
    block.warps[i / kWarp].started |= 1u << i % kWarp;
    block.warps[i / kWarp].alive |= 1u << i % kWarp;
    thread.fiber.start(thread_main);
  }
  block.main.adopt_thread();
  happens_before(&block.started);
  GpuThread* const first = next_ready(block.size - 1);
  block.running = first;
  self = &first->view;
  Fiber::switch_to(block.main, first->fiber);
  self = nullptr;
  happens_after(&block.ended);
}

}  // namespace

void wait_here() {
  GpuThread& me = *current->running;
  me.state = State::kWaiting;
  GpuThread* next = nullptr;
  // A warp goes as far as it can before another one has its turn; shuffled, all advance together.
  if (options.order != Order::kShuffled) next = next_ready_lane(me.view.warp, me.view.lane);
  if (!next) next = next_ready(me.turn);
  if (!next) fail_stuck();
  go_to(me, *next);
}

bool stack_overflowed(const void* address) { return current && current->running->fiber.overflowed(address); }

void fail(const std::string& what) {
  const Dim &block = self->block, &thread = self->index;
  const auto place = [](const Dim& d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  };
  happens_before(&current->ended);
  current->error = what + ": block " + place(block) + ", thread " + place(thread);
  leave(*current->running);
}

void* block_memory(const void* id, const char* name, size_t bytes, size_t alignment, size_t limit) {
  size_t used = bytes;
  BlockMemory* mine = nullptr;
  for (BlockMemory& piece : current->memory) {
    if (piece.id == id) {
      mine = &piece;
    } else if (piece.given) {
      used += piece.bytes;
    }
  }
  if (mine) happens_after(mine->memory);
  if (mine && mine->given) return mine->memory;
  if (used > limit)
    fail("the block's memory: " + std::to_string(used) + " bytes with '" + name + "', of " + std::to_string(limit));
  if (!mine) {
    char* const memory = static_cast<char*>(new_buffer(bytes, std::max<size_t>(alignment, 8), name));
    mine = &current->memory.emplace_back(BlockMemory{id, memory, bytes, false});
    happens_before(memory);  // to ThreadSanitizer, new memory was written by this thread
  }
  mine->given = true;
  fill(mine->memory, bytes);
  return mine->memory;
}

void poison(void* memory, size_t bytes) {
  if (std::find(current->poisoned.begin(), current->poisoned.end(), memory) != current->poisoned.end()) return;
  current->poisoned.push_back(memory);
  fill(static_cast<char*>(memory), bytes);
}

std::string run(Dim grid, Dim threads, size_t shared_bytes, const std::function<void()>& body, Dim all) {
  if (grid.count() == 0) return "a launch of no blocks";
  if (threads.count() == 0 || threads.count() > 1024)
    return "a launch with " + std::to_string(threads.count()) + " threads per block";
  if (shared_bytes > shared_limit) {
    return "a launch with " + std::to_string(shared_bytes) + " bytes of shared memory, of " +
           std::to_string(shared_limit);
  }
  if (!all.count()) all = {grid.x * threads.x, grid.y * threads.y, grid.z * threads.z};
  const Grid launch = {grid, threads, all};
  const uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z;
  std::atomic<uint64_t> next{0}, switches{0};
  std::mutex mutex;
  std::string error;
  const auto work = [&] {
    static thread_local Block block;
    use_signal_stack();
    block.body = &body;
    block.shared.resize((shared_bytes + sizeof(std::max_align_t) - 1) / sizeof(std::max_align_t));
    block.order.clear();  // options may have changed
    block.switches = 0;
    block.error.clear();
    current = &block;
    for (uint64_t turn; (turn = next++) < blocks;) {
      const uint64_t i = options.order == Order::kReverse ? blocks - 1 - turn : turn;
      const Dim index = {(unsigned)(i % grid.x), (unsigned)(i / grid.x % grid.y),
                         (unsigned)(i / ((uint64_t)grid.x * grid.y))};
      run_block(block, index, launch);
      if (!block.error.empty()) next = blocks;  // nobody starts another one
    }
    current = nullptr;
    block.free_memory();
    switches += block.switches;
    const std::lock_guard lock(mutex);
    if (error.empty()) error = block.error;
  };
  const CatchFaults catch_faults;
  const uint64_t processors = options.workers ? options.workers : std::max(1u, std::thread::hardware_concurrency());
  const uint64_t workers = std::min(processors, blocks);
  if (workers == 1) {
    work();
  } else {
    std::vector<std::thread> threads_of_os;
    for (uint64_t i = 0; i < workers; ++i) threads_of_os.emplace_back(work);
    for (std::thread& thread : threads_of_os) thread.join();
  }
  counts.switches += switches;
  return error;
}

void remember_error(const std::string& error) {
  if (last_error.empty()) last_error = error;
}

std::string take_error() { return std::exchange(last_error, {}); }

}  // namespace simt
