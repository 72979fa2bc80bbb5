// ggml's 256-weight formats q2k q3k q4k q5k q6k q8k: a block is cut into sub-blocks of 16 or 32 with small integer
// scales of their own, which one or two f16 numbers scale in turn.
#pragma once

#include "cpu/formats/ggml.h"

namespace isqtorch::ISQ_ISA {

// ---- what the formats share ---------------------------------------------------------------------------------------

// How many sub-blocks a search takes side by side when it works on vectors T.
template <class T>
constexpr int kSide = sizeof(T) / sizeof(Floats);

// sum of x^2 over the block, in index order, times factor / 256
ISQ_INLINE Floats block_mean_square(const Floats* x, float factor) {
  Floats sum = splat<Floats>(0.0f);
  for (int i = 0; i < 256; ++i) sum += x[i] * x[i];
  return factor * sum / 256.0f;
}

// The sum of each sub-block's weights.
template <int kCount>
ISQ_INLINE void sub_block_sums(const Floats* w, Floats* sums) {
  for (int j = 0; j < 256 / kCount; ++j) {
    sums[j] = splat<Floats>(0.0f);
    for (int i = 0; i < kCount; ++i) sums[j] += w[kCount * j + i];
  }
}

// The searches chose levels for exact scales. Choose them again for the scale d and offset m that were stored; where
// the stored scale is 0 the search's levels stay. No |x| exceeds `largest`.
//
// The formula divides, which takes longer than all the rest. Multiplying by 1 / d gives nearly the same quotient: in
// or near the range of codes the two differ by less than 1e-5, so they round alike unless that one lies next to the
// middle between two integers. Then, and where a quotient might be so large that nearest_int wraps around, divide.
template <int kCount>
ISQ_INLINE void codes_for_stored_scale(const Floats* x, Floats largest, Floats d, Floats m, int low, int high,
                                       int shift, const Floats* levels, Ints* codes) {
  const Ints keep = d == 0.0f;
  const Floats inverse = select(keep, 0.0f, 1.0f / d);
  Ints sure = (largest + abs(m)) * abs(inverse) < 0x1p20f;
  for (int i = 0; i < kCount; ++i) {
    const Floats quotient = (x[i] + m) * inverse, nearest = nearest_small(quotient);
    sure &= abs(quotient - nearest) < 0.49998f;
    codes[i] = truncate(select(keep, levels[i], clamp(nearest, (float)low, (float)high) + (float)shift));
  }
  if (!any(~sure)) return;
  for (int i = 0; i < kCount; ++i) {
    codes[i] = select(keep, truncate(levels[i]), clamp(nearest_int((x[i] + m) / d), low, high) + shift);
  }
}

// 2-bit codes, four to a byte, as q2k and q3k share them.
template <class Block>
ISQ_INLINE void store_crumbs(const Ints* codes, Block* out) {
  store_bytes<64>(out->qs, sizeof(Block), [&](int j) {
    const Ints* at = codes + 128 * (j / 32) + j % 32;
    return (at[0] & 3) | (at[32] & 3) << 2 | (at[64] & 3) << 4 | (at[96] & 3) << 6;
  });
}

// One bit of every code: bit e / 32 of byte e % 32.
ISQ_INLINE void store_bit_plane(const Ints* codes, int bit, void* plane, int stride) {
  store_bytes<32>(plane, stride, [&](int j) {
    Ints byte = splat<Ints>(0);
    for (int c = 0; c < 8; ++c) byte |= (codes[32 * c + j] >> bit & 1) << c;
    return byte;
  });
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

  static Ints quantize(const LaneBlocks<256>& in, Block* out) {
    Floats w[256], levels[256], scales[16], mins[16], d, dmin;
    Ints codes[256], sc[16], mn[16];
    if (in.weighted) {
      importance_weights(in, block_mean_square(in.x, 1.0f), w);
    } else {
      for (int i = 0; i < 256; ++i) w[i] = abs(in.x[i]);
    }
    using T = Twin<Floats>;
    const Guesses guesses = in.weighted ? kWeightedGuesses : Guesses{-0.5f, 0.1f, 15, true};
    for (int j = 0; j < 16; j += kSide<T>) {
      T offset;
      put<1>(scales, j, search_affine<T, 16>(in.x + 16 * j, w + 16 * j, 3, guesses, levels + 16 * j, &offset));
      put<1>(mins, j, offset);
    }
    if (in.weighted) {
      Floats sums[16];
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
    store_bytes<16>(out->scales, sizeof(Block), [&](int j) { return (sc[j] & 15) | (mn[j] & 15) << 4; });
    store_crumbs(codes, out);
    for (int l = 0; l < kWidth; ++l) {
      out[l].d = stored_d.bits[l];
      out[l].dmin = stored_dmin.bits[l];
    }
    return stored_d.overflow | stored_dmin.overflow;
  }

 private:
  // Nonnegative scales as integers 0 .. 15 times the value returned.
  static Floats integer_scales(const Floats* scales, Ints* integers) {
    Floats largest = splat<Floats>(0.0f);
    for (int j = 0; j < 16; ++j) largest = max(scales[j], largest);
    const Ints zero = ~(largest > 0.0f);
    const Floats inverse = 15.0f / largest;
    for (int j = 0; j < 16; ++j) integers[j] = select(zero, 0, nearest_int(inverse * scales[j]));
    return select(zero, 0.0f, largest / 15.0f);
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

  static Ints quantize(const LaneBlocks<256>& in, Block* out) {
    Floats levels[256], scales[16], d;
    Ints codes[256], t[16];
    using T = Twin<Floats>;
    if (in.weighted) {
      Floats w[256], sums[16], integers[16];
      importance_weights(in, block_mean_square(in.x, 2.0f), w);
      sub_block_sums<16>(w, sums);
      for (int j = 0; j < 16; j += kSide<T>) {
        put<1>(scales, j, search_symmetric<T, 16>(in.x + 16 * j, w + 16 * j, 4, levels + 16 * j));
      }
      d = search_symmetric<Floats, 16>(scales, sums, 32, integers);
      for (int j = 0; j < 16; ++j) t[j] = truncate(integers[j]);
    } else {
      descend_symmetric<16, 16>(in.x, 4, levels, scales);
      const Floats extreme = first_extreme(scales, 16);
      const Ints zero = extreme == 0.0f;
      const Floats inverse = -32.0f / extreme;
      for (int j = 0; j < 16; ++j) {
        const Ints byte = nearest_int(inverse * scales[j]) << 24 >> 24;  // the model keeps it in a signed byte
        t[j] = select(zero, 0, clamp(byte, -32, 31) + 32);
      }
      d = select(zero, 0.0f, 1.0f / inverse);
    }
    const Halves stored = to_f16(d);
    for (int j = 0; j < 16; ++j) {
      codes_for_stored_scale<16>(in.x + 16 * j, in.largest, stored.value * to_float(t[j] - 32), splat<Floats>(0.0f), -4,
                                 3, 4, levels + 16 * j, codes + 16 * j);
    }
    store_bytes<12>(out->scales, sizeof(Block), [&](int j) {
      if (j < 8) return (t[j] & 15) | (t[8 + j] & 15) << 4;
      return t[j - 8] >> 4 | t[j - 4] >> 4 << 2 | t[j] >> 4 << 4 | t[j + 4] >> 4 << 6;
    });
    store_crumbs(codes, out);
    store_bit_plane(codes, 2, out->hmask, sizeof(Block));
    for (int l = 0; l < kWidth; ++l) out[l].d = stored.bits[l];
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
ISQ_INLINE void store_pairs(const Ints* scales, const Ints* mins, void* packed, int stride) {
  store_bytes<12>(packed, stride, [&](int j) {
    if (j < 4) return scales[j] | scales[4 + j] >> 4 << 6;
    if (j < 8) return mins[j - 4] | mins[j] >> 4 << 6;
    return (scales[j - 4] & 15) | (mins[j - 4] & 15) << 4;
  });
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

  static Ints quantize(const LaneBlocks<256>& in, Block* out) {
    Floats w[256], levels[256], scales[8], mins[8], d, dmin;
    Ints codes[256], ls[8], lm[8];
    if (in.weighted) {
      importance_weights(in, block_mean_square(in.x, 2.0f), w);
    } else {
      for (int j = 0; j < 8; ++j) magnitude_weights(in.x + 32 * j, w + 32 * j);
    }
    using T = Twin<Floats>;
    const Guesses guesses = in.weighted
                                ? kWeightedGuesses
                                : (kBits == 4 ? Guesses{-1.0f, 0.1f, 20, false} : Guesses{-0.5f, 0.1f, 15, false});
    for (int j = 0; j < 8; j += kSide<T>) {
      T offset;
      put<1>(scales, j, search_affine<T, 32>(in.x + 32 * j, w + 32 * j, kMax, guesses, levels + 32 * j, &offset));
      put<1>(mins, j, offset);
    }
    if (in.weighted) {
      Floats sums[8];
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
    store_pairs(ls, lm, out->scales, sizeof(Block));
    store_bytes<128>(out->qs, sizeof(Block), [&](int j) {
      const Ints* at = codes + 64 * (j / 32) + j % 32;
      return (at[0] & 15) | (at[32] & 15) << 4;
    });
    if constexpr (kBits == 5) store_bit_plane(codes, 4, out->qh, sizeof(Block));
    for (int l = 0; l < kWidth; ++l) {
      out[l].d = stored_d.bits[l];
      out[l].dmin = stored_dmin.bits[l];
    }
    return stored_d.overflow | stored_dmin.overflow;
  }

 private:
  // Without importance: |x| plus the sub-block's root mean square.
  static void magnitude_weights(const Floats* x, Floats* w) {
    Floats sum = splat<Floats>(0.0f);
    for (int i = 0; i < 32; ++i) sum += x[i] * x[i];
    const Floats rms = sqrt(sum / 32.0f);
    for (int i = 0; i < 32; ++i) w[i] = rms + abs(x[i]);
  }

  // Nonnegative scales as integers 0 .. 63 times the value returned.
  static Floats integer_scales(const Floats* scales, Ints* integers) {
    Floats largest = splat<Floats>(0.0f);
    for (int j = 0; j < 8; ++j) largest = max(scales[j], largest);
    const Floats inverse = select(largest > 0.0f, 63.0f / largest, 0.0f);
    for (int j = 0; j < 8; ++j) {
      const Ints byte = nearest_int(inverse * scales[j]) & 255;  // the model keeps it in an unsigned byte
      integers[j] = select(byte > 63, 63, byte);
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

  static Ints quantize(const LaneBlocks<256>& in, Block* out) {
    Floats levels[256], scales[16];
    Ints codes[256], sc[16];
    using T = Twin<Floats>;
    for (int j = 0; j < 16; j += kSide<T>) {
      const Floats* w = in.weighted ? in.importance + 16 * j : nullptr;
      put<1>(scales, j, search_symmetric<T, 16>(in.x + 16 * j, w, 32, levels + 16 * j));
    }
    const Floats extreme = first_extreme(scales, 16);
    const Ints zero = abs(extreme) < kTiny;
    const Floats inverse = -128.0f / extreme;
    const Halves stored = to_f16(select(zero, 0.0f, 1.0f / inverse));
    for (int j = 0; j < 16; ++j) {
      const Ints integer = nearest_int(inverse * scales[j]);
      sc[j] = select(zero, 0, select(integer > 127, 127, integer) << 24 >> 24);
      codes_for_stored_scale<16>(in.x + 16 * j, in.largest, stored.value * to_float(sc[j]), splat<Floats>(0.0f), -32,
                                 31, 32, levels + 16 * j, codes + 16 * j);
    }
    for (int i = 0; i < 256; ++i) codes[i] = select(zero, 0, codes[i]);  // all bytes of such a block are zero
    store_bytes<128>(out->ql, sizeof(Block), [&](int j) {
      const Ints* at = codes + 128 * (j / 64) + j % 64;
      return (at[0] & 15) | (at[64] & 15) << 4;
    });
    store_bytes<64>(out->qh, sizeof(Block), [&](int j) {
      const Ints* at = codes + 128 * (j / 32) + j % 32;
      return at[0] >> 4 | at[32] >> 4 << 2 | at[64] >> 4 << 4 | at[96] >> 4 << 6;
    });
    store_bytes<16>(out->scales, sizeof(Block), [&](int j) { return sc[j] & 255; });
    for (int l = 0; l < kWidth; ++l) out[l].d = stored.bits[l];
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

  static Ints quantize(const LaneBlocks<256>& in, Block* out) {
    const Floats extreme = first_extreme(in.x, 256);
    const Floats inverse = -127.0f / extreme;
    const Ints zero = ~(abs(inverse) <= FLT_MAX);  // nothing but zeros, or nearly
    const Floats d = select(zero, 0.0f, 1.0f / inverse);
    Ints codes[256];
    for (int j = 0; j < 16; ++j) {
      Ints sum = splat<Ints>(0);
      for (int i = 16 * j; i < 16 * j + 16; ++i) {
        codes[i] = select(zero, 0, clamp(nearest_int(inverse * in.x[i]), -128, 127));
        sum += codes[i];
      }
      for (int l = 0; l < kWidth; ++l) out[l].bsums[j] = (int16_t)sum[l];
    }
    store_bytes<256>(out->qs, sizeof(Block), [&](int i) { return codes[i] & 255; });
    for (int l = 0; l < kWidth; ++l) out[l].d = d[l];
    return splat<Ints>(0);
  }
};

}  // namespace isqtorch::ISQ_ISA
