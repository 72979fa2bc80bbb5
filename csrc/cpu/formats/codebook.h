// Formats whose codes are numbers of levels in a table: ggml's iq4_nl and iq4_xs, and mxfp4.
#pragma once

#include "cpu/formats/kquants_common.h"
#include "searches/codebook.h"

namespace isqtorch::ISQ_ISA {

// Sixteen bytes of codes as 32 weights.
ISQ_INLINE void decode_levels(const uint8_t* qs, float scale, const float* levels, float* w) {
  for (int l = 0; l < 16; ++l) {
    w[l] = scale * levels[qs[l] & 15];
    w[l + 16] = scale * levels[qs[l] >> 4];
  }
}

constexpr float kIq4Floats[16] = {ISQ_IQ4_LEVELS}, kE2m1Floats[16] = {ISQ_E2M1_LEVELS};

// The level of each lane's code.
ISQ_INLINE LaneFloats levels_of(LaneInts codes, const float* levels) {
  LaneFloats found;
  for (int l = 0; l < kWidth; ++l) found[l] = levels[codes[l] & 15];
  return found;
}

// w = d * level
struct Iq4Nl : BlockwiseFormat {
  using Block = BlockIq4Nl;
  static constexpr int kBlock = 32;
  static constexpr bool kTakesImportance = true;

  static void decode(const Block& block, float* w) { decode_levels(block.qs, f16_to_f32(block.d), kIq4Floats, w); }

  struct Chosen {
    LaneInts codes[32];
    Halves d;
    LaneInts overflow() const { return d.overflow; }
    LaneFloats value(int, LaneInts code) const { return d.value * levels_of(code, kIq4Floats); }
  };
  static constexpr int kLastRank = 15;

  static void choose(const LaneBlocks<32>& in, Chosen* out) {
    LaneFloats w[32];
    iq4_weights(in, w);
    const LaneFloats d = search_iq4<LaneFloats, 32>(in.x, w), inverse = reciprocal_or_zero(d);
    for (int i = 0; i < 32; ++i) out->codes[i] = nearest_iq4_code(in.x[i] * inverse);
    out->d = to_f16(d);
  }

  static void store(const Chosen& chosen, Block* out) {
    for (int l = 0; l < kWidth; ++l) out[l].d = chosen.d.bits[l];
    store_codes<4>(chosen.codes, out);
  }

  // The weights of the squared errors: x^2, or with importance.
  template <int kBlock>
  ISQ_INLINE static void iq4_weights(const LaneBlocks<kBlock>& in, LaneFloats* w) {
    if (!in.weighted) {
      for (int i = 0; i < kBlock; ++i) w[i] = in.x[i] * in.x[i];
      return;
    }
    LaneFloats sum = splat<LaneFloats>(0.0f);
    for (int i = 0; i < kBlock; ++i) sum += in.x[i] * in.x[i];
    importance_weights(in, sum * (2.0f / kBlock), w);
  }
};

// w = d * sc * level, sub-blocks of 32
struct Iq4Xs : BlockwiseFormat {
  using Block = BlockIq4Xs;
  static constexpr int kBlock = 256;
  static constexpr bool kTakesImportance = true;

  static void decode(const Block& block, float* w) {
    const float d = f16_to_f32(block.d);
    for (int j = 0; j < 8; ++j) {
      const int low = block.scales_l[j / 2] >> (4 * (j % 2)) & 15, high = block.scales_h[j / 4] >> (2 * (j % 4)) & 3;
      decode_levels(block.qs + 16 * j, d * (float)((low | high << 4) - 32), kIq4Floats, w + 32 * j);
    }
  }

  struct Chosen {
    LaneInts codes[256], sc[8];  // sc from 0 to 63, for -32 to 31
    Halves d;
    LaneInts overflow() const { return d.overflow; }
    LaneFloats value(int i, LaneInts code) const {
      return d.value * to_float(sc[i / 32] - 32) * levels_of(code, kIq4Floats);
    }
  };
  static constexpr int kLastRank = 15;

  static void choose(const LaneBlocks<256>& in, Chosen* out) {
    using T = Twin<LaneFloats>;
    LaneFloats w[256], scales[8];
    LaneInts *const codes = out->codes, *const sc = out->sc;
    Iq4Nl::iq4_weights(in, w);
    for (int j = 0; j < 8; j += kSide<T>) put<1>(scales, j, search_iq4<T, 32>(in.x + 32 * j, w + 32 * j));
    const LaneFloats d = -first_extreme(scales, 8) / 32.0f, inverse = reciprocal_or_zero(d);
    for (int j = 0; j < 8; ++j) {
      sc[j] = clamp(nearest_int(inverse * scales[j]), -32, 31);
      const LaneFloats step = d * to_float(sc[j]), per_step = reciprocal_or_zero(step);  // ggml takes the exact d
      for (int i = 32 * j; i < 32 * j + 32; ++i) codes[i] = nearest_iq4_code(per_step * in.x[i]);
      sc[j] = sc[j] + 32;
    }
    out->d = to_f16(d);
  }

  static void store(const Chosen& chosen, Block* out) {
    const LaneInts *const codes = chosen.codes, *const sc = chosen.sc;
    for (int l = 0; l < kWidth; ++l) {
      out[l].d = chosen.d.bits[l];
      for (int h = 0; h < 2; ++h) {
        const LaneInts* at = sc + 4 * h;
        out[l].scales_h[h] = (uint8_t)(at[0][l] >> 4 | at[1][l] >> 4 << 2 | at[2][l] >> 4 << 4 | at[3][l] >> 4 << 6);
      }
    }
    store_bytes<4>(out->scales_l, sizeof(Block), [&](int j) { return (sc[2 * j] & 15) | (sc[2 * j + 1] & 15) << 4; });
    store_bytes<128>(out->qs, sizeof(Block), [&](int j) {
      const LaneInts* at = codes + 32 * (j / 16) + j % 16;
      return at[0] | at[16] << 4;
    });
  }
};

// w = 2^(e - 128) * level
struct Mxfp4 : BlockwiseFormat {
  using Block = BlockMxfp4;
  static constexpr int kBlock = 32;
  static constexpr bool kTakesImportance = false, kF16Scales = false;

  static void decode(const Block& block, float* w) {
    const uint32_t e = block.e, bits = e > 1 ? (e - 1) << 23 : 0x200000u << e;
    decode_levels(block.qs, bits_float(bits), kE2m1Floats, w);
  }

  struct Chosen {
    LaneInts codes[32], e;
    LaneInts overflow() const { return splat<LaneInts>(0); }
    LaneFloats value(int, LaneInts code) const { return mxfp4_step(e) * levels_of(code, kE2m1Floats); }
  };
  // By size, with the sign of the weight. There is one zero.
  static constexpr int kFirstRank = -7, kLastRank = 7;
  static LaneInts code_of(LaneInts rank) { return select(rank < 0, 8 - rank, rank); }
  static LaneInts rank_of(LaneInts code) { return select(code < 8, code, 8 - code); }

  static void choose(const LaneBlocks<32>& in, Chosen* out) {
    out->e = mxfp4_exponent(in.largest);
    const LaneFloats step = mxfp4_step(out->e);
    for (int i = 0; i < 32; ++i) out->codes[i] = mxfp4_code(in.x[i], step);
  }

  static void store(const Chosen& chosen, Block* out) {
    for (int l = 0; l < kWidth; ++l) out[l].e = (uint8_t)chosen.e[l];
    store_codes<4>(chosen.codes, out);
  }
};

}  // namespace isqtorch::ISQ_ISA
