// Where threads meet: at block barriers, and in the functions of a warp or of a quad, which exchange words.
#include <cstring>

#include "block.h"

namespace simt {

namespace {

void open_block_barrier() {
  current->at_barrier = 0;
  current->parity ^= 1;
  for (int i = 0; i < current->size; ++i) {
    GpuThread& thread = *current->threads[i];
    if (thread.state == State::kWaiting && thread.at == Meeting::kBlockBarrier) thread.state = State::kReady;
  }
}

std::string to_string(Place place) { return std::string(place.file) + ":" + std::to_string(place.line); }

// Threads that meet come from one line, if their lines are known.
bool same(Place a, Place b) {
  return a.line == b.line && (a.file == b.file || !a.file || !b.file || !std::strcmp(a.file, b.file));
}

}  // namespace

void meet_block(bool orders, Place place) {
  GpuThread& me = *current->running;
  if (current->alive != current->size) {
    fail("a block barrier after " + std::to_string(current->size - current->alive) +
         " threads of the block have ended");
  }
  if (!current->at_barrier) current->barrier_place = place;
  if (!same(current->barrier_place, place))
    fail("block barriers at two lines meet: " + to_string(current->barrier_place) + " and " + to_string(place));
  me.at = Meeting::kBlockBarrier;
  char* const token = &current->barrier[current->parity];
  if (orders) happens_before(token);
  if (++current->at_barrier == current->alive) {
    open_block_barrier();
  } else {
    wait_here();
  }
  if (orders) happens_after(token);
  me.at = Meeting::kNone;
}

uint32_t started_lanes(bool quad) {
  const GpuThread& me = *current->running;
  const uint32_t all = current->warps[me.view.warp].started;
  return quad ? all & 15u << me.view.lane / kQuad * kQuad : all;
}

Words* meet(Meeting kind, uint32_t mask, const uint64_t* words, int count, bool orders, void (*complete)(Words*),
            Place place) {
  GpuThread& me = *current->running;
  Warp& warp = current->warps[me.view.warp];
  const int lane = me.view.lane;
  const bool quad = kind == Meeting::kQuad;
  Group& group = quad ? warp.quads[lane / kQuad] : warp.all;
  if (!(mask >> lane & 1)) fail("lane " + std::to_string(lane) + " calls a warp function whose mask leaves it out");
  if (mask & ~warp.alive) fail("the mask of a warp function names lanes that have ended or do not exist");
  if (group.arrived && (group.kind != kind || group.mask != mask))
    fail("warp divergence: two different functions, or masks, meet");
  if (group.arrived && !same(group.place, place))
    fail("warp divergence: " + to_string(group.place) + " and " + to_string(place) + " meet");
  group.kind = kind;
  group.mask = mask;
  group.place = place;
  group.arrived |= 1u << lane;
  me.at = kind;
  Words* const meeting = (quad ? warp.quad_words : warp.words)[group.parity];
  char* const token = &group.barrier[group.parity];
  if (orders) happens_before(token);
  for (int i = 0; i < count; ++i) meeting[lane][i] = words[i];
  if (group.arrived == mask) {
    if (complete) complete(meeting);
    group.arrived = 0;
    group.parity ^= 1;
    for (int l = 0; l < kWarp; ++l) {
      if (!(mask >> l & 1)) continue;
      GpuThread& other = *current->threads[me.view.warp * kWarp + l];
      if (other.state == State::kWaiting) other.state = State::kReady;
    }
  } else {
    wait_here();
  }
  me.at = Meeting::kNone;
  if (orders) happens_after(token);
  return meeting;
}

uint64_t shuffle_word(uint32_t mask, uint64_t word, int from, bool valid) {
  const Words* all = meet(Meeting::kShuffle, mask, &word, 1, false);
  if (!valid) return word;
  if (!(mask >> from & 1)) fail("a shuffle reads lane " + std::to_string(from) + ", which its mask leaves out");
  return all[from][0];
}

uint32_t ballot(uint32_t mask, bool vote) {
  const uint64_t word = vote;
  const Words* all = meet(Meeting::kVote, mask, &word, 1, false);
  uint32_t votes = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) votes |= (uint32_t)all[lane][0] << lane;
  }
  return votes;
}

}  // namespace simt
