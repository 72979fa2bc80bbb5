// A GPU on the CPU, for tests: blocks of threads that run in warps of 32, meet at barriers, and share memory.
//
// One OS thread runs one block at a time, and every GPU thread of the block is a fiber on it. A fiber runs until it has
// to wait for others, so the order in which threads get somewhere is exact and repeatable, and it can be varied: code
// that is right only in one order fails in another. What CUDA and Metal call these things is in their own faces
// (cuda.h, ...), which are thin.
//
// A wrong program ends the launch with an error that says what, where and who: warp divergence, a barrier that some
// threads never reach, deadlock, a stray address (buffers.h), shared memory read before it is written (it is full of
// NaN).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

namespace simt {

constexpr int kWarp = 32, kQuad = 4;

struct Dim {
  unsigned x = 1, y = 1, z = 1;
  unsigned count() const { return x * y * z; }
};

enum class Order : int { kForward, kReverse, kShuffled };

struct Options {
  Order order = Order::kForward;  // in which threads of a block, and blocks of a grid, get their turn
  uint32_t seed = 1;              // of kShuffled
  int workers = 0;                // blocks at a time; 0: as many as there are processors
  bool late_copies = true;        // an asynchronous copy is made when it is waited for; otherwise when it is asked for
};
extern Options options;

// Bytes of dynamic shared memory that a launch may ask for: an H100's. An A100 has 163 KB, an RTX 3090, 4090 or
// 5090 99.
extern size_t shared_limit;

// What a launch counted.
struct Counts {
  uint64_t switches = 0;          // from one fiber to another
  uint64_t matrix_loads = 0;      // groups of eight rows that ldmatrix fetched,
  uint64_t matrix_conflicts = 0;  // and those whose rows share memory banks
};
extern Counts counts;

// An asynchronous copy of 16 bytes that has not been made yet; a null `to` ends a group.
struct Copy {
  void* to;
  const void* from;
  int bytes;  // to read; zeros stand for the rest
};

// What the running GPU thread can ask about itself.
struct Thread {
  Dim index, block, grid_size, block_size;  // of the thread in the block, of the block in the grid
  int lane = 0, warp = 0;
  Dim whole_block, all_threads;  // Metal: the size of a block that the grid's edge does not cut, of the grid in threads
  char* shared = nullptr;        // dynamic shared memory of the block
  std::vector<Copy>* copies = nullptr;
};
extern thread_local Thread* self;

// kQuad: an exchange in four lanes, which meet independently of their warp and of the other quads.
enum class Meeting : uint8_t { kNone, kShuffle, kVote, kWarpBarrier, kMatrix, kMatrixLoad, kQuad, kBlockBarrier };

// A line of the GPU's source: threads that meet must come from the same one. Without a file, it is not looked at.
struct Place {
  const char* file = nullptr;
  int line = 0;
};

// What a lane brings to a meeting, and what it finds there.
using Words = uint64_t[8];

// Waits until all lanes of `mask` have come to this kind of meeting with their words; gives all words by lane.
// `complete` works on them once, when everyone is there. `orders`: the meeting is a memory barrier between the lanes.
Words* meet(Meeting kind, uint32_t mask, const uint64_t* words, int count, bool orders,
            void (*complete)(Words*) = nullptr, Place place = {});
// Waits for all threads of the block. `orders`: as above, between the threads.
void meet_block(bool orders = true, Place place = {});

// The lanes of the running thread's warp, or quad, that were started: fewer than all where a block ends.
uint32_t started_lanes(bool quad = false);

// The block's memory for what `id` stands for, the same for all its threads, full of 0xff at first, and guarded at both
// ends. A block that wants more than `limit` bytes in all fails.
void* block_memory(const void* id, const char* name, size_t bytes, size_t alignment, size_t limit);

// Called where shared memory is declared: fills it with 0xff (NaN) once per block.
void poison(void* memory, size_t bytes);

// Ends the launch with this message, where the running thread is.
[[noreturn]] void fail(const std::string& what);

// Runs body() as every thread of the grid. The error is empty if all went well. `threads`: where the grid ends inside
// its last blocks, which are then smaller; all zero if it does not.
std::string run(Dim grid, Dim block, size_t shared_bytes, const std::function<void()>& body, Dim threads = {0, 0, 0});

// The error of this OS thread's launches since the last call, and clears it.
std::string take_error();

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), Dim grid, Dim block, size_t shared_bytes, Arguments... arguments);

// ---- details of the templates
// ----------------------------------------------------------------------------------------

void remember_error(const std::string& error);

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), Dim grid, Dim block, size_t shared_bytes, Arguments... arguments) {
  remember_error(run(grid, block, shared_bytes, [&] { kernel(arguments...); }));
}

template <class T>
uint64_t to_word(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}
template <class T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

// Lane `from`'s value; one's own where `valid` is false.
uint64_t shuffle_word(uint32_t mask, uint64_t word, int from, bool valid);
template <class T>
T shuffle(uint32_t mask, T value, int from, bool valid) {
  return from_word<T>(shuffle_word(mask, to_word(value), from, valid));
}
// Bit l is the vote of lane l.
uint32_t ballot(uint32_t mask, bool vote);

}  // namespace simt
