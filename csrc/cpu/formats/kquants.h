// ggml's 256-weight formats q2k q3k q4k q5k q6k q8k: a block is cut into sub-blocks of 16 or 32 with small integer
// scales of their own, which one or two f16 numbers scale in turn.
#pragma once

#include "cpu/formats/ggml.h"

namespace isqtorch::ISQ_ISA {

// ---- what the formats share ---------------------------------------------------------------------------------------

// sum of x^2 over the block, in index order, times factor / 256
ISQ_INLINE F block_mean_square(const F* x, float factor) {
  F sum = splat(0.0f);
  for (int i = 0; i < 256; ++i) sum += x[i] * x[i];
  return factor * sum / 256.0f;
}

// The searches chose levels for exact scales. Choose them again for the scale d and offset m that were stored; where
// the stored scale is 0 the search's levels stay.
template <int kCount>
ISQ_INLINE void levels_for_stored_scale(const F* x, F d, F m, int low, int high, int shift, I* levels) {
  const I keep = d == 0.0f;
  for (int i = 0; i < kCount; ++i) {
    levels[i] = select(keep, levels[i], clamp(nearest_int((x[i] + m) / d), low, high) + shift);
  }
}

// 2-bit codes, four to a byte, as q2k and q3k share them.
ISQ_INLINE void store_crumbs(const I* levels, int lane, uint8_t* qs) {
  for (int h = 0; h < 2; ++h) {
    for (int l = 0; l < 32; ++l) {
      const I* at = levels + 128 * h + l;
      qs[32 * h + l] =
          (uint8_t)((at[0][lane] & 3) | (at[32][lane] & 3) << 2 | (at[64][lane] & 3) << 4 | (at[96][lane] & 3) << 6);
    }
  }
}

// One bit of every code: bit e / 32 of byte e % 32.
ISQ_INLINE void store_bit_plane(const I* levels, int lane, int bit, uint8_t* plane) {
  for (int l = 0; l < 32; ++l) {
    int byte = 0;
    for (int c = 0; c < 8; ++c) byte |= (levels[32 * c + l][lane] >> bit & 1) << c;
    plane[l] = (uint8_t)byte;
  }
}

// ---- q2k: w = d * sc * code - dmin * mn, sub-blocks of 16 ---------------------------------------------------------

struct Q2K : BlockwiseFormat {
  using Block = BlockQ2K;
  static constexpr const char* kName = "q2k";
  static constexpr int kBlock = 256;
  static constexpr bool kTakesImportance = true;

  static void decode(const Block& block, float* w) {
    const float d = f16_to_f32(block.d), dmin = f16_to_f32(block.dmin);
    float scale[16], offset[16];
    for (int j = 0; j < 16; ++j) {
      scale[j] = d * (float)(block.scales[j] & 15);
      offset[j] = dmin * (float)(block.scales[j] >> 4);
    }
    for (int run = 0; run < 4; ++run) {  // sixteen bytes: codes of the sub-blocks j, j + 2, j + 4, j + 6
      const I bytes = load_bytes(block.qs + 16 * run);
      for (int c = 0; c < 4; ++c) {
        const int j = run / 2 * 8 + run % 2 + 2 * c;
        store_lanes(scale[j] * to_float(bytes >> (2 * c) & 3) - offset[j], w + 16 * j);
      }
    }
  }

  static I quantize(const LaneBlocks<256>& in, Block* out) {
    I levels[256], sc[16], mn[16];
    F scales[16], mins[16], sums[16], w[256], d, dmin;
    if (in.weighted) {
      importance_weights(in, block_mean_square(in.x, 1.0f), w);
    } else {
      for (int i = 0; i < 256; ++i) w[i] = abs(in.x[i]);
    }
    const Guesses guesses = in.weighted ? kWeightedGuesses : Guesses{-0.5f, 0.1f, 15, true};
    for (int j = 0; j < 16; ++j) {
      scales[j] = search_affine<16>(in.x + 16 * j, w + 16 * j, 3, guesses, levels + 16 * j, &mins[j]);
    }
    if (in.weighted) {
      for (int j = 0; j < 16; ++j) {
        sums[j] = splat(0.0f);
        for (int i = 0; i < 16; ++i) sums[j] += w[16 * j + i];
      }
      d = search_positive<16>(scales, sums, 15, sc);
      dmin = search_positive<16>(mins, sums, 15, mn);
    } else {
      d = integer_scales(scales, sc);
      dmin = integer_scales(mins, mn);
    }
    const Halves stored_d = to_f16(d), stored_dmin = to_f16(dmin);
    for (int j = 0; j < 16; ++j) {
      levels_for_stored_scale<16>(in.x + 16 * j, stored_d.value * to_float(sc[j]), stored_dmin.value * to_float(mn[j]),
                                  0, 3, 0, levels + 16 * j);
    }
    for (int l = 0; l < kLanes; ++l) {
      for (int j = 0; j < 16; ++j) out[l].scales[j] = (uint8_t)((sc[j][l] & 15) | (mn[j][l] & 15) << 4);
      store_crumbs(levels, l, out[l].qs);
      out[l].d = stored_d.bits[l];
      out[l].dmin = stored_dmin.bits[l];
    }
    return stored_d.overflow | stored_dmin.overflow;
  }

 private:
  // Nonnegative scales as integers 0 .. 15 times the value returned.
  static F integer_scales(const F* scales, I* integers) {
    F largest = splat(0.0f);
    for (int j = 0; j < 16; ++j) largest = max(scales[j], largest);
    const I zero = ~(largest > 0.0f);
    const F inverse = 15.0f / largest;
    for (int j = 0; j < 16; ++j) integers[j] = select(zero, splat(0), nearest_int(inverse * scales[j]));
    return select(zero, splat(0.0f), largest / 15.0f);
  }
};

// ---- q3k: w = d * (t - 32) * (code - 4), sub-blocks of 16 ---------------------------------------------------------

struct Q3K : BlockwiseFormat {
  using Block = BlockQ3K;
  static constexpr const char* kName = "q3k";
  static constexpr int kBlock = 256;
  static constexpr bool kTakesImportance = true;

  // t[j], 6 bits: the low four in the nibbles of bytes 0-7, the high two in bits 2 (j / 4) of bytes 8-11.
  static void unpack_scales(const uint8_t* packed, int* t) {
    for (int j = 0; j < 16; ++j) {
      const int low = j < 8 ? packed[j] & 15 : packed[j - 8] >> 4;
      t[j] = low | (packed[8 + j % 4] >> (2 * (j / 4)) & 3) << 4;
    }
  }

  static void decode(const Block& block, float* w) {
    int t[16];
    unpack_scales(block.scales, t);
    const float d = f16_to_f32(block.d);
    for (int run = 0; run < 4; ++run) {
      const I bytes = load_bytes(block.qs + 16 * run), mask = load_bytes(block.hmask + 16 * (run % 2));
      for (int c = 0; c < 4; ++c) {
        const int j = run / 2 * 8 + run % 2 + 2 * c;
        const I code = (bytes >> (2 * c) & 3) | (mask >> (j / 2) & 1) << 2;
        store_lanes(d * (float)(t[j] - 32) * to_float(code - 4), w + 16 * j);
      }
    }
  }

  static I quantize(const LaneBlocks<256>& in, Block* out) {
    I levels[256], t[16];
    F scales[16], d;
    if (in.weighted) {
      F w[256], sums[16];
      importance_weights(in, block_mean_square(in.x, 2.0f), w);
      for (int j = 0; j < 16; ++j) {
        sums[j] = splat(0.0f);
        for (int i = 0; i < 16; ++i) sums[j] += w[16 * j + i];
        scales[j] = search_symmetric<16>(in.x + 16 * j, w + 16 * j, 4, levels + 16 * j);
      }
      d = search_symmetric<16>(scales, sums, 32, t);
    } else {
      for (int j = 0; j < 16; ++j) scales[j] = descend_symmetric<16>(in.x + 16 * j, 4, levels + 16 * j);
      const F extreme = first_extreme(scales, 16);
      const I zero = extreme == 0.0f;
      const F inverse = -32.0f / extreme;
      for (int j = 0; j < 16; ++j) {
        const I byte = nearest_int(inverse * scales[j]) << 24 >> 24;  // the model keeps it in a signed byte
        t[j] = select(zero, splat(0), clamp(byte, -32, 31) + 32);
      }
      d = select(zero, splat(0.0f), 1.0f / inverse);
    }
    const Halves stored = to_f16(d);
    for (int j = 0; j < 16; ++j) {
      levels_for_stored_scale<16>(in.x + 16 * j, stored.value * to_float(t[j] - 32), splat(0.0f), -4, 3, 4,
                                  levels + 16 * j);
    }
    for (int l = 0; l < kLanes; ++l) {
      std::memset(out[l].scales, 0, sizeof out[l].scales);
      for (int j = 0; j < 16; ++j) {
        const int v = t[j][l];
        out[l].scales[j % 8] |= (uint8_t)((v & 15) << (j < 8 ? 0 : 4));
        out[l].scales[8 + j % 4] |= (uint8_t)((v >> 4 & 3) << (2 * (j / 4)));
      }
      store_crumbs(levels, l, out[l].qs);
      store_bit_plane(levels, l, 2, out[l].hmask);
      out[l].d = stored.bits[l];
    }
    return stored.overflow;
  }
};

// ---- q4k, q5k: w = d * ls * code - dmin * lm, sub-blocks of 32 ----------------------------------------------------

// Eight pairs of 6-bit numbers in 12 bytes: pairs 0-3 lie in the low six bits of bytes 0-3 and 4-7; pairs 4-7 have
// their low four bits in bytes 8-11 (scale low nibble, min high nibble) and the other two on top of bytes 0-3 and 4-7.
ISQ_INLINE void unpack_pairs(const uint8_t* packed, int* scales, int* mins) {
  for (int j = 0; j < 4; ++j) {
    scales[j] = packed[j] & 63;
    mins[j] = packed[4 + j] & 63;
    scales[4 + j] = (packed[8 + j] & 15) | packed[j] >> 6 << 4;
    mins[4 + j] = packed[8 + j] >> 4 | packed[4 + j] >> 6 << 4;
  }
}
ISQ_INLINE void pack_pairs(const I* scales, const I* mins, int lane, uint8_t* packed) {
  for (int j = 0; j < 4; ++j) {
    const int high_scale = scales[4 + j][lane], high_min = mins[4 + j][lane];
    packed[j] = (uint8_t)(scales[j][lane] | high_scale >> 4 << 6);
    packed[4 + j] = (uint8_t)(mins[j][lane] | high_min >> 4 << 6);
    packed[8 + j] = (uint8_t)((high_scale & 15) | (high_min & 15) << 4);
  }
}

template <int kBits, class BlockType>
struct Pairs256 : BlockwiseFormat {
  using Block = BlockType;
  static constexpr const char* kName = kBits == 4 ? "q4k" : "q5k";
  static constexpr int kBlock = 256, kMax = (1 << kBits) - 1;
  static constexpr bool kTakesImportance = true;

  static void decode(const Block& block, float* w) {
    int ls[8], lm[8];
    unpack_pairs(block.scales, ls, lm);
    const float d = f16_to_f32(block.d), dmin = f16_to_f32(block.dmin);
    for (int run = 0; run < 8;
         ++run) {  // sixteen bytes: half of sub-block j in the low nibbles, half of j + 1 in the high ones
      const I bytes = load_bytes(block.qs + 16 * run);
      for (int c = 0; c < 2; ++c) {
        const int j = run / 2 * 2 + c;
        I code = bytes >> (4 * c) & 15;
        if constexpr (kBits == 5) code |= (load_bytes(block.qh + 16 * (run % 2)) >> j & 1) << 4;
        store_lanes(d * (float)ls[j] * to_float(code) - dmin * (float)lm[j], w + 32 * j + 16 * (run % 2));
      }
    }
  }

  static I quantize(const LaneBlocks<256>& in, Block* out) {
    I levels[256], ls[8], lm[8];
    F scales[8], mins[8], sums[8], w[256], d, dmin;
    if (in.weighted) {
      importance_weights(in, block_mean_square(in.x, 2.0f), w);
    } else {
      for (int j = 0; j < 8; ++j) magnitude_weights(in.x + 32 * j, w + 32 * j);
    }
    const Guesses guesses = in.weighted
                                ? kWeightedGuesses
                                : (kBits == 4 ? Guesses{-1.0f, 0.1f, 20, false} : Guesses{-0.5f, 0.1f, 15, false});
    for (int j = 0; j < 8; ++j) {
      scales[j] = search_affine<32>(in.x + 32 * j, w + 32 * j, kMax, guesses, levels + 32 * j, &mins[j]);
    }
    if (in.weighted) {
      for (int j = 0; j < 8; ++j) {
        sums[j] = splat(0.0f);
        for (int i = 0; i < 32; ++i) sums[j] += w[32 * j + i];
      }
      d = search_positive<8>(scales, sums, 63, ls);
      dmin = search_positive<8>(mins, sums, 63, lm);
    } else {
      d = integer_scales(scales, ls);
      dmin = integer_scales(mins, lm);
    }
    const Halves stored_d = to_f16(d), stored_dmin = to_f16(dmin);
    for (int j = 0; j < 8; ++j) {
      levels_for_stored_scale<32>(in.x + 32 * j, stored_d.value * to_float(ls[j]), stored_dmin.value * to_float(lm[j]),
                                  0, kMax, 0, levels + 32 * j);
    }
    for (int l = 0; l < kLanes; ++l) {
      pack_pairs(ls, lm, l, out[l].scales);
      for (int c = 0; c < 4; ++c) {
        for (int i = 0; i < 32; ++i) {
          out[l].qs[32 * c + i] = (uint8_t)((levels[64 * c + i][l] & 15) | (levels[64 * c + 32 + i][l] & 15) << 4);
        }
      }
      if constexpr (kBits == 5) store_bit_plane(levels, l, 4, out[l].qh);
      out[l].d = stored_d.bits[l];
      out[l].dmin = stored_dmin.bits[l];
    }
    return stored_d.overflow | stored_dmin.overflow;
  }

 private:
  // Without importance: |x| plus the sub-block's root mean square.
  static void magnitude_weights(const F* x, F* w) {
    F sum = splat(0.0f);
    for (int i = 0; i < 32; ++i) sum += x[i] * x[i];
    const F rms = sqrt(sum / 32.0f);
    for (int i = 0; i < 32; ++i) w[i] = rms + abs(x[i]);
  }

  // Nonnegative scales as integers 0 .. 63 times the value returned.
  static F integer_scales(const F* scales, I* integers) {
    F largest = splat(0.0f);
    for (int j = 0; j < 8; ++j) largest = max(scales[j], largest);
    const F inverse = select(largest > 0.0f, 63.0f / largest, splat(0.0f));
    for (int j = 0; j < 8; ++j) {
      const I byte = nearest_int(inverse * scales[j]) & 255;  // the model keeps it in an unsigned byte
      integers[j] = select(byte > 63, splat(63), byte);
    }
    return largest / 63.0f;
  }
};
using Q4K = Pairs256<4, BlockQ4K>;
using Q5K = Pairs256<5, BlockQ5K>;

// ---- q6k: w = d * sc * (code - 32), sub-blocks of 16 --------------------------------------------------------------

struct Q6K : BlockwiseFormat {
  using Block = BlockQ6K;
  static constexpr const char* kName = "q6k";
  static constexpr int kBlock = 256;
  static constexpr bool kTakesImportance = true;

  static void decode(const Block& block, float* w) {
    const float d = f16_to_f32(block.d);
    for (int run = 0; run < 4; ++run) {  // of 32 weights in each of the four quarters of a half
      const int half = run / 2, first = 16 * (run % 2);
      const I high = load_bytes(block.qh + 32 * half + first);
      for (int quarter = 0; quarter < 4; ++quarter) {
        const int j = 8 * half + 2 * quarter + run % 2;
        const I low = load_bytes(block.ql + 64 * half + 32 * (quarter % 2) + first) >> (4 * (quarter / 2)) & 15;
        const I code = low | (high >> (2 * quarter) & 3) << 4;
        store_lanes(d * (float)block.scales[j] * to_float(code - 32), w + 16 * j);
      }
    }
  }

  static I quantize(const LaneBlocks<256>& in, Block* out) {
    I levels[256], sc[16];
    F scales[16];
    for (int j = 0; j < 16; ++j) {
      const F* w = in.weighted ? in.importance + 16 * j : nullptr;
      scales[j] = search_symmetric<16>(in.x + 16 * j, w, 32, levels + 16 * j);
    }
    const F extreme = first_extreme(scales, 16);
    const I zero = abs(extreme) < kTiny;
    const F inverse = -128.0f / extreme;
    const Halves stored = to_f16(select(zero, splat(0.0f), 1.0f / inverse));
    for (int j = 0; j < 16; ++j) {
      const I integer = nearest_int(inverse * scales[j]);
      sc[j] = select(zero, splat(0), select(integer > 127, splat(127), integer) << 24 >> 24);
      levels_for_stored_scale<16>(in.x + 16 * j, stored.value * to_float(sc[j]), splat(0.0f), -32, 31, 32,
                                  levels + 16 * j);
    }
    for (int l = 0; l < kLanes; ++l) {
      if (zero[l]) {  // all bytes zero, codes included
        std::memset(&out[l], 0, sizeof out[l]);
        continue;
      }
      for (int h = 0; h < 2; ++h) {
        for (int i = 0; i < 32; ++i) {
          const I* at = levels + 128 * h + i;
          const int v[4] = {at[0][l], at[32][l], at[64][l], at[96][l]};
          out[l].ql[64 * h + i] = (uint8_t)((v[0] & 15) | (v[2] & 15) << 4);
          out[l].ql[64 * h + 32 + i] = (uint8_t)((v[1] & 15) | (v[3] & 15) << 4);
          out[l].qh[32 * h + i] = (uint8_t)(v[0] >> 4 | v[1] >> 4 << 2 | v[2] >> 4 << 4 | v[3] >> 4 << 6);
        }
      }
      for (int j = 0; j < 16; ++j) out[l].scales[j] = (int8_t)sc[j][l];
      out[l].d = stored.bits[l];
    }
    return stored.overflow;
  }
};

// ---- q8k: w = d * code, f32 scale ---------------------------------------------------------------------------------

struct Q8K : BlockwiseFormat {
  using Block = BlockQ8K;
  static constexpr const char* kName = "q8k";
  static constexpr int kBlock = 256;
  static constexpr bool kTakesImportance = false, kF16Scales = false;

  static void decode(const Block& block, float* w) {
    const float d = block.d;
    for (int i = 0; i < 256; ++i) w[i] = d * (float)block.qs[i];
  }

  static I quantize(const LaneBlocks<256>& in, Block* out) {
    const F extreme = first_extreme(in.x, 256);
    const F inverse = -127.0f / extreme;
    const I zero = ~(abs(inverse) <= FLT_MAX);  // nothing but zeros, or nearly
    const F d = select(zero, splat(0.0f), 1.0f / inverse);
    for (int j = 0; j < 16; ++j) {
      I sum = splat(0);
      for (int i = 16 * j; i < 16 * j + 16; ++i) {
        const I code = select(zero, splat(0), clamp(nearest_int(inverse * in.x[i]), -128, 127));
        sum += code;
        for (int l = 0; l < kLanes; ++l) out[l].qs[i] = (int8_t)code[l];
      }
      for (int l = 0; l < kLanes; ++l) out[l].bsums[j] = (int16_t)sum[l];
    }
    for (int l = 0; l < kLanes; ++l) out[l].d = d[l];
    return splat(0);
  }
};

}  // namespace isqtorch::ISQ_ISA
