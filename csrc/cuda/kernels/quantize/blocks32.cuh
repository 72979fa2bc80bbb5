// The 32-weight formats q4_0 q4_1 q5_0 q5_1 q8_0 q8_1. A thread has a block. The steps are those of cpu/formats/ggml.h.
#pragma once

#include "cuda/formats/ggml32.cuh"
#include "cuda/kernels/quantize/launch.cuh"
#include "cuda/kernels/quantize/rounding.cuh"
#include "cuda/kernels/quantize/searches.cuh"

namespace isqtorch::cuda {

// The weight of each element's squared error when importance is given.
template <int kOwn>
ISQ_DEVICE void importance_weights(const LaneFloats (&x)[kOwn], LaneFloats (&importance)[kOwn],
                                   LaneFloats mean_square) {
  ISQ_GPU_UNROLL for (int i = 0; i < kOwn; ++i) importance[i] = importance[i] * sqrt(mean_square + x[i] * x[i]);
}

ISQ_DEVICE Guesses weighted_guesses() { return {-0.9f, 0.05f, 36, false}; }

// The part of ggml's 4- and 5-bit blocks behind the f16 numbers: for 5 bits a word of high bits, then the low nibbles.
template <int kBits, int kAlign>
ISQ_DEVICE void store_nibbles(const LaneInts (&codes)[32], uint8_t* to) {
  if constexpr (kBits == 5) {
    uint32_t high = 0;
    ISQ_GPU_UNROLL for (int i = 0; i < 32; ++i) high |= ((uint32_t)codes[i].v >> 4 & 1) << i;
    store_u32<kAlign>(to, high);
    to += 4;
  }
  ISQ_GPU_UNROLL for (int j = 0; j < 16; j += 4) {
    const uint32_t low = four_bytes(codes[j], codes[j + 1], codes[j + 2], codes[j + 3]);
    const uint32_t high = four_bytes(codes[j + 16], codes[j + 17], codes[j + 18], codes[j + 19]);
    store_u32<kAlign>(to + j, (low & 0x0f0f0f0f) | (high & 0x0f0f0f0f) << 4);
  }
}

// w = d * (code - 2^(bits-1)): q4_0, q5_0
template <int kBits, class BlockType>
struct QuantizeSymmetric32 : TileFormat {
  using Block = BlockType;
  static constexpr int kBlock = 32, kHalf = 1 << (kBits - 1);
  static constexpr bool kTakesImportance = true, kNeedsRowMeanSquare = true;

  template <bool kWeighted>
  static ISQ_DEVICE bool quantize(const LaneFloats (&x)[32], LaneFloats (&importance)[32], const BlockScope& scope) {
    LaneInts codes[32];
    LaneFloats d;
    if constexpr (kWeighted) {
      LaneFloats levels[32];
      importance_weights(x, importance, scope.row_mean_square);
      d = search_symmetric<LaneFloats, 32>(x, importance, kHalf, levels);
      ISQ_GPU_UNROLL for (int i = 0; i < 32; ++i) codes[i] = truncate(levels[i]);
    } else {
      d = first_extreme(x) / (float)-kHalf;
      const LaneFloats inverse = reciprocal_or_zero(d);
      ISQ_GPU_UNROLL for (int i = 0; i < 32; ++i) {
        codes[i] = clamp(truncate(x[i] * inverse + ((float)kHalf + 0.5f)), 0, 2 * kHalf - 1);
      }
    }
    const Half stored = to_f16(d);
    store_u16(scope.block, stored.bits);
    store_nibbles<kBits, kAlignOf<Block>>(codes, scope.block + 2);
    return stored.overflow;
  }
};

// w = d * code + m: q4_1, q5_1
template <int kBits, class BlockType>
struct QuantizeMinMax32 : TileFormat {
  using Block = BlockType;
  static constexpr int kBlock = 32, kMax = (1 << kBits) - 1;
  static constexpr bool kTakesImportance = true, kNeedsRowMeanSquare = true;

  template <bool kWeighted>
  static ISQ_DEVICE bool quantize(const LaneFloats (&x)[32], LaneFloats (&importance)[32], const BlockScope& scope) {
    LaneInts codes[32];
    LaneFloats d, m;
    if constexpr (kWeighted) {
      LaneFloats levels[32], offset;
      importance_weights(x, importance, scope.row_mean_square);
      d = search_affine<LaneFloats, 32>(x, importance, kMax, weighted_guesses(), levels, &offset);
      m = -offset;
      ISQ_GPU_UNROLL for (int i = 0; i < 32; ++i) codes[i] = truncate(levels[i]);
    } else {
      LaneFloats high;
      first_min_max(x, &m, &high);
      d = (high - m) / (float)kMax;
      const LaneFloats inverse = reciprocal_or_zero(d);
      ISQ_GPU_UNROLL for (int i = 0; i < 32; ++i) codes[i] = clamp(truncate((x[i] - m) * inverse + 0.5f), 0, kMax);
    }
    const Half stored_d = to_f16(d), stored_m = to_f16(m);
    store_u16(scope.block, stored_d.bits);
    store_u16(scope.block + 2, stored_m.bits);
    store_nibbles<kBits, kAlignOf<Block>>(codes, scope.block + 4);
    return stored_d.overflow || stored_m.overflow;
  }
};

// w = d * code, signed bytes: q8_0, and q8_1 which also stores d * sum(codes)
template <class BlockType, bool kHasSum>
struct QuantizeBytes32 : TileFormat {
  using Block = BlockType;
  static constexpr int kBlock = 32;

  template <bool kWeighted>
  static ISQ_DEVICE bool quantize(const LaneFloats (&x)[32], LaneFloats (&)[32], const BlockScope& scope) {
    const LaneFloats d = scope.largest / 127.0f, inverse = reciprocal_or_zero(d);
    LaneInts codes[32], sum = 0;
    ISQ_GPU_UNROLL for (int i = 0; i < 32; ++i) {
      codes[i] = small_round_away(x[i] * inverse);
      if (kHasSum) sum = sum + codes[i];
    }
    const Half stored = to_f16(d);
    store_u16(scope.block, stored.bits);
    if (kHasSum) store_u16(scope.block + 2, to_f16(d * to_float(sum)).bits);
    ISQ_GPU_UNROLL for (int j = 0; j < 32; j += 4) {
      store_u32<kAlignOf<Block>>(scope.block + (kHasSum ? 4 : 2) + j,
                                 four_bytes(codes[j], codes[j + 1], codes[j + 2], codes[j + 3]));
    }
    return stored.overflow;
  }
};

template <>
struct QuantizerOf<Q4_0> : BlockByBlock<QuantizeSymmetric32<4, BlockQ4_0>> {};
template <>
struct QuantizerOf<Q4_1> : BlockByBlock<QuantizeMinMax32<4, BlockQ4_1>> {};
template <>
struct QuantizerOf<Q5_0> : BlockByBlock<QuantizeSymmetric32<5, BlockQ5_0>> {};
template <>
struct QuantizerOf<Q5_1> : BlockByBlock<QuantizeMinMax32<5, BlockQ5_1>> {};
template <>
struct QuantizerOf<Q8_0> : BlockByBlock<QuantizeBytes32<BlockQ8_0, false>> {};
template <>
struct QuantizerOf<Q8_1> : BlockByBlock<QuantizeBytes32<BlockQ8_1, true>> {};

}  // namespace isqtorch::cuda
