// The product with more than eight tokens: `linear` for a batch or a prompt, and experts for many pairs.
//
// A block takes 16, 32, 64 or 128 tokens, some rows of weights and a part of k (tile_plan.h). Each of its warps has 32
// rows, whose weights it unpacks and rounds once for all tokens (rounded.cuh). Several warps may share their rows and
// split the block's k. Weights come through the warp's own ring, as in linear_rows.cuh, and x through one ring for the
// block (token_ring.cuh).
//
// For a slice of 32 rows of 4-bit weights, a warp needs about 145 instructions, and 7 more for every eight tokens. Four
// of these 7 use the matrix unit, for six clocks each. With n = k = 8192 on an H100, 16 tokens take 11 us of
// instructions, while reading 4-bit weights takes 12.6 us; 64 tokens take 14 us of instructions and 14 on the matrix
// units; 128 tokens take 18 and 29 us.
#pragma once

#include <type_traits>

#include "cuda/kernels/rounded.cuh"
#include "cuda/kernels/tile_plan.h"
#include "cuda/kernels/token_ring.cuh"

namespace isqtorch::cuda {

// The most warps of a block. Twelve leave a thread 168 registers; eight leave 255, which f32 and the sums of many
// tokens need.
template <Dtype dtype, int kTokenTiles>
constexpr int kTileWarps = dtype == Dtype::kF32 || kTokenTiles >= 8 ? 8 : 12;

// A warp's share of shared memory: its ring, which holds its sums at the end, and its table.
template <class F, int kTokenTiles>
constexpr int kTileRingBytes =
    WarpRows<F, 2>::kRingBytes > 1024 * kTokenTiles ? WarpRows<F, 2>::kRingBytes : 1024 * kTokenTiles;
template <class F, int kTokenTiles>
constexpr int kTileWarpBytes = kTileRingBytes<F, kTokenTiles> + WarpRows<F, 2>::kTableBytes;

// The arguments. (If Task itself had these, the compiler would spend more instructions on rows_kernel.) If partial_sums
// is set, blocks with the same rows split k into slabs of slab_chunks chunks and store their sums there as
// [slab][m][n], with slabs slab_stride apart.
struct TileTask : Task {
  float* partial_sums;
  int slab_chunks;
  int64_t slab_stride;
};

// For f32, codes stay integers, because a rounded weight would need two 16-bit numbers.
template <class F, class X>
using TileWeights = std::conditional_t<X::kF32, SliceWeights<F, X::kElement, 2>, RoundedWeights<F, X::kElement, 2>>;

template <class F, Dtype dtype, int kTokenTiles>
__global__ void __launch_bounds__(kWarp* kTileWarps<dtype, kTokenTiles>, 1) tile_kernel(TileTask task) {
  using X = Activations<dtype>;
  using Warp = WarpRows<F, 2>;
  using Ring = TokenRing<X, kTokenTiles>;
  constexpr Order kOrder = F::kOrder;
  constexpr float kZero = X::kF32 ? F::template kZero<X::kElement> : F::kFloatZero;
  constexpr int kWarpBytes = kTileWarpBytes<F, kTokenTiles>;
  // Whether the last chunk may be smaller. Always true for f32: a count the compiler does not know stops it from
  // unpacking all slices at once.
  constexpr bool kRest = F::kBlock != kChunk || X::kF32;
  ISQ_DYNAMIC_SHARED(uint8_t, shared);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int g = lane / 4, t = lane % 4, groups = warps / task.split;
  const int row0 = (int)(blockIdx.x / task.parts) * groups * Warp::kRows, part_of_x = (int)(blockIdx.x % task.parts);

  // ---- the tokens
  int first = part_of_x * Ring::kTokens, count = task.m - first < Ring::kTokens ? task.m - first : Ring::kTokens;
  int64_t first_row = 0;
  bool absent = false;
  if (task.spans) {
    const int4 span = task.spans[part_of_x];
    first = span.y, count = span.z;
    first_row = (int64_t)span.x * task.n;
    if (count == 0) return;  // there are enough blocks for any ids; this one has no pairs
    absent = span.x == task.experts;
  }

  // ---- the part of k
  const int all_chunks = (task.k + kChunk - 1) / kChunk, begin = (int)blockIdx.y * task.slab_chunks;
  const int end = begin + task.slab_chunks < all_chunks ? begin + task.slab_chunks : all_chunks;

  // ---- the product
  const uint8_t** const token_rows = reinterpret_cast<const uint8_t**>(shared);
  uint8_t *const rings = shared + Ring::kRowsBytes, *const x = rings + warps * kWarpBytes;
  if (!absent) {
    for (int i = (int)threadIdx.x; i < Ring::kTokens; i += blockDim.x) {
      // Tokens past the last repeat the first; their sums are discarded.
      int64_t token = first + (i < count ? i : 0);
      if (task.order) token = task.rows_per_slot ? task.order[token] : task.order[token] / task.slots;
      token_rows[i] = task.x + token * task.k * X::kBytes;
    }
    const int part = warp / groups, group = warp % groups;
    uint8_t *const ring = rings + warp * kWarpBytes, *const table = ring + kTileRingBytes<F, kTokenTiles>;
    const Warp rows(task.weight + first_row * task.row_bytes, row0 + group * Warp::kRows, task, lane);
    const int rounds = (end - begin + task.split - 1) / task.split, stage_bytes = task.split * Ring::kPartBytes;
    const int slices_of_x = (end * kChunk < task.k ? end * kChunk : task.k) / kSlice;
    // A round has a chunk for each part.
    const auto copy_x = [&](int to, int round, int step) {
      if (round >= rounds) return;
      Ring::template copy<kRest>(token_rows, x + to * stage_bytes, begin + round * task.split, step * Ring::kSlices,
                                 slices_of_x, task.split, warp, warps, lane);
    };
    const auto copy_weights = [&](int round) {
      const int chunk = begin + round * task.split + part;
      if (chunk < end) rows.copy(ring + round % Warp::kStages * Warp::kStageBytes, chunk, task);
    };
    static_assert(Warp::kStages == kTileStages - 1);
    __syncthreads();
    for (int ahead = 0; ahead < kTileStages - 1; ++ahead) {
      copy_weights(ahead);
      copy_x(ahead, ahead / Ring::kSteps, ahead % Ring::kSteps);
      end_copies();
    }
    const int near =
        part * Ring::kPartBytes + g * X::kSliceBytes + (X::template near_bytes<kOrder>(t) ^ Ring::swapped(g));
    const int far = (near ^ X::template kFar<kOrder>)-near;
    const uint8_t* const numbers = table + g * Warp::kGroups * Warp::kGroupBytes;
    float out[kTokenTiles][2][4] = {};
    int stage = 0;
    for (int round = 0; round < rounds; ++round) {
      const int chunk = begin + round * task.split + part;
      const int slices = chunk < end ? (kRest ? task.k - chunk * kChunk : kChunk) / kSlice : 0;
      uint8_t* const copied = ring + round % Warp::kStages * Warp::kStageBytes;
      const uint8_t* bytes[Warp::kOfLane];
#pragma unroll
      for (int step = 0; step < Ring::kSteps; ++step) {
        wait_for_copies<kTileStages - 2>();
        __syncthreads();  // this stage has arrived, and nobody reads the one before
        copy_x((stage + kTileStages - 1) % kTileStages, round + (step + kTileStages - 1) / Ring::kSteps,
               (step + kTileStages - 1) % Ring::kSteps);
        if (step == 0 && slices) {
          rows.template tabulate<kRest>(table, copied, chunk, task, kZero, slices * Warp::kGroups);
          rows.find(copied, chunk, task, bytes);
          __syncwarp();
        }
        const uint8_t* const tokens = x + stage * stage_bytes + near;
        // Four slices at a time, if there are enough registers. Slices past the last have zeros for weights and x.
        constexpr int kTogether = X::kF32 ? 1 : kTokenTiles == 16 ? 2 : 4;
#pragma unroll
        for (int some = 0; some < Ring::kSlices; some += kTogether) {
          if (step * Ring::kSlices + some >= slices) continue;
#pragma unroll
          for (int i = some; i < some + kTogether; ++i) {
            TileWeights<F, X> weights;
            weights.load(bytes, numbers, step * Ring::kSlices + i, t, task.shape);
#pragma unroll
            for (int tile = 0; tile < kTokenTiles; ++tile) {
              const int at = (i * kTokenTiles + tile) * 8 * X::kSliceBytes;
              uint32_t words[X::kWords];
              X::template load<kOrder>(tokens + at, tokens + far + at, words);
              if constexpr (X::kF32) {
                uint32_t b[X::kParts][4];
                X::template pair_up<kOrder>(words, b);
                weights.multiply(b, X::kOnes, out[tile]);
              } else {
                weights.multiply(words, out[tile]);
              }
            }
          }
        }
        stage = (stage + 1) % kTileStages;
        if (step == Ring::kSteps - 1) {
          __syncwarp();
          copy_weights(round + Warp::kStages);
        }
        end_copies();
      }
    }
    float* const sums = reinterpret_cast<float*>(ring);  // [tokens][32], this warp's
#pragma unroll
    for (int i = 0; i < 8 * kTokenTiles; ++i) {
      const int token = i / 8 * 8 + 2 * t + i % 2, row = i / 4 % 2 * 16 + i / 2 % 2 * 8 + g;
      sums[token * Warp::kRows + row] = out[i / 8][i / 4 % 2][i % 4];
    }
  }

  // ---- the sum over the warps that split k: a warp at a time has 32 rows of a token
  __syncthreads();
  for (int group = 0; group < groups; ++group) {
    const int row = row0 + group * Warp::kRows + lane;
    if (row >= task.n) continue;
    const bool biased = task.bias && !task.partial_sums && !absent;
    const float bias = biased ? load_float<dtype>(task.bias, first_row + row) : 0.0f;
    const float* const of_group = reinterpret_cast<const float*>(rings + group * kWarpBytes) + lane;
    for (int token = warp; token < count; token += warps) {
      float sum = bias;
      for (int part = 0; part < (absent ? 0 : task.split); ++part) {
        sum += of_group[part * groups * (kWarpBytes / (int)sizeof(float)) + token * Warp::kRows];
      }
      const int64_t at = (int64_t)(task.order ? task.order[first + token] : first + token) * task.n + row;
      if (task.partial_sums) {
        task.partial_sums[blockIdx.y * task.slab_stride + at] = sum;
      } else {
        store_float<dtype>(task.y, at, sum);
      }
    }
  }
}

// ---- the sum over blocks that split k

constexpr int kAddThreads = 256;

// y = bias + the sum of the slabs, four numbers for each thread.
template <Dtype dtype>
__global__ void __launch_bounds__(kAddThreads) add_slabs_kernel(const float* partial_sums, int slabs, int64_t stride,
                                                                const void* bias, int n, int64_t count, void* y) {
  const int64_t first = ((int64_t)blockIdx.x * kAddThreads + threadIdx.x) * 4;
  if (first >= count) return;
  float sums[4] = {};
  for (int slab = 0; slab < slabs; ++slab) {
    const float4 more = *reinterpret_cast<const float4*>(partial_sums + slab * stride + first);
    sums[0] += more.x, sums[1] += more.y, sums[2] += more.z, sums[3] += more.w;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (first + i >= count) return;
    const float added = bias ? load_float<dtype>(bias, (first + i) % n) : 0.0f;
    store_float<dtype>(y, first + i, sums[i] + added);
  }
}

// ---- launches

// The most eight-token tiles of a block. kOcts loads eight numbers of x at once, which leaves too few registers for the
// sums of 128 tokens.
template <class F, Dtype dtype>
constexpr int kMostTiles = dtype == Dtype::kF32        ? 4
                           : F::kOrder == Order::kOcts ? 8
                                                       : 16;

// The tiles of a block, for a product with this many tokens.
template <class F, Dtype dtype>
int token_tiles(int64_t tokens) {
  if (kMostTiles<F, dtype> == 16 && tokens > 64 && (tokens > 256 || (tokens + 63) / 64 % 2 == 0)) return 16;
  if (kMostTiles<F, dtype> == 4 || (tokens > 16 && tokens <= 32)) return 4;
  return tokens <= 16 ? 2 : 8;
}

// Calls work(std::integral_constant<int, tiles>()).
template <class F, Dtype dtype, class Work>
auto with_tiles(int tiles, const Work& work) {
  if constexpr (kMostTiles<F, dtype> == 16) {
    if (tiles == 16) return work(std::integral_constant<int, 16>());
  }
  if constexpr (kMostTiles<F, dtype> >= 8) {
    if (tiles == 8) return work(std::integral_constant<int, 8>());
    if (tiles == 2) return work(std::integral_constant<int, 2>());
  }
  return work(std::integral_constant<int, 4>());
}

// How blocks share a product. About `parts` of task.parts have work. `slabs`: whether blocks may split k.
template <class F, Dtype dtype>
TilePlan tile_plan(const Task& task, int tiles, int64_t parts, bool slabs) {
  using X = Activations<dtype>;
  return with_tiles<F, dtype>(tiles, [&](auto of) {
    constexpr int kTokenTiles = decltype(of)::value;
    return plan_tiles({task.n, parts, (task.k + kChunk - 1) / kChunk, 8 * kTokenTiles, 32 * task.chunk_bytes,
                       kChunk * X::kBytes, kTileWarps<dtype, kTokenTiles>, kTileWarpBytes<F, kTokenTiles>,
                       TokenRing<X, kTokenTiles>::kBytes, shared_limit() - TokenRing<X, kTokenTiles>::kRowsBytes,
                       slabs});
  });
}

template <class F, Dtype dtype, int kTokenTiles>
void launch_tiles_of(const TileTask& task, const TilePlan& plan, Stream stream) {
  using Ring = TokenRing<Activations<dtype>, kTokenTiles>;
  const int bytes = Ring::kRowsBytes + plan.split * (plan.groups * kTileWarpBytes<F, kTokenTiles> + Ring::kBytes);
  const int64_t blocks = (task.n + 32 * plan.groups - 1) / (32 * plan.groups);
  const dim3 grid = {(unsigned)(blocks * task.parts), (unsigned)plan.slabs};
  ISQ_LAUNCH((tile_kernel<F, dtype, kTokenTiles>), grid, {(unsigned)(kWarp * plan.groups * plan.split)}, (size_t)bytes,
             (cudaStream_t)stream, task);
}

template <class F, Dtype dtype>
void launch_tiles(TileTask task, int tiles, const TilePlan& plan, Stream stream) {
  task.split = plan.split, task.slab_chunks = plan.slab_chunks;
  with_tiles<F, dtype>(tiles, [&](auto of) { launch_tiles_of<F, dtype, decltype(of)::value>(task, plan, stream); });
  if (!task.partial_sums) return;
  const int64_t count = (int64_t)task.m * task.n;
  ISQ_LAUNCH((add_slabs_kernel<dtype>), {(unsigned)((count + 4 * kAddThreads - 1) / (4 * kAddThreads))}, {kAddThreads},
             0, (cudaStream_t)stream, task.partial_sums, plan.slabs, task.slab_stride, task.bias, task.n, count,
             task.y);
}

}  // namespace isqtorch::cuda
