#include "metal/runtime.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>

#include "simt.h"

namespace simt::metal {

namespace {

constexpr size_t kThreadgroupBytes = 32 << 10;

unsigned axis_of(const Dim& dim, int axis) { return axis == 0 ? dim.x : axis == 1 ? dim.y : dim.z; }

simt::Place place(Line line) { return {line.file, line.number}; }

void need_whole_simdgroup(const char* what) {
  if (started_lanes() != ~0u) fail(std::string(what) + " in a SIMD-group of fewer than 32 threads");
}

// Words of a lane: two floats of a, two of b, two of the product.
void multiply_lanes(Words* lanes) {
  float a[8][8], b[8][8], product[8][8] = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto [row, column] = matrix_place(lane);
    std::memcpy(&a[row][column], lanes[lane], 8);
    std::memcpy(&b[row][column], lanes[lane] + 1, 8);
  }
  for (int row = 0; row < 8; ++row) {
    for (int k = 0; k < 8; ++k) {
      for (int column = 0; column < 8; ++column) product[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto [row, column] = matrix_place(lane);
    std::memcpy(lanes[lane] + 2, &product[row][column], 8);
  }
}

}  // namespace

unsigned input(Input which, int axis) {
  const Thread& me = *self;
  const unsigned threads = me.block_size.count();
  switch (which) {
    case Input::kBuffer:
      break;
    case Input::kPositionInGrid:
      return axis_of(me.block, axis) * axis_of(me.whole_block, axis) + axis_of(me.index, axis);
    case Input::kPositionInThreadgroup:
      return axis_of(me.index, axis);
    case Input::kThreadgroupPosition:
      return axis_of(me.block, axis);
    case Input::kThreadsPerThreadgroup:
      return axis_of(me.block_size, axis);
    case Input::kDispatchThreadsPerThreadgroup:
      return axis_of(me.whole_block, axis);
    case Input::kThreadsPerGrid:
      return axis_of(me.all_threads, axis);
    case Input::kThreadgroupsPerGrid:
      return axis_of(me.grid_size, axis);
    case Input::kIndexInThreadgroup:
      return me.warp * kWarp + me.lane;
    case Input::kIndexInSimdgroup:
      return me.lane;
    case Input::kSimdgroupIndex:
      return me.warp;
    case Input::kSimdgroups:
      return (threads + kWarp - 1) / kWarp;
    case Input::kSimdgroupSize:
      return kWarp;
    case Input::kIndexInQuadgroup:
      return me.lane % kQuad;
    case Input::kQuadgroupIndex:
      return (me.warp * kWarp + me.lane) / kQuad;
    case Input::kQuadgroups:
      return (threads + kQuad - 1) / kQuad;
  }
  fail("a kernel's parameter that is no number");
}

int lane() { return self->lane; }

const Lane* exchange(bool quad, const void* value, unsigned long bytes, Line line, unsigned* lanes) {
  uint64_t words[8] = {};
  std::memcpy(words, value, bytes);
  *lanes = started_lanes(quad);
  return meet(quad ? Meeting::kQuad : Meeting::kShuffle, *lanes, words, (bytes + 7) / 8, false, nullptr, place(line));
}

void simdgroup_barrier(bool orders, Line line) {
  meet(Meeting::kWarpBarrier, started_lanes(), nullptr, 0, orders, nullptr, place(line));
}

void threadgroup_barrier(bool orders, Line line) { meet_block(orders, place(line)); }

void* threadgroup_memory(const void* id, const char* name, unsigned long bytes, unsigned long alignment) {
  return block_memory(id, name, bytes, alignment, kThreadgroupBytes);
}

void multiply(const float (&a)[2], const float (&b)[2], float (&product)[2], Line line) {
  need_whole_simdgroup("a matrix product");
  uint64_t words[2];
  std::memcpy(words, a, 8);
  std::memcpy(words + 1, b, 8);
  const Words* lanes = meet(Meeting::kMatrix, ~0u, words, 2, false, multiply_lanes, place(line));
  std::memcpy(product, lanes[self->lane] + 2, 8);
}

void check_uniform(const void* address, unsigned long stride, Line line) {
  need_whole_simdgroup("a matrix load or store");
  const uint64_t words[2] = {(uintptr_t)address, stride};
  const Words* lanes = meet(Meeting::kMatrixLoad, ~0u, words, 2, false, nullptr, place(line));
  if (lanes[0][0] != words[0] || lanes[0][1] != words[1])
    fail("a matrix load or store whose lanes name different addresses or strides");
}

}  // namespace simt::metal

// ---- for Python: launches
// ----------------------------------------------------------------------------------------------

// Runs a kernel; the error, or "", stays valid until this thread's next launch.
extern "C" __attribute__((visibility("default"))) const char* metal_launch(const simt::metal::Kernel* kernel,
                                                                           void* const* buffers,
                                                                           const unsigned* threads,
                                                                           const unsigned* group) {
  static thread_local std::string error;
  const simt::Dim all = {threads[0], threads[1], threads[2]}, block = {group[0], group[1], group[2]};
  const simt::Dim blocks = {(all.x + block.x - 1) / block.x, (all.y + block.y - 1) / block.y,
                            (all.z + block.z - 1) / block.z};
  error = simt::run(blocks, block, 0, [=] { kernel->run(kernel->parameters, buffers); }, all);
  return error.c_str();
}
