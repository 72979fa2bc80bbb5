// The block that this OS thread runs: its threads, which simt.cpp gives their turns, and what meetings.cpp knows of who
// waits where.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "buffers.h"
#include "fiber.h"
#include "simt.h"

namespace simt {

enum class State : uint8_t { kReady, kWaiting, kDone };

struct GpuThread {
  Fiber fiber;
  Thread view;
  std::vector<Copy> copies;
  State state = State::kDone;
  Meeting at = Meeting::kNone;
  int turn = 0;  // place in the order
};

// Lanes that are meeting, or none.
struct Group {
  uint32_t arrived = 0, mask = 0;
  Meeting kind = Meeting::kNone;
  Place place;
  int parity = 0;        // the next meeting uses the other words: slow lanes still read these
  char barrier[2] = {};  // tokens for happens_before, by parity: nobody is two meetings behind
};

struct Warp {
  uint32_t started = 0, alive = 0;
  Group all, quads[kWarp / kQuad];
  Words words[2][kWarp], quad_words[2][kWarp];

  void restart() {
    started = alive = 0;
    all = {};
    for (Group& quad : quads) quad = {};
  }
};

// What block_memory() gave, in a buffer that later blocks use again.
struct BlockMemory {
  const void* id;
  char* memory;
  size_t bytes;
  bool given;  // to the block that runs
};

// One block at a time, on one OS thread.
struct Block {
  std::vector<std::unique_ptr<GpuThread>> threads;  // kept from block to block, with their stacks
  std::vector<Warp> warps;
  std::vector<int> order;  // thread by turn
  std::vector<std::max_align_t> shared;
  std::vector<void*> poisoned;
  std::vector<BlockMemory> memory;
  Place barrier_place;
  Fiber main;
  GpuThread* running = nullptr;
  const std::function<void()>* body = nullptr;
  int size = 0, alive = 0, at_barrier = 0;
  uint64_t switches = 0;
  std::string error;
  int parity = 0;                                // of the next block barrier
  char started = 0, ended = 0, barrier[2] = {};  // tokens for happens_before

  ~Block() { free_memory(); }
  void free_memory() {
    for (const BlockMemory& piece : memory) delete_buffer(piece.memory);
    memory.clear();
  }
};
extern constinit thread_local Block* current;

// Leaves the running thread waiting and goes on with another one, until somebody makes it ready.
void wait_here();

}  // namespace simt
