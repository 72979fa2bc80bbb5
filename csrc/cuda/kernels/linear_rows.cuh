// The product with one to eight tokens: `linear` while a model generates text, and experts for a few (token, slot)
// pairs.
//
// The cost is that of reading the weights once, so this must run at the speed of memory. The warps of a block share its
// 16 or 32 rows and take chunks of 256 weights in turn. Each warp fills a ring of its own in shared memory by
// asynchronous copies, so that nothing in the loop waits for another warp. The sums of the warps are added at the end.
//
// An H100 has 132 multiprocessors and 3.0 TB/s, that is 13 bytes per multiprocessor and clock. The consequences:
// - Bytes in flight: a latency of 0.7 us takes 16 KB per multiprocessor, or 32 KB to be safe. Eight warps with two
//   stages of 16 rows hold 36 KB at 4 bits; with 32 rows, 72 KB.
// - Blocks have 32 rows if nearly every multiprocessor gets one, otherwise 16: 64 blocks with n = 1024. If none gets
//   two blocks, a block has 16 warps.
// - x: every block reads all of it. For m = 8 that is 16 bytes per weight of a row, as much as 28 rows of 4-bit or 15
//   rows of 8-bit weights. Blocks that share a multiprocessor find x in L1. Hence formats up to 5.5 bits have 32 rows;
//   for wider ones 16 are enough.
// - Instructions: 23 4-bit weights arrive per clock, and a clock has 128 instructions, so there are 5.6 for each
//   weight. A chunk of 32 rows takes 830 per lane for q4_0 and q4k, which is 3.3 per weight.
#pragma once

#include <type_traits>

#include "cuda/kernels/product.cuh"
#include "cuda/kernels/tile_plan.h"

namespace isqtorch::cuda {

constexpr int kRowsWarps = 8;               // of a block; twice as many if it is alone on a multiprocessor
constexpr int kRowsShared = 112 << 10;      // most bytes of such a block: half of what an H100 has
constexpr int kWideRows = 32 * (192 + 16);  // blocks have 32 rows up to this many bytes per chunk

// A warp's share of shared memory.
template <class F, int kTiles>
constexpr int kRowsWarpBytes = WarpRows<F, kTiles>::kRingBytes + WarpRows<F, kTiles>::kTableBytes;

template <class F, Dtype dtype>
constexpr int kRowTiles = dtype != Dtype::kF32 && WarpRows<F, 2>::kStageBytes <= kWideRows ? 2 : 1;

// How many slices of x a warp loads in advance.
template <class X>
constexpr int kAhead = 8 / X::kWords;

// The most warps of a block. ptxas spills a little to fit two blocks of this size into a multiprocessor: with 16 warps
// that leaves a thread 64 registers, and f32 needs some more.
template <Dtype dtype>
constexpr int kMostWarps = dtype == Dtype::kF32 ? 12 : 2 * kRowsWarps;
// The blocks per multiprocessor that ptxas is told to aim at; 0 lets it choose. By itself it spills with 16 rows (see
// above) and does not with 32. On the newest GPUs it is the opposite, except for fp8, which needs few registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kRowsNarrow = 0;
#else
constexpr int kRowsNarrow = 1;
#endif
template <class F, Dtype dtype, int kTiles>
constexpr int kRowsResident =
    kTiles == 1 && dtype != Dtype::kF32 ? kRowsNarrow | !F::template kSums<Element::kBf16> : 0;

template <class F, Dtype dtype, int kTiles>
__global__ void __launch_bounds__(kWarp* kMostWarps<dtype>, kRowsResident<F, dtype, kTiles>) rows_kernel(Task task) {
  using X = Activations<dtype>;
  using Warp = WarpRows<F, kTiles>;
  using Target = std::conditional_t<X::kF32, uint8_t*, SharedAddress>;
  using Weights = SliceWeights<F, X::kElement, kTiles>;
  constexpr Order kOrder = F::kOrder;
  constexpr int kSlices = kChunk / kSlice, kChunkOfX = kChunk * X::kBytes, kWarpBytes = kRowsWarpBytes<F, kTiles>;
  ISQ_DYNAMIC_SHARED(uint8_t, shared);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int g = lane / 4, t = lane % 4, row0 = (int)(blockIdx.x / task.parts) * Warp::kRows;

  // ---- the expert
  int64_t first_row = 0, first_token = 0, y0 = 0;
  if (task.ids) {
    const int pair = (int)(blockIdx.x % task.parts);
    const int64_t expert = load_id(task.ids, task.wide_ids, pair);
    ISQ_ASSERT(expert >= 0 && expert <= task.experts, "isqtorch: an id names no expert");
    y0 = (int64_t)pair * task.n;
    if (expert == task.experts) {  // the pair's expert is not on this device
      const int row = row0 + (int)threadIdx.x;
      if (threadIdx.x < Warp::kRows && row < task.n) store_float<dtype>(task.y, y0 + row, 0.0f);
      return;
    }
    first_row = expert * task.n;
    first_token = task.rows_per_slot ? pair : pair / task.slots;
  }

  // ---- this warp's share of k
  uint8_t *const ring = shared + warp * kWarpBytes, *const table = ring + Warp::kRingBytes;
  const Warp rows(task.weight + first_row * task.row_bytes, row0, task, lane);
  const int whole = task.k / kChunk, chunks = (task.k + kChunk - 1) / kChunk;
#pragma unroll
  for (int s = 0; s < Warp::kStages; ++s) {
    if (warp + s * warps < chunks) rows.template copy<Target>(ring + s * Warp::kStageBytes, warp + s * warps, task);
    end_copies();
  }
  // Tokens past the last repeat the first; their sums are discarded.
  const uint8_t* x = task.x + (first_token + (g < task.m ? g : 0)) * task.k * X::kBytes +
                     X::template near_bytes<kOrder>(t) + (int64_t)warp * kChunkOfX;
  float out[kTiles][4] = {};
  uint32_t words[kAhead<X>][X::kWords];
  const auto load_x = [&](const uint8_t* chunk, int slice, uint32_t (&to)[X::kWords]) {
    const uint8_t* const near = chunk + slice * X::kSliceBytes;
    X::template load<kOrder>(near, near + X::template kFar<kOrder>, to);
  };
  const auto add_slice = [&](const uint8_t* const(&bytes)[Warp::kOfLane], int slice,
                             const uint32_t (&of_x)[X::kWords]) {
    uint32_t b[X::kParts][4];
    X::template pair_up<kOrder>(of_x, b);
    Weights weights;
    weights.load(bytes, table + g * Warp::kGroups * Warp::kGroupBytes, slice, t, task.shape);
    weights.multiply(b, X::kOnes, out);
  };
  const auto wait_for = [&](const uint8_t* stage, int chunk, const uint8_t*(&bytes)[Warp::kOfLane]) {
    wait_for_copies<Warp::kStages - 1>();
    __syncwarp();
    rows.tabulate(table, stage, chunk, task, F::template kZero<X::kElement>);
    rows.find(stage, chunk, task, bytes);
    __syncwarp();
  };

  int chunk = warp, stage = 0;
  if (chunk < whole) {
#pragma unroll
    for (int slice = 0; slice < kAhead<X>; ++slice) load_x(x, slice, words[slice]);
  }
  for (; chunk < whole; chunk += warps) {
    uint8_t* const copied = ring + stage * Warp::kStageBytes;
    const uint8_t* const next_x = chunk + warps < whole ? x + (int64_t)warps * kChunkOfX : x;
    const uint8_t* bytes[Warp::kOfLane];
    wait_for(copied, chunk, bytes);
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      uint32_t (&now)[X::kWords] = words[slice % kAhead<X>];
      add_slice(bytes, slice, now);
      load_x(slice + kAhead<X> < kSlices ? x : next_x, (slice + kAhead<X>) % kSlices, now);
    }
    __syncwarp();
    if (chunk + Warp::kStages * warps < chunks) rows.template copy<Target>(copied, chunk + Warp::kStages * warps, task);
    end_copies();
    stage = (stage + 1) % Warp::kStages;
    x = next_x;
  }
  if constexpr (F::kBlock != kChunk) {
    if (chunk < chunks) {  // one of the warps takes the rest of a row
      const uint8_t* const rest = x + (chunk == warp ? 0 : (int64_t)warps * kChunkOfX);
      const uint8_t* bytes[Warp::kOfLane];
      wait_for(ring + stage * Warp::kStageBytes, chunk, bytes);
#pragma unroll 1
      for (int slice = 0; slice < (task.k - chunk * kChunk) / kSlice; ++slice) {
        load_x(rest, slice, words[0]);
        add_slice(bytes, slice, words[0]);
      }
      __syncwarp();
    }
  }

  // ---- the sum over warps, each of which has stored its own in its ring
  float* const sums = reinterpret_cast<float*>(ring);  // [8][16 kTiles], by token
  static_assert(Warp::kRingBytes >= (int)sizeof(float) * kFewRows * Warp::kRows);
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) {
    sums[(2 * t + i % 2) * Warp::kRows + i / 4 * 16 + i % 4 / 2 * 8 + g] = out[i / 4][i % 4];
  }
  __syncthreads();
  for (int e = threadIdx.x; e < task.m * Warp::kRows; e += blockDim.x) {
    const int token = e / Warp::kRows, row = row0 + e % Warp::kRows;
    if (row >= task.n) continue;
    float sum = task.bias ? load_float<dtype>(task.bias, first_row + row) : 0.0f;
    for (int w = 0; w < warps; ++w) sum += reinterpret_cast<const float*>(shared + w * kWarpBytes)[e];
    store_float<dtype>(task.y, y0 + (int64_t)token * task.n + row, sum);
  }
}

template <class F, Dtype dtype, int kTiles>
void launch_rows_of(const Task& task, Stream stream) {
  using Warp = WarpRows<F, kTiles>;
  const int64_t blocks = (int64_t)((task.n + Warp::kRows - 1) / Warp::kRows) * task.parts;
  const bool alone = blocks <= kProcessors;
  constexpr int kBytes = kRowsWarpBytes<F, kTiles>;
  int64_t shared = shared_limit();
  if (!alone && shared > kRowsShared) shared = kRowsShared;
  int warps = alone ? kMostWarps<dtype> : kRowsWarps;
  if (warps > shared / kBytes) warps = (int)(shared / kBytes);
  const int chunks = (task.k + kChunk - 1) / kChunk;
  if (warps > chunks) warps = chunks;
  ISQ_LAUNCH((rows_kernel<F, dtype, kTiles>), {(unsigned)blocks}, {(unsigned)(kWarp * warps)}, (size_t)(warps * kBytes),
             (cudaStream_t)stream, task);
}

// Needs task.m <= 8.
template <class F, Dtype dtype>
void launch_rows(const Task& task, Stream stream) {
  if constexpr (kRowTiles<F, dtype> == 2) {
    const bool enough = (int64_t)((task.n + 31) / 32) * task.parts >= kProcessors * 3 / 4;
    if (enough) return launch_rows_of<F, dtype, 2>(task, stream);
  }
  launch_rows_of<F, dtype, 1>(task, stream);
}

}  // namespace isqtorch::cuda
