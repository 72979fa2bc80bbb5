// q2k q4k q5k: every sub-block has a scale and a minimum.
#pragma once

#include "cpu/formats/kquants_common.h"

namespace isqtorch::ISQ_ISA {

// ---- q2k: w = d * sc * code - dmin * mn, sub-blocks of 16 ---------------------------------------------------------

struct Q2K : BlockwiseFormat {
  using Block = BlockQ2K;
  static constexpr int kBlock = 256;
  static constexpr bool kTakesImportance = true;

  static void decode(const Block& block, float* w) {
    const float d = f16_to_f32(block.d), dmin = f16_to_f32(block.dmin);
    float scale[16], offset[16];
    for (int j = 0; j < 16; ++j) {
      scale[j] = d * (float)(block.scales[j] & 15);
      offset[j] = dmin * (float)(block.scales[j] >> 4);
    }
    for (int run = 0; run < 4; ++run) {  // sixteen bytes hold codes of the sub-blocks j, j + 2, j + 4, j + 6
      const I bytes = load_bytes(block.qs + 16 * run);
      for (int c = 0; c < 4; ++c) {
        const int j = run / 2 * 8 + run % 2 + 2 * c;
        store_lanes(scale[j] * to_float(bytes >> (2 * c) & 3) - offset[j], w + 16 * j);
      }
    }
  }

  struct Chosen {
    LaneInts codes[256], sc[16], mn[16];
    Halves d, dmin;
    LaneInts overflow() const { return d.overflow | dmin.overflow; }
    LaneFloats value(int i, LaneInts code) const {
      const LaneFloats scale = d.value * to_float(sc[i / 16] & 15), offset = dmin.value * to_float(mn[i / 16] & 15);
      return scale * to_float(code) - offset;
    }
  };
  static constexpr int kLastRank = 3;

  static void choose(const LaneBlocks<256>& in, Chosen* out) {
    LaneFloats w[256], levels[256], scales[16], mins[16], d, dmin;
    LaneInts *const codes = out->codes, *const sc = out->sc, *const mn = out->mn;
    if (in.weighted) {
      importance_weights(in, block_mean_square(in.x, 1.0f), w);
    } else {
      for (int i = 0; i < 256; ++i) w[i] = abs(in.x[i]);
    }
    using T = Twin<LaneFloats>;
    const Guesses guesses = in.weighted ? kWeightedGuesses : Guesses{-0.5f, 0.1f, 15, true};
    for (int j = 0; j < 16; j += kSide<T>) {
      T offset;
      put<1>(scales, j, search_affine<T, 16>(in.x + 16 * j, w + 16 * j, 3, guesses, levels + 16 * j, &offset));
      put<1>(mins, j, offset);
    }
    if (in.weighted) {
      LaneFloats sums[16];
      sub_block_sums<16>(w, sums);
      d = search_positive<16>(scales, sums, 15, sc);
      dmin = search_positive<16>(mins, sums, 15, mn);
    } else {
      d = integer_scales(scales, sc);
      dmin = integer_scales(mins, mn);
    }
    const Halves stored_d = to_f16(d), stored_dmin = to_f16(dmin);
    for (int j = 0; j < 16; ++j) {
      codes_for_stored_scale<16>(in.x + 16 * j, in.largest, stored_d.value * to_float(sc[j]),
                                 stored_dmin.value * to_float(mn[j]), 0, 3, 0, levels + 16 * j, codes + 16 * j);
    }
    out->d = stored_d;
    out->dmin = stored_dmin;
  }

  static void store(const Chosen& chosen, Block* out) {
    const LaneInts *const sc = chosen.sc, *const mn = chosen.mn;
    store_bytes<16>(out->scales, sizeof(Block), [&](int j) { return (sc[j] & 15) | (mn[j] & 15) << 4; });
    store_crumbs(chosen.codes, out);
    for (int l = 0; l < kWidth; ++l) {
      out[l].d = chosen.d.bits[l];
      out[l].dmin = chosen.dmin.bits[l];
    }
  }

 private:
  // Nonnegative scales as integers 0 .. 15, each times the returned number.
  static LaneFloats integer_scales(const LaneFloats* scales, LaneInts* integers) {
    LaneFloats largest = splat<LaneFloats>(0.0f);
    for (int j = 0; j < 16; ++j) largest = max(scales[j], largest);
    const LaneInts zero = ~(largest > 0.0f);
    const LaneFloats inverse = 15.0f / largest;
    for (int j = 0; j < 16; ++j) integers[j] = select(zero, 0, nearest_int(inverse * scales[j]));
    return select(zero, 0.0f, largest / 15.0f);
  }
};

// ---- q4k, q5k: w = d * ls * code - dmin * lm, sub-blocks of 32 ----------------------------------------------------

// Eight pairs of 6-bit numbers in 12 bytes. Pairs 0-3 are in the low six bits of bytes 0-3 and 4-7. Pairs 4-7 have
// their low four bits in bytes 8-11 (scale low nibble, min high nibble) and their high two bits on top of bytes 0-3 and
// 4-7.
ISQ_INLINE void unpack_pairs(const uint8_t* packed, int* scales, int* mins) {
  for (int j = 0; j < 4; ++j) {
    scales[j] = packed[j] & 63;
    mins[j] = packed[4 + j] & 63;
    scales[4 + j] = (packed[8 + j] & 15) | packed[j] >> 6 << 4;
    mins[4 + j] = packed[8 + j] >> 4 | packed[4 + j] >> 6 << 4;
  }
}
ISQ_INLINE void store_pairs(const LaneInts* scales, const LaneInts* mins, void* packed, int stride) {
  const auto with_top = [](LaneInts low, LaneInts high) { return (low | high >> 4 << 6) & 255; };
  store_bytes<12>(packed, stride, [&](int j) {
    if (j < 4) return with_top(scales[j], scales[4 + j]);
    if (j < 8) return with_top(mins[j - 4], mins[j]);
    return (scales[j - 4] & 15) | (mins[j - 4] & 15) << 4;
  });
}

template <int kBits, class BlockType>
struct Pairs256 : BlockwiseFormat {
  using Block = BlockType;
  static constexpr int kBlock = 256, kMax = (1 << kBits) - 1;
  static constexpr bool kTakesImportance = true;

  static void decode(const Block& block, float* w) {
    int ls[8], lm[8];
    unpack_pairs(block.scales, ls, lm);
    const float d = f16_to_f32(block.d), dmin = f16_to_f32(block.dmin);
    // Sixteen bytes hold half of sub-block j in their low nibbles, and half of j + 1 in the high ones.
    for (int run = 0; run < 8; ++run) {
      const I bytes = load_bytes(block.qs + 16 * run);
      for (int c = 0; c < 2; ++c) {
        const int j = run / 2 * 2 + c;
        I code = bytes >> (4 * c) & 15;
        if constexpr (kBits == 5) code |= (load_bytes(block.qh + 16 * (run % 2)) >> j & 1) << 4;
        store_lanes(d * (float)ls[j] * to_float(code) - dmin * (float)lm[j], w + 32 * j + 16 * (run % 2));
      }
    }
  }

  struct Chosen {
    LaneInts codes[256], ls[8], lm[8];
    Halves d, dmin;
    LaneInts overflow() const { return d.overflow | dmin.overflow; }
    LaneFloats value(int i, LaneInts code) const {
      return d.value * to_float(ls[i / 32]) * to_float(code) - dmin.value * to_float(lm[i / 32]);
    }
  };
  static constexpr int kLastRank = kMax;

  static void choose(const LaneBlocks<256>& in, Chosen* out) {
    LaneFloats w[256], levels[256], scales[8], mins[8], d, dmin;
    LaneInts *const codes = out->codes, *const ls = out->ls, *const lm = out->lm;
    if (in.weighted) {
      importance_weights(in, block_mean_square(in.x, 2.0f), w);
    } else {
      for (int j = 0; j < 8; ++j) magnitude_weights(in.x + 32 * j, w + 32 * j);
    }
    using T = Twin<LaneFloats>;
    const Guesses guesses = in.weighted
                                ? kWeightedGuesses
                                : (kBits == 4 ? Guesses{-1.0f, 0.1f, 20, false} : Guesses{-0.5f, 0.1f, 15, false});
    for (int j = 0; j < 8; j += kSide<T>) {
      T offset;
      put<1>(scales, j, search_affine<T, 32>(in.x + 32 * j, w + 32 * j, kMax, guesses, levels + 32 * j, &offset));
      put<1>(mins, j, offset);
    }
    if (in.weighted) {
      LaneFloats sums[8];
      sub_block_sums<32>(w, sums);
      d = search_positive<8>(scales, sums, 63, ls);
      dmin = search_positive<8>(mins, sums, 63, lm);
    } else {
      d = integer_scales(scales, ls);
      dmin = integer_scales(mins, lm);
    }
    const Halves stored_d = to_f16(d), stored_dmin = to_f16(dmin);
    for (int j = 0; j < 8; ++j) {
      codes_for_stored_scale<32>(in.x + 32 * j, in.largest, stored_d.value * to_float(ls[j]),
                                 stored_dmin.value * to_float(lm[j]), 0, kMax, 0, levels + 32 * j, codes + 32 * j);
    }
    out->d = stored_d;
    out->dmin = stored_dmin;
  }

  static void store(const Chosen& chosen, Block* out) {
    const LaneInts *const codes = chosen.codes, *const ls = chosen.ls, *const lm = chosen.lm;
    store_pairs(ls, lm, out->scales, sizeof(Block));
    store_bytes<128>(out->qs, sizeof(Block), [&](int j) {
      const LaneInts* at = codes + 64 * (j / 32) + j % 32;
      return (at[0] & 15) | (at[32] & 15) << 4;
    });
    if constexpr (kBits == 5) store_bit_plane(codes, 4, out->qh, sizeof(Block));
    for (int l = 0; l < kWidth; ++l) {
      out[l].d = chosen.d.bits[l];
      out[l].dmin = chosen.dmin.bits[l];
    }
  }

 private:
  // Without importance: |x| plus the sub-block's root mean square.
  static void magnitude_weights(const LaneFloats* x, LaneFloats* w) {
    LaneFloats sum = splat<LaneFloats>(0.0f);
    for (int i = 0; i < 32; ++i) sum += x[i] * x[i];
    const LaneFloats rms = sqrt(sum / 32.0f);
    for (int i = 0; i < 32; ++i) w[i] = rms + abs(x[i]);
  }

  // Nonnegative scales as integers 0 .. 63, each times the returned number.
  static LaneFloats integer_scales(const LaneFloats* scales, LaneInts* integers) {
    LaneFloats largest = splat<LaneFloats>(0.0f);
    for (int j = 0; j < 8; ++j) largest = max(scales[j], largest);
    const LaneFloats inverse = select(largest > 0.0f, 63.0f / largest, 0.0f);
    for (int j = 0; j < 8; ++j) {
      const LaneInts byte = nearest_int(inverse * scales[j]) & 255;  // ggml stores it in an unsigned byte
      integers[j] = select(byte > 63, 63, byte);
    }
    return largest / 63.0f;
  }
};
struct Q4K : Pairs256<4, BlockQ4K> {};
struct Q5K : Pairs256<5, BlockQ5K> {};

}  // namespace isqtorch::ISQ_ISA
