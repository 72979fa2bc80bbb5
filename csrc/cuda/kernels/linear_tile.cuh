// The product with more tokens than one operand is wide: `linear` for a batch or a short prompt, and experts for many.
//
// A block takes 16, 32 or 64 tokens and up to 352 rows of weights. Its warps have 32 rows each, whose codes they unpack
// once for all tokens; some share their rows and split k. Weights come through each warp's own ring, as in
// linear_rows.cuh. x comes through one ring for the block, which a warp of its own fills: a thread waits for its copies
// in the order it asked for them, so a warp that copied both would wait for weights whenever it needs x.
//
// Shared memory has x as rows of a slice, 64 bytes each, or 128 of f32: a lane's numbers lie together, and in every
// other pair of rows (every other row of f32) the halves are exchanged, so that those who read at the same time read
// different banks.
//
// A slice of 32 rows of 4-bit weights costs a warp about 95 instructions and 34 for every eight tokens, six of them on
// the matrix unit, which needs eight clocks for each. So 16 tokens take 90 % of the instructions that an H100 has while
// such weights arrive from memory, and 64 tokens keep instructions and matrix units equally busy.
#pragma once

#include "cuda/kernels/linear_rows.cuh"

namespace isqtorch::cuda {

constexpr int kTileStages = 3;  // of x

// Warps that multiply, at most; one more copies x. Eight warps leave a thread 255 registers, and twelve 168, which are
// too few for the sums of 64 tokens.
template <int kTokenTiles>
constexpr int kTileWarps = kTokenTiles == 8 ? 7 : 11;

// x in shared memory: a stage has a few slices of as many chunks as the warps split k into.
template <class X, int kTokenTiles>
struct TokenRing {
  static constexpr int kTokens = 8 * kTokenTiles, kSlices = 8 / kTokenTiles;  // of a stage
  static constexpr int kSteps = kChunk / kSlice / kSlices;                    // stages to a chunk
  static constexpr int kPartBytes = kSlices * kTokens * X::kSliceBytes;       // of one chunk
  static constexpr int kPieces = X::kSliceBytes / 16;                         // of a row
  static ISQ_DEVICE int swapped(int g) { return X::kF32 ? g % 2 * 64 : g / 2 % 2 * 32; }
};

// A warp's share of shared memory: its ring, which has its sums in the end, and its table.
template <class F, int kTokenTiles>
constexpr int kTileRingBytes =
    WarpRows<F, 2>::kRingBytes > 1024 * kTokenTiles ? WarpRows<F, 2>::kRingBytes : 1024 * kTokenTiles;
template <class F, int kTokenTiles>
constexpr int kTileWarpBytes = kTileRingBytes<F, kTokenTiles> + WarpRows<F, 2>::kTableBytes;

// The warp that fills the ring of x. `rows`: of this lane's tokens, g, g + 8, ...
template <class X, int kTokenTiles>
ISQ_DEVICE void copy_tokens(const uint8_t* const (&rows)[kTokenTiles], uint8_t* ring, int rounds, const Task& task,
                            int lane) {
  using Ring = TokenRing<X, kTokenTiles>;
  const int g = lane / 4, t = lane % 4, stages = rounds * Ring::kSteps;
  const auto copy = [&](int stage) {
    uint8_t* to = ring + stage % kTileStages * task.split * Ring::kPartBytes + g * X::kSliceBytes;
    for (int part = 0; part < (stage < stages ? task.split : 0); ++part) {
      const int chunk = stage / Ring::kSteps * task.split + part;
      const int first = chunk * kChunk + stage % Ring::kSteps * Ring::kSlices * kSlice;
#pragma unroll
      for (int slice = 0; slice < Ring::kSlices; ++slice) {
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile, to += 8 * X::kSliceBytes) {
          const int k = first + slice * kSlice;
          if (k >= task.k) continue;
#pragma unroll
          for (int piece = 0; piece < Ring::kPieces; piece += 4) {
            const int at = 16 * (piece + t);
            copy_async(to + (at ^ Ring::swapped(g)), rows[tile] + (int64_t)k * X::kBytes + at);
          }
        }
      }
    }
    end_copies();
  };
  for (int stage = 0; stage < kTileStages - 1; ++stage) copy(stage);
  for (int stage = 0; stage < stages; ++stage) {
    wait_for_copies<kTileStages - 2>();
    __syncthreads();  // this stage is there, and the one before is done with
    copy(stage + kTileStages - 1);
  }
}

template <class F, Dtype dtype, int kTokenTiles>
__global__ void __launch_bounds__(kWarp*(kTileWarps<kTokenTiles> + 1), kTokenTiles == 2) tile_kernel(Task task) {
  using X = Activations<dtype>;
  using Warp = WarpRows<F, 2>;
  using Ring = TokenRing<X, kTokenTiles>;
  using Weights = SliceWeights<F, X::kElement, 2>;
  constexpr Order kOrder = F::kOrder;
  constexpr int kWarpBytes = kTileWarpBytes<F, kTokenTiles>;
  ISQ_DYNAMIC_SHARED(uint8_t, shared);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp - 1;
  const int g = lane / 4, t = lane % 4, groups = warps / task.split, block_rows = groups * Warp::kRows;
  const int row0 = (int)(blockIdx.x / task.parts) * block_rows, part_of_x = (int)(blockIdx.x % task.parts);

  // ---- which tokens
  int first = part_of_x * Ring::kTokens, count = task.m - first < Ring::kTokens ? task.m - first : Ring::kTokens;
  int64_t first_row = 0;
  if (task.spans) {
    const int4 span = task.spans[part_of_x];
    first = span.y, count = span.z;
    first_row = (int64_t)span.x * task.n;
    if (count == 0) return;  // there are as many blocks as any ids might need
    if (span.x == task.experts) {
      for (int e = threadIdx.x; e < count * block_rows; e += blockDim.x) {
        const int row = row0 + e % block_rows;
        if (row < task.n) store_float<dtype>(task.y, (int64_t)task.order[first + e / block_rows] * task.n + row, 0.0f);
      }
      return;
    }
  }

  // ---- the product
  uint8_t* const x = shared + warps * kWarpBytes;
  const int chunks = (task.k + kChunk - 1) / kChunk, rounds = (chunks + task.split - 1) / task.split;
  if (warp == warps) {
    const uint8_t* rows[kTokenTiles];
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) {
      // Tokens past the last repeat the first: their sums are nobody's.
      int64_t token = first + (8 * tile + g < count ? 8 * tile + g : 0);
      if (task.order) token = task.rows_per_slot ? task.order[token] : task.order[token] / task.slots;
      rows[tile] = task.x + token * task.k * X::kBytes;
    }
    copy_tokens<X, kTokenTiles>(rows, x, rounds, task, lane);
  } else {
    const int part = warp / groups, group = warp % groups;
    uint8_t *const ring = shared + warp * kWarpBytes, *const table = ring + kTileRingBytes<F, kTokenTiles>;
    const Warp rows(task.weight + first_row * task.row_bytes, row0 + group * Warp::kRows, task, lane);
    for (int s = 0; s < Warp::kStages; ++s) {
      const int chunk = part + s * task.split;
      if (chunk < chunks) rows.copy(ring + s * Warp::kStageBytes, chunk, task);
      end_copies();
    }
    const int near =
        part * Ring::kPartBytes + g * X::kSliceBytes + (X::template near_bytes<kOrder>(t) ^ Ring::swapped(g));
    const int far = near ^ X::template kFar<kOrder>;
    float out[kTokenTiles][2][4] = {};
    int x_stage = 0;
    for (int round = 0; round < rounds; ++round) {
      const int chunk = round * task.split + part;
      uint8_t* const copied = ring + round % Warp::kStages * Warp::kStageBytes;
      const uint8_t* bytes[Warp::kOfLane];
      if (chunk < chunks) {
        wait_for_copies<Warp::kStages - 1>();
        __syncwarp();
        rows.template tabulate<X::kElement>(table, copied, chunk, task);
        rows.find(copied, chunk, task, bytes);
        __syncwarp();
      }
      const int slices = chunk < chunks ? (task.k - chunk * kChunk) / kSlice : 0;
#pragma unroll
      for (int step = 0; step < Ring::kSteps; ++step) {
        __syncthreads();
        const uint8_t* const tokens = x + x_stage * task.split * Ring::kPartBytes;
#pragma unroll
        for (int i = 0; i < Ring::kSlices; ++i) {
          const int slice = step * Ring::kSlices + i;
          if (slice >= slices) continue;
          Weights weights;
          weights.load(bytes, table + g * Warp::kGroups * Warp::kGroupBytes, slice, t, task.shape);
#pragma unroll
          for (int tile = 0; tile < kTokenTiles; ++tile) {
            const uint8_t* const at = tokens + (i * kTokenTiles + tile) * 8 * X::kSliceBytes;
            uint32_t words[X::kWords], b[X::kParts][4];
            X::template load<kOrder>(at + near, at + far, words);
            X::template pair_up<kOrder>(words, b);
            weights.multiply(b, X::kOnes, out[tile]);
          }
        }
        x_stage = (x_stage + 1) % kTileStages;
      }
      __syncwarp();
      const int later = chunk + Warp::kStages * task.split;
      if (later < chunks) rows.copy(copied, later, task);
      end_copies();
    }
    float* const sums = reinterpret_cast<float*>(ring);  // [tokens][32], this warp's
#pragma unroll
    for (int i = 0; i < 8 * kTokenTiles; ++i) {
      const int token = i / 8 * 8 + 2 * t + i % 2, row = i / 4 % 2 * 16 + i / 2 % 2 * 8 + g;
      sums[token * Warp::kRows + row] = out[i / 8][i / 4 % 2][i % 4];
    }
  }

  // ---- the sum over the warps that split k
  __syncthreads();
  for (int e = threadIdx.x; e < count * block_rows; e += blockDim.x) {
    const int token = e / block_rows, in_block = e % block_rows, row = row0 + in_block;
    if (row >= task.n) continue;
    float sum = task.bias ? load_float<dtype>(task.bias, first_row + row) : 0.0f;
    for (int part = 0; part < task.split; ++part) {
      const uint8_t* const of_warp = shared + (part * groups + in_block / Warp::kRows) * kWarpBytes;
      sum += reinterpret_cast<const float*>(of_warp)[token * Warp::kRows + in_block % Warp::kRows];
    }
    const int64_t row_of_y = task.order ? task.order[first + token] : first + token;
    store_float<dtype>(task.y, row_of_y * task.n + row, sum);
  }
}

// About `parts` of task.parts have work.
template <class F, Dtype dtype, int kTokenTiles>
void launch_tiles_of(Task task, int64_t parts, Stream stream) {
  constexpr int64_t kOfX = kTileStages * TokenRing<Activations<dtype>, kTokenTiles>::kPartBytes;
  const int64_t limit = shared_limit();
  const auto blocks = [&](int groups) { return (int64_t)((task.n + 32 * groups - 1) / (32 * groups)); };
  const auto shared = [&](int groups) { return groups * kTileWarpBytes<F, kTokenTiles> + kOfX; };
  // 32 rows times what takes the fewest rounds of all multiprocessors; of equals the most, for they read x least often.
  const auto cost = [&](int groups) { return (blocks(groups) * parts + kProcessors - 1) / kProcessors * groups; };
  int groups = 1;
  for (int more = 2; more <= kTileWarps<kTokenTiles> && shared(more) <= limit; ++more) {
    if (cost(more) <= cost(groups)) groups = more;
  }
  const int chunks = (task.k + kChunk - 1) / kChunk, fit = (int)(limit / shared(groups));
  const int most = kTileWarps<kTokenTiles> / groups < fit ? kTileWarps<kTokenTiles> / groups : fit;
  const int rounds = (chunks + most - 1) / most;
  task.split = (chunks + rounds - 1) / rounds;
  ISQ_LAUNCH((tile_kernel<F, dtype, kTokenTiles>), {(unsigned)(blocks(groups) * task.parts)},
             {(unsigned)(kWarp * (groups * task.split + 1))}, (size_t)(task.split * shared(groups)),
             (cudaStream_t)stream, task);
}

// Eight-token tiles of a block that has to do with so many tokens.
template <Dtype dtype>
int token_tiles(int64_t tokens) {
  return dtype == Dtype::kF32 ? 4 : tokens <= 16 ? 2 : tokens <= 32 ? 4 : 8;
}

template <class F, Dtype dtype>
void launch_tiles(const Task& task, int tiles, int64_t parts, Stream stream) {
  if constexpr (dtype != Dtype::kF32) {
    if (tiles == 2) return launch_tiles_of<F, dtype, 2>(task, parts, stream);
    if (tiles == 8) return launch_tiles_of<F, dtype, 8>(task, parts, stream);
  }
  launch_tiles_of<F, dtype, 4>(task, parts, stream);
}

}  // namespace isqtorch::cuda
