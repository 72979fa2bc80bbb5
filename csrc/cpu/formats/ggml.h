// ggml's 32-weight formats q4_0 q4_1 q5_0 q5_1 q8_0 q8_1: how a block decodes, and how its codes are chosen.
#pragma once

#include "cpu/formats/list.h"
#include "cpu/quantize/blockwise.h"
#include "searches/search.h"

namespace isqtorch::ISQ_ISA {

// The weight of each element's squared error when importance is given: large elements in important columns count most.
template <int kBlock>
ISQ_INLINE void importance_weights(const LaneBlocks<kBlock>& in, LaneFloats mean_square, LaneFloats* w) {
  for (int i = 0; i < kBlock; ++i) w[i] = in.importance[i] * sqrt(mean_square + in.x[i] * in.x[i]);
}

// 1 / d, or 0 where that is not finite: for a block of zeros, or of numbers whose 16-bit scale would be zero.
ISQ_INLINE LaneFloats reciprocal_or_zero(LaneFloats d) {
  const LaneFloats inverse = 1.0f / d;
  return select(abs(inverse) <= FLT_MAX, inverse, 0.0f);
}

constexpr Guesses kWeightedGuesses = {-0.9f, 0.05f, 36, false};

ISQ_INLINE uint32_t load_high_bits(const uint8_t* qh) {
  uint32_t bits;
  std::memcpy(&bits, qh, 4);
  return bits;
}

// Stores the codes of 4- or 5-bit blocks: q4_0 q4_1 q5_0 q5_1.
template <int kBits, class Block>
ISQ_INLINE void store_codes(const LaneInts* codes, Block* out) {
  store_bytes<16>(out->qs, sizeof(Block), [&](int j) { return (codes[j] & 15) | (codes[j + 16] & 15) << 4; });
  if constexpr (kBits == 5) {
    LaneInts high = splat<LaneInts>(0);
    for (int i = 0; i < 32; ++i) high |= (codes[i] >> 4 & 1) << i;
    for (int l = 0; l < kWidth; ++l) {
      const int32_t bits = high[l];
      std::memcpy(out[l].qh, &bits, 4);
    }
  }
}
// The first (half 0) or last sixteen codes.
template <int kBits, class Block>
ISQ_INLINE I load_codes(const Block& block, int half) {
  I codes = load_bytes(block.qs) >> (4 * half) & 15;
  if constexpr (kBits == 5) {
    constexpr I kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    codes |= (splat((int32_t)load_high_bits(block.qh)) >> (16 * half + kLane) & 1) << 4;
  }
  return codes;
}

// w = d * (code - 2^(bits-1)): q4_0, q5_0
template <int kBits, class BlockType>
struct Symmetric32 : BlockwiseFormat {
  using Block = BlockType;
  static constexpr int kBlock = 32, kHalf = 1 << (kBits - 1);
  static constexpr bool kTakesImportance = true, kNeedsRowMeanSquare = true;

  static void decode(const Block& block, float* w) {
    const float d = f16_to_f32(block.d);
    for (int half = 0; half < 2; ++half) {
      store_lanes(to_float(load_codes<kBits>(block, half) - kHalf) * d, w + 16 * half);
    }
  }

  struct Chosen {
    LaneInts codes[32];
    Halves d;
    LaneInts overflow() const { return d.overflow; }
    LaneFloats value(int, LaneInts code) const { return to_float(code - kHalf) * d.value; }
  };
  static constexpr int kLastRank = 2 * kHalf - 1;

  static void choose(const LaneBlocks<32>& in, Chosen* out) {
    LaneInts* const codes = out->codes;
    LaneFloats d;
    if (in.weighted) {
      LaneFloats w[32], levels[32];
      importance_weights(in, in.row_mean_square, w);
      d = search_symmetric<LaneFloats, 32>(in.x, w, kHalf, levels);
      for (int i = 0; i < 32; ++i) codes[i] = truncate(levels[i]);
    } else {
      d = first_extreme(in.x, 32) / (float)-kHalf;
      const LaneFloats inverse = reciprocal_or_zero(d);
      for (int i = 0; i < 32; ++i)
        codes[i] = clamp(truncate(in.x[i] * inverse + ((float)kHalf + 0.5f)), 0, 2 * kHalf - 1);
    }
    out->d = to_f16(d);
  }

  static void store(const Chosen& chosen, Block* out) {
    for (int l = 0; l < kWidth; ++l) out[l].d = chosen.d.bits[l];
    store_codes<kBits>(chosen.codes, out);
  }
};
struct Q4_0 : Symmetric32<4, BlockQ4_0> {};
struct Q5_0 : Symmetric32<5, BlockQ5_0> {};

// w = d * code + m: q4_1, q5_1
template <int kBits, class BlockType>
struct MinMax32 : BlockwiseFormat {
  using Block = BlockType;
  static constexpr int kBlock = 32, kMax = (1 << kBits) - 1;
  static constexpr bool kTakesImportance = true, kNeedsRowMeanSquare = true;

  static void decode(const Block& block, float* w) {
    const float d = f16_to_f32(block.d), m = f16_to_f32(block.m);
    for (int half = 0; half < 2; ++half) {
      store_lanes(to_float(load_codes<kBits>(block, half)) * d + m, w + 16 * half);
    }
  }

  struct Chosen {
    LaneInts codes[32];
    Halves d, m;
    LaneInts overflow() const { return d.overflow | m.overflow; }
    LaneFloats value(int, LaneInts code) const { return to_float(code) * d.value + m.value; }
  };
  static constexpr int kLastRank = kMax;

  static void choose(const LaneBlocks<32>& in, Chosen* out) {
    LaneInts* const codes = out->codes;
    LaneFloats d, m;
    if (in.weighted) {
      LaneFloats w[32], levels[32], offset;
      importance_weights(in, in.row_mean_square, w);
      d = search_affine<LaneFloats, 32>(in.x, w, kMax, kWeightedGuesses, levels, &offset);
      m = -offset;
      for (int i = 0; i < 32; ++i) codes[i] = truncate(levels[i]);
    } else {
      LaneFloats high;
      first_min_max(in.x, 32, &m, &high);
      d = (high - m) / (float)kMax;
      const LaneFloats inverse = reciprocal_or_zero(d);
      for (int i = 0; i < 32; ++i) codes[i] = clamp(truncate((in.x[i] - m) * inverse + 0.5f), 0, kMax);
    }
    out->d = to_f16(d);
    out->m = to_f16(m);
  }

  static void store(const Chosen& chosen, Block* out) {
    for (int l = 0; l < kWidth; ++l) {
      out[l].d = chosen.d.bits[l];
      out[l].m = chosen.m.bits[l];
    }
    store_codes<kBits>(chosen.codes, out);
  }
};
struct Q4_1 : MinMax32<4, BlockQ4_1> {};
struct Q5_1 : MinMax32<5, BlockQ5_1> {};

// w = d * code, signed bytes: q8_0, and q8_1 which also stores d * sum(codes)
template <class BlockType, bool kHasSum>
struct Bytes32 : BlockwiseFormat {
  using Block = BlockType;
  static constexpr int kBlock = 32;
  static constexpr bool kTakesImportance = false;

  static void decode(const Block& block, float* w) {
    const float d = f16_to_f32(block.d);
    for (int i = 0; i < 32; ++i) w[i] = (float)block.qs[i] * d;
  }

  struct Chosen {
    LaneInts codes[32];
    Halves d;
    LaneFloats s;  // stored in f16; may be infinite there for large weights, because decoding does not use it
    LaneInts overflow() const { return d.overflow; }
    LaneFloats value(int, LaneInts code) const { return to_float(code) * d.value; }
    LaneInts sum() const {
      LaneInts sum = splat<LaneInts>(0);
      for (int i = 0; i < 32; ++i) sum += codes[i];
      return sum;
    }
  };
  static constexpr int kFirstRank = -127, kLastRank = 127;

  static void choose(const LaneBlocks<32>& in, Chosen* out) {
    const LaneFloats d = in.largest / 127.0f;
    const LaneFloats inverse = reciprocal_or_zero(d);
    for (int i = 0; i < 32; ++i) out->codes[i] = round_away(in.x[i] * inverse);
    out->d = to_f16(d);
    if constexpr (kHasSum) out->s = d * to_float(out->sum());
  }

  static void codes_changed(LaneInts where, Chosen* chosen) {
    if constexpr (kHasSum) chosen->s = select(where, chosen->d.value * to_float(chosen->sum()), chosen->s);
  }

  static void store(const Chosen& chosen, Block* out) {
    store_bytes<32>(out->qs, sizeof(Block), [&](int i) { return chosen.codes[i] & 255; });
    for (int l = 0; l < kWidth; ++l) out[l].d = chosen.d.bits[l];
    if constexpr (kHasSum) {
      const Halves s = to_f16(chosen.s);
      for (int l = 0; l < kWidth; ++l) out[l].s = s.bits[l];
    }
  }
};
struct Q8_0 : Bytes32<BlockQ8_0, false> {};
struct Q8_1 : Bytes32<BlockQ8_1, true> {};

}  // namespace isqtorch::ISQ_ISA
