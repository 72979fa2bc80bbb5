// The frame of the quantizers that work block by block. A block of threads takes a tile of the matrix, brings its
// weights to the threads, lets the format choose the codes, and writes the packed bytes. A struct says how the format
// does that (blocks32.cuh, kquants.cuh, ...).
//
// Weights are read and bytes are written in wide, coalesced words, through shared memory. In between, a thread has kOwn
// neighbouring weights in registers. A format's block belongs to one thread or to a team of neighbouring threads, which
// communicate by shuffles. Blocks are numbered through the whole matrix, so a tile may span rows.
#pragma once

#include "cuda/formats/format.cuh"
#include "cuda/kernels/quantize/lanes.cuh"

namespace isqtorch::cuda {

using namespace one_lane;

constexpr int kQuantizeThreads = 128;
constexpr uint32_t kInfinityBits = 0x7f800000, kMagnitude = 0x7fffffff;
constexpr float kLargestWithF16Scales = 0x1p30f;  // as cpu/quantize/blockwise.h has it

// The threads of a format's block: `size` of them, a power of two; this one is number `member`.
struct Team {
  int size, member;

  template <class T>
  ISQ_DEVICE T from(T value, int who) const {
    return __shfl_sync(kAllLanes, value, who, size);
  }
  ISQ_DEVICE uint32_t largest(uint32_t value) const {
    for (int step = 1; step < size; step *= 2) {
      const uint32_t other = __shfl_xor_sync(kAllLanes, value, step);
      value = other > value ? other : value;
    }
    return value;
  }
  // merge(earlier, later) over all members in their order.
  template <class Merge>
  ISQ_DEVICE float in_order(float value, const Merge& merge) const {
    for (int step = 1; step < size; step *= 2) {
      const float other = __shfl_xor_sync(kAllLanes, value, step);
      value = member & step ? merge(other, value) : merge(value, other);
    }
    return value;
  }
  // The sum over the block of term(i), for each of a member's kOwn weights, in the order of the weights.
  template <int kOwn, class Term>
  ISQ_DEVICE LaneFloats sum(const Term& term) const {
    LaneFloats sum = 0.0f;
    ISQ_GPU_ROLLED for (int who = 0; who < size; ++who) {
      LaneFloats mine = sum;
      ISQ_GPU_UNROLL for (int i = 0; i < kOwn; ++i) mine += term(i);
      sum = from(mine.v, who);
    }
    return sum;
  }
  template <int kOwn>
  ISQ_DEVICE LaneFloats sum_of_squares(const LaneFloats (&x)[kOwn]) const {
    return sum<kOwn>([&](int i) { return x[i] * x[i]; });
  }
};

// What a format gets in addition to the weights.
struct BlockScope {
  Team team;
  LaneFloats largest;          // magnitude in the block
  LaneFloats row_mean_square;  // for formats that ask for it
  Rule rule;
  Shape shape;
  int64_t index;  // of the block in the matrix
  bool exists;    // whether the matrix has this block
  const void* workspace;
  float* staged;    // shared memory of the whole tile; the next two are parts of it
  uint8_t* block;   // where the block's bytes go, aligned as the format says
  uint32_t* codes;  // room for a byte per weight of the block
};

// Defaults for the properties of a format.
struct TileFormat {
  static constexpr int kOwn = 32;
  static constexpr bool kTakesImportance = false, kNeedsRowMeanSquare = false;
  static ISQ_DEVICE bool f16_scales(const Shape&) { return true; }
  // A format also has: template <bool kWeighted> bool quantize(x, importance, scope), which writes a block and returns
  // whether its scale overflows.
};

// ---- bytes of blocks -----------------------------------------------------------------------------------------------

ISQ_DEVICE void store_u16(uint8_t* to, uint32_t value) { *reinterpret_cast<uint16_t*>(to) = (uint16_t)value; }
template <int kAlign>
ISQ_DEVICE void store_u32(uint8_t* to, uint32_t value) {
  if constexpr (kAlign >= 4) {
    *reinterpret_cast<uint32_t*>(to) = value;
  } else if constexpr (kAlign == 1) {
    for (int i = 0; i < 4; ++i) to[i] = (uint8_t)(value >> (8 * i));
  } else {
    store_u16(to, value);
    store_u16(to + 2, value >> 16);
  }
}
// Four codes of eight bits; higher bits are ignored.
ISQ_DEVICE uint32_t four_bytes(LaneInts a, LaneInts b, LaneInts c, LaneInts d) {
  return permute(permute(a.v, b.v, 0x0040), permute(c.v, d.v, 0x0040), 0x5410);
}

// ---- in and out ----------------------------------------------------------------------------------------------------

// Sixteen bytes whose address aligns to two.
ISQ_DEVICE uint4 load_piece(const uint8_t* from, bool aligned) {
  if (aligned) return *reinterpret_cast<const uint4*>(from);
  return {load_u32<2>(from), load_u32<2>(from + 4), load_u32<2>(from + 8), load_u32<2>(from + 12)};
}

// Elements 0 .. 3 of four floats, or 0 .. 7 of eight 16-bit ones.
ISQ_DEVICE float element_of(const uint4& piece, Dtype dtype, int i) {
  if (dtype == Dtype::kF32) return __uint_as_float(i < 2 ? (i ? piece.y : piece.x) : (i == 2 ? piece.z : piece.w));
  const uint32_t pair = i < 4 ? (i < 2 ? piece.x : piece.y) : (i < 6 ? piece.z : piece.w);
  const uint16_t half = (uint16_t)(pair >> 16 * (i % 2));
  return dtype == Dtype::kF16 ? f16_to_f32(half) : bf16_to_f32(half);
}

// The place of an element in shared memory. The weights of different threads start at different banks.
template <int kOwn>
ISQ_DEVICE int staged_at(int element) {
  return element / kOwn * (kOwn + 1) + element % kOwn;
}

// Copies `count` elements of the array `from` to shared memory, and zeros up to the end of the tile. place(e) is the
// index of the tile's element e; it must keep runs of 16 bytes together.
template <int kOwn, Dtype dtype, class Place>
ISQ_DEVICE void stage(const void* from, int count, float* staged, const Place& place) {
  constexpr int kEach = dtype == Dtype::kF32 ? 4 : 8, kPieces = kOwn / kEach;
  uint4 pieces[kPieces];
  const auto load = [&](bool aligned) {
    ISQ_GPU_UNROLL for (int p = 0; p < kPieces; ++p) {
      const int first = (p * kQuantizeThreads + (int)threadIdx.x) * kEach;
      pieces[p] = {0, 0, 0, 0};
      if (first < count) {
        pieces[p] = load_piece(static_cast<const uint8_t*>(from) + place(first) * (16 / kEach), aligned);
      }
    }
  };
  if (reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    load(true);
  } else {
    load(false);
  }
  ISQ_GPU_UNROLL for (int p = 0; p < kPieces; ++p) {
    float* const to = staged + staged_at<kOwn>((p * kQuantizeThreads + (int)threadIdx.x) * kEach);
    ISQ_GPU_UNROLL for (int i = 0; i < kEach; ++i) to[i] = element_of(pieces[p], dtype, i);
  }
}

// Weights from the flat index `first` on.
template <int kOwn>
ISQ_DEVICE void stage_weights(const QuantizeJob& job, int64_t first, int count, float* staged) {
  const auto place = [=](int e) { return first + e; };
  if (job.dtype == Dtype::kF32) {
    stage<kOwn, Dtype::kF32>(job.w, count, staged, place);
  } else if (job.dtype == Dtype::kF16) {
    stage<kOwn, Dtype::kF16>(job.w, count, staged, place);
  } else {
    stage<kOwn, Dtype::kBf16>(job.w, count, staged, place);
  }
}

// The importance of the columns of these weights.
template <int kOwn>
ISQ_DEVICE void stage_importance(const QuantizeJob& job, int64_t first, int count, float* staged) {
  const uint32_t k = (uint32_t)job.k, column = (uint32_t)(first % job.k);
  stage<kOwn, Dtype::kF32>(job.importance, count, staged, [=](int e) { return (int64_t)((column + e) % k); });
}

template <int kOwn>
ISQ_DEVICE void take_own(const float* staged, LaneFloats (&x)[kOwn]) {
  ISQ_GPU_UNROLL for (int i = 0; i < kOwn; ++i) x[i] = staged[threadIdx.x * (kOwn + 1) + i];
}
template <int kOwn>
ISQ_DEVICE void put_own(const LaneFloats (&x)[kOwn], float* staged) {
  ISQ_GPU_UNROLL for (int i = 0; i < kOwn; ++i) staged[threadIdx.x * (kOwn + 1) + i] = x[i].v;
}

ISQ_DEVICE void lower_to(int64_t* target, int64_t value) {
  atomicMin(reinterpret_cast<long long*>(target), (long long)value);
}

// The largest magnitude as bits, which are ordered like the numbers, with NaN last. Reports the first weight that is
// not finite.
template <int kOwn>
ISQ_DEVICE uint32_t largest_bits(const LaneFloats (&x)[kOwn], int64_t first, int64_t* bad_weight) {
  float extreme = 0.0f;
  ISQ_GPU_UNROLL for (int i = 0; i < kOwn; ++i) extreme = max_or_nan(::fabsf(x[i].v), extreme);
  const uint32_t largest = __float_as_uint(extreme) & kMagnitude;
  if (largest >= kInfinityBits) {
    int bad = 0;
    ISQ_GPU_UNROLL for (int i = kOwn - 1; i >= 0; --i) {
      if ((__float_as_uint(x[i].v) & kMagnitude) >= kInfinityBits) bad = i;
    }
    lower_to(bad_weight, first + bad);
  }
  return largest;
}

// Writes a tile's bytes, which have the same offset from a multiple of sixteen in shared as in global memory.
ISQ_DEVICE void write_tile(const uint8_t* packed, uint8_t* out, int bytes) {
  const int shift = (int)(reinterpret_cast<uintptr_t>(out) % 16), end = shift + bytes;
  for (int at = 16 * (int)threadIdx.x; at < end; at += 16 * kQuantizeThreads) {
    if (at >= shift && at + 16 <= end) {
      *reinterpret_cast<uint4*>(out - shift + at) = *reinterpret_cast<const uint4*>(packed + at);
    } else {
      for (int i = at; i < at + 16; ++i) {
        if (i >= shift && i < end) out[i - shift] = packed[i];
      }
    }
  }
}

// ---- the frame -----------------------------------------------------------------------------------------------------

// The shared memory of a tile. It first holds weights as floats, then packed bytes and codes.
template <int kOwn>
struct TileMemory {
  static constexpr int kTile = kQuantizeThreads * kOwn, kCodesAt = kTile * 5 / 4 + 16;
  static constexpr int kFloats = kQuantizeThreads * (kOwn + 1);
  static_assert(kCodesAt + kTile <= 4 * kFloats && kCodesAt % 16 == 0);  // no block has more than 1.25 bytes per weight
};

// Four blocks of threads per multiprocessor are enough and leave each thread 128 registers. With more blocks, some
// formats would spill.
template <class Q, bool kWeighted>
__global__ void __launch_bounds__(kQuantizeThreads, 4)
    quantize_kernel(QuantizeJob job, Shape shape, const float* row_mean_square) {
  constexpr int kOwn = Q::kOwn, kTile = TileMemory<kOwn>::kTile;
  ISQ_SHARED(float, staged, [TileMemory<kOwn>::kFloats]);
  const int64_t first = (int64_t)blockIdx.x * kTile, left = job.rows * job.k - first;
  const int count = left < kTile ? (int)left : kTile, mine = (int)threadIdx.x * kOwn;

  stage_weights<kOwn>(job, first, count, staged);
  __syncthreads();
  LaneFloats x[kOwn], importance[kOwn];
  take_own(staged, x);
  if constexpr (kWeighted) {
    __syncthreads();
    stage_importance<kOwn>(job, first, count, staged);
    __syncthreads();
    take_own(staged, importance);
  }
  __syncthreads();

  const int block_size = Q::kBlock ? Q::kBlock : shape.block, team_size = block_size / kOwn;
  const int block_bytes = Q::kBlock ? (int)sizeof(typename Q::Block) : shape.block_bytes;
  const int block = (int)threadIdx.x / team_size;
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(staged);
  const int64_t first_block = (int64_t)blockIdx.x * (kTile / block_size);
  uint8_t* const out = job.out + first_block * block_bytes;
  BlockScope scope;
  scope.team = {team_size, (int)threadIdx.x % team_size};
  scope.largest = __uint_as_float(scope.team.largest(largest_bits(x, first + mine, job.faults)));
  scope.row_mean_square = 0.0f;
  if (Q::kNeedsRowMeanSquare && kWeighted && mine < count) {
    scope.row_mean_square = row_mean_square[(first + mine) / job.k];
  }
  scope.rule = job.rule;
  scope.shape = shape;
  scope.index = first_block + block;
  scope.exists = mine < count;
  scope.workspace = job.workspace;
  scope.staged = staged;
  scope.block = bytes + reinterpret_cast<uintptr_t>(out) % 16 + block * block_bytes;
  scope.codes = reinterpret_cast<uint32_t*>(bytes + TileMemory<kOwn>::kCodesAt + block * block_size);

  bool overflow = Q::template quantize<kWeighted>(x, importance, scope);
  if (Q::f16_scales(shape)) overflow |= scope.largest.v > kLargestWithF16Scales;
  if (overflow && scope.team.member == 0 && scope.exists) lower_to(job.faults + 1, first + mine);
  __syncthreads();
  write_tile(bytes, out, count / block_size * block_bytes);
}

}  // namespace isqtorch::cuda
