// What the kernels of `linear` and `experts_linear` share: the path of weights through shared memory, activations as an
// operand of the matrix unit, and the product of both.
//
// Weights are the left operand of m16n8k16, sixteen rows at a time. The right operand is eight rows of x, here called
// tokens. So one token costs as much as eight, and no weight ever moves between lanes. Lane (g, t), with g = lane / 4
// and t = lane % 4, takes rows g and g + 8 of every sixteen and token g of every eight; of each it takes the eight
// numbers of a slice that the format's Order gives to t.
#pragma once

#include "cuda/formats/format.cuh"
#include "cuda/launchers.cuh"

namespace isqtorch::cuda {

// The arguments of a kernel.
struct Task {
  const uint8_t *x, *weight;
  const void* bias;
  void* y;
  int m, n, k, row_bytes, chunk_bytes;
  Shape shape;
  // The number of parts: of x, or of (token, slot) pairs. A block of threads takes some rows of weights and one part.
  unsigned parts;
  int split;  // warps of a block that share rows and split k
  // Experts only; otherwise null or 0.
  const void* ids;
  bool wide_ids, rows_per_slot;
  int slots, experts;
  const int4* spans;  // of `order`: expert, first, count
  const int* order;   // (token, slot) pairs by expert
};

inline void set_shape(Task& task, const Shape& shape) {
  task.shape = shape;
  task.row_bytes = task.k / shape.block * shape.block_bytes;
  task.chunk_bytes = kChunk / shape.block * shape.block_bytes;
}

ISQ_DEVICE int64_t load_id(const void* ids, bool wide, int64_t at) {
  return wide ? static_cast<const int64_t*>(ids)[at] : static_cast<const int32_t*>(ids)[at];
}

// ---- activations ----------------------------------------------------------------------------------------------------

// f32 activations become the sum of two bf16 numbers, which keeps 16 of their 24 significant bits and any exponent.
template <Dtype dtype>
struct Activations {
  static constexpr bool kF32 = dtype == Dtype::kF32;
  static constexpr Element kElement = dtype == Dtype::kF16 ? Element::kF16 : Element::kBf16;
  static constexpr int kParts = kF32 ? 2 : 1, kBytes = kF32 ? 4 : 2;
  static constexpr int kWords = 2 * kBytes;  // a lane's eight numbers, as they are in memory
  static constexpr int kSliceBytes = kSlice * kBytes;
  static constexpr uint32_t kOnes = kElement == Element::kF16 ? 0x3c003c00u : 0x3f803f80u;

  // A lane's numbers are at one or two places of a slice, `near` and `far`. These are the byte offset of near, and the
  // one bit in which far differs from it.
  template <Order order>
  static ISQ_DEVICE int near_bytes(int t) {
    return t * (order == Order::kQuads ? 4 : 8) * kBytes;
  }
  template <Order order>
  static constexpr int kFar = order == Order::kQuads ? 16 * kBytes : 16;

  template <Order order>
  static ISQ_DEVICE void load(const uint8_t* near, const uint8_t* far, uint32_t (&words)[kWords]) {
    if constexpr (!kF32 && order == Order::kQuads) {
      const uint2 a = *reinterpret_cast<const uint2*>(near), b = *reinterpret_cast<const uint2*>(far);
      words[0] = a.x, words[1] = a.y, words[2] = b.x, words[3] = b.y;
    } else {
      const uint4 a = *reinterpret_cast<const uint4*>(near);
      words[0] = a.x, words[1] = a.y, words[2] = a.z, words[3] = a.w;
      if constexpr (kF32) {
        const uint4 b = *reinterpret_cast<const uint4*>(far);
        words[4] = b.x, words[5] = b.y, words[6] = b.z, words[7] = b.w;
      }
    }
  }

  // Makes the pairs of an Order.
  template <Order order>
  static ISQ_DEVICE void pair_up(const uint32_t (&words)[kWords], uint32_t (&pairs)[kParts][4]) {
    constexpr bool kByQuads = order == Order::kQuads;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kF32) {
        const int first = kByQuads ? i / 2 * 4 + i % 2 : i, second = first + (kByQuads ? 2 : 4);
        const float a = __uint_as_float(words[first]), b = __uint_as_float(words[second]);
        const uint32_t upper = pack_bf16(a, b);
        pairs[0][i] = upper;
        pairs[1][i] = pack_bf16(a - __uint_as_float(upper << 16), b - __uint_as_float(upper & 0xffff0000u));
      } else {
        const int first = kByQuads ? i / 2 * 2 : i / 2, second = first + (kByQuads ? 1 : 2);
        pairs[0][i] = permute(words[first], words[second], i % 2 ? 0x7632 : 0x5410);
      }
    }
  }
};

template <Dtype dtype>
ISQ_DEVICE float load_float(const void* from, int64_t at) {
  if constexpr (dtype == Dtype::kF32) return static_cast<const float*>(from)[at];
  const uint16_t half = static_cast<const uint16_t*>(from)[at];
  return dtype == Dtype::kF16 ? f16_to_f32(half) : bf16_to_f32(half);
}
template <Dtype dtype>
ISQ_DEVICE void store_float(void* to, int64_t at, float value) {
  if constexpr (dtype == Dtype::kF32) {
    static_cast<float*>(to)[at] = value;
  } else {
    static_cast<uint16_t*>(to)[at] = dtype == Dtype::kF16 ? f32_to_f16(value) : f32_to_bf16(value);
  }
}

// ---- weights --------------------------------------------------------------------------------------------------------

// A warp's 16 kTiles rows of weights, chunk by chunk in shared memory. A row is copied in whole 16-byte pieces,
// beginning at the multiple of 16 before the chunk. So the chunk starts inside its first piece, at the same distance as
// in the tensor.
template <class F, int kTiles>
struct WarpRows {
  static constexpr int kRows = 16 * kTiles, kOfLane = 2 * kTiles, kStages = 2;
  static constexpr int kPieces = (F::kMaxChunkBytes + 16 - F::kAlign + 15) / 16;  // of a row's chunk
  // An odd number of pieces: so eight rows begin at eight different eighths of the memory's banks, 16 bytes each. The
  // four lanes of a row read such an eighth at a time.
  static constexpr int kStride = (kPieces | 1) * 16;
  static constexpr int kStageBytes = kRows * kStride, kRingBytes = kStages * kStageBytes;
  // The table behind the ring: the factors of the sums of every group, [slice][row][group of the slice].
  static constexpr int kGroups = kSlice / F::kGroup, kGroupBytes = sizeof(float2);
  static constexpr int kTableBytes = kChunk / kSlice * kRows * kGroups * kGroupBytes;

  const uint8_t* weight;  // global; the first row
  int offset[kOfLane];    // of this lane's rows, g, g + 8, ...
  int own;                // of row g + 8 t
  int g, t;

  // Rows from `first` on. Rows beyond the last repeat the last; their results are discarded.
  ISQ_DEVICE WarpRows(const uint8_t* matrix, int first, const Task& task, int lane) : g(lane / 4), t(lane % 4) {
    weight = matrix + (int64_t)first * task.row_bytes;
#pragma unroll
    for (int j = 0; j < kOfLane; ++j) {
      const int row = 8 * j + g, last = task.n - 1 - first;
      offset[j] = (row < last ? row : last) * task.row_bytes;
      if (j == 0 || j == t) own = offset[j];
    }
  }

  static ISQ_DEVICE int chunk_bytes(const Task& task) {
    if constexpr (F::kBlock != 0) return kChunk / F::kBlock * (int)sizeof(typename F::Block);
    return task.chunk_bytes;
  }

  // Target: SharedAddress, or uint8_t* in a kernel that cannot spare a register for it.
  template <class Target = SharedAddress>
  ISQ_DEVICE void copy(uint8_t* stage, int chunk, const Task& task) const {
    const int from = chunk * chunk_bytes(task), left = task.row_bytes - from;
    const uint8_t* const begin = weight + from + 16 * t;
    const Target to(stage + g * kStride + 16 * t);
    if (left > chunk_bytes(task)) {  // the last piece may go beyond the chunk: the next chunk follows
      copy_pieces<false>(begin, to, chunk_bytes(task));
    } else {  // the end of the row, where memory may end
      copy_pieces<true>(begin, to, left);
    }
  }
  template <bool kCut, class Target>
  ISQ_DEVICE void copy_pieces(const uint8_t* begin, Target to, int bytes) const {
#pragma unroll
    for (int j = 0; j < kOfLane; ++j) {
      const uintptr_t at = reinterpret_cast<uintptr_t>(begin + offset[j]);
      const uint8_t* const piece = reinterpret_cast<const uint8_t*>(at & ~(uintptr_t)15);
      const int wanted = (int)(at & 15) + bytes - 16 * t;
#pragma unroll
      for (int i = 0; i < (kPieces + 3) / 4; ++i) {
        if (64 * i >= wanted) continue;
        copy_async(to, 8 * j * kStride + 64 * i, piece + 64 * i, kCut && wanted < 64 * i + 16 ? wanted - 64 * i : 16);
      }
    }
  }

  // Finds this lane's rows in a copied chunk.
  ISQ_DEVICE void find(const uint8_t* stage, int chunk, const Task& task, const uint8_t* (&chunks)[kOfLane]) const {
#pragma unroll
    for (int j = 0; j < kOfLane; ++j) chunks[j] = find(stage, chunk, task, j, offset[j]);
  }
  ISQ_DEVICE const uint8_t* find(const uint8_t* stage, int chunk, const Task& task, int j, int offset_of_row) const {
    const uint32_t begin = (uint32_t)reinterpret_cast<uintptr_t>(weight) + (uint32_t)(chunk * chunk_bytes(task));
    return stage + (8 * j + g) * kStride + ((begin + (uint32_t)offset_of_row) & 15);
  }

  // Writes the table of a copied chunk, which may be read after a barrier of the warp. The lanes of a quad need the
  // same numbers, so each of them computes those of one row. This is the only place that unpacks a format's scales.
  // `zero`: what the numbers of a product add to codes. kRest: only the first `groups` groups exist; the others get
  // zeros.
  template <bool kRest = false>
  ISQ_DEVICE void tabulate(uint8_t* table, const uint8_t* stage, int chunk, const Task& task, float zero,
                           int groups = 0) const {
    if (t >= kOfLane) return;
    const uint8_t* const bytes = find(stage, chunk, task, t, own);
    const typename F::Row row = F::open(bytes, task.shape);
    uint8_t* const to = table + (8 * t + g) * kGroups * kGroupBytes;
#pragma unroll
    for (int group = 0; group < kChunk / F::kGroup; ++group) {
      Affine affine = F::affine(row, bytes, group, task.shape);
      if (kRest && group >= groups) affine = {0.0f, 0.0f};
      *reinterpret_cast<float2*>(to + (group / kGroups * kRows * kGroups + group % kGroups) * kGroupBytes) = {
          affine.scale, fmaf(-zero, affine.scale, affine.offset)};
    }
  }
};

// ---- the product ----------------------------------------------------------------------------------------------------

// The weights of a slice, to be multiplied by any number of tokens.
template <class F, Element element, int kTiles>
struct SliceWeights {
  static constexpr int kGroups = kSlice / F::kGroup, kPieces = F::template kPieces<element>;
  static constexpr bool kSums = F::template kSums<element>;

  uint32_t a[kTiles][kPieces][2][4];
  float scale[2 * kTiles][kGroups], offset[2 * kTiles][kGroups];

  // `table` begins with this lane's first row.
  ISQ_DEVICE void load(const uint8_t* const (&chunks)[2 * kTiles], const uint8_t* table, int slice, int t,
                       const Shape& shape) {
#pragma unroll
    for (int j = 0; j < 2 * kTiles; ++j) {
      uint32_t pairs[kPieces][4];
      F::template codes<element>(chunks[j], slice, t, shape, pairs);
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[j / 2][piece][i / 2][i % 2 * 2 + j % 2] = pairs[piece][i];
      }
      const uint8_t* const numbers = table + (slice * 16 * kTiles + 8 * j) * kGroups * sizeof(float2);
      if constexpr (kGroups == 2) {
        const float4 both = *reinterpret_cast<const float4*>(numbers);
        scale[j][0] = both.x, offset[j][0] = both.y, scale[j][1] = both.z, offset[j][1] = both.w;
      } else {
        const float2 one = *reinterpret_cast<const float2*>(numbers);
        scale[j][0] = one.x, offset[j][0] = one.y;
      }
    }
  }

  // out += product with eight tokens; out[tile] has the layout of the matrix unit.
  template <int kParts>
  ISQ_DEVICE void multiply(const uint32_t (&b)[kParts][4], uint32_t ones, float (&out)[kTiles][4]) const {
    const uint32_t all_ones[4] = {ones, ones, ones, ones};
    constexpr int kSteps = 2 / kGroups;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      float sums[4] = {};
      if constexpr (kSums) {
#pragma unroll
        for (int step = group * kSteps; step < (group + 1) * kSteps; ++step) {
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            multiply_add<element>(sums, all_ones, {b[part][2 * step], b[part][2 * step + 1]});
          }
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        float acc[4] = {};
#pragma unroll
        for (int step = group * kSteps; step < (group + 1) * kSteps; ++step) {
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
#pragma unroll
            for (int piece = 0; piece < kPieces; ++piece) {
              multiply_add<element>(acc, a[tile][piece][step], {b[part][2 * step], b[part][2 * step + 1]});
            }
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int j = 2 * tile + i / 2;
          if constexpr (kSums) out[tile][i] = fmaf(offset[j][group], sums[i % 2], out[tile][i]);
          out[tile][i] = fmaf(scale[j][group], acc[i], out[tile][i]);
        }
      }
    }
  }
};

}  // namespace isqtorch::cuda
