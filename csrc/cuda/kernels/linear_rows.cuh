// The product with one to eight tokens: `linear` while the model writes, and experts for a few (token, slot) pairs.
//
// All there is to do is to read the weights once, as fast as memory gives them. The warps of a block share its 16 or 32
// rows and take every so manieth chunk of 256 weights; each has a ring of its own in shared memory that it fills with
// asynchronous copies, so that nothing in the loop waits for another warp. Sums meet at the end.
//
// What must hold for that on an H100, 132 multiprocessors and 3.0 TB/s, that is 13 bytes per multiprocessor and clock:
// - Bytes in flight: 0.7 us of latency are 16 KB per multiprocessor, 32 KB to be safe. Eight warps with two stages of
//   16 rows hold 36 KB at 4 bits, of 32 rows 72 KB.
// - Blocks: of 32 rows if nearly every multiprocessor gets one, otherwise of 16: 64 blocks with n = 1024. Where none
//   gets two, a block has 16 warps.
// - x: every block reads all of it, 16 bytes per weight of a row if m = 8: as much as 28 rows of 4-bit or 15 of 8-bit
//   weights. Blocks that share a multiprocessor find it in L1; hence 32 rows for formats up to 5.5 bits, while those
//   above have enough with 16.
// - Instructions: of 4-bit weights 23 arrive per clock, which leaves each 5.6 of the 128 that a clock has. A chunk of
//   32 rows takes 830 per lane for q4_0 and q4k: 3.3 per weight.
#pragma once

#include <type_traits>

#include "cuda/kernels/product.cuh"
#include "cuda/kernels/tile_plan.h"

namespace isqtorch::cuda {

constexpr int kRowsWarps = 8;               // of a block; twice as many if it has a multiprocessor to itself
constexpr int kRowsShared = 112 << 10;      // bytes of a block with so many: half of what an H100 has
constexpr int kWideRows = 32 * (192 + 16);  // bytes of 32 rows of a chunk, up to which they go together

// A warp's share of shared memory.
template <class F, int kTiles>
constexpr int kRowsWarpBytes = WarpRows<F, kTiles>::kRingBytes + WarpRows<F, kTiles>::kTableBytes;

template <class F, Dtype dtype>
constexpr int kRowTiles = dtype != Dtype::kF32 && WarpRows<F, 2>::kStageBytes <= kWideRows ? 2 : 1;

// Slices of x that a warp has asked for and not used yet.
template <class X>
constexpr int kAhead = 8 / X::kWords;

// Warps of a block at most. ptxas spills a little where that gets a second block of this size in: f32 needs some more
// than the 64 registers which that would leave with 16 warps.
template <Dtype dtype>
constexpr int kMostWarps = dtype == Dtype::kF32 ? 12 : 2 * kRowsWarps;
// Blocks per multiprocessor that ptxas is told of; 0 leaves it to its own taste, which is to spill with 16 rows (see
// above) and not to with 32. For the newest GPUs it is the other way round, but for the few registers of fp8.
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

  // ---- which expert
  int64_t first_row = 0, first_token = 0, y0 = 0;
  if (task.ids) {
    const int pair = (int)(blockIdx.x % task.parts);
    const int64_t expert = load_id(task.ids, task.wide_ids, pair);
    ISQ_ASSERT(expert >= 0 && expert <= task.experts, "isqtorch: an id names no expert");
    y0 = (int64_t)pair * task.n;
    if (expert == task.experts) {  // the pair's expert is not here
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
  // Tokens past the last repeat the first: their sums are nobody's.
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
    if (chunk < chunks) {  // the rest of a row, for one of the warps
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

  // ---- the sum over warps, each of which has its own in its ring
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
