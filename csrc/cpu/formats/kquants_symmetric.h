// q3k q6k q8k: every sub-block, or the whole block, has a scale. There is no offset, so zero stays zero.
#pragma once

#include "cpu/formats/kquants_common.h"
#include "cpu/quantize/descend.h"

namespace isqtorch::ISQ_ISA {

// ---- q3k: w = d * (t - 32) * (code - 4), sub-blocks of 16 ---------------------------------------------------------

struct Q3K : BlockwiseFormat {
  using Block = BlockQ3K;
  static constexpr int kBlock = 256;
  static constexpr bool kTakesImportance = true;

  // t[j] has 6 bits: the low four in a nibble of bytes 0-7, the high two in bits 2 (j / 4) and up of byte 8 + j % 4.
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

  struct Chosen {
    LaneInts codes[256], t[16];
    Halves d;
    LaneInts overflow() const { return d.overflow; }
    LaneFloats value(int i, LaneInts code) const { return d.value * to_float(t[i / 16] - 32) * to_float(code - 4); }
  };
  static constexpr int kLastRank = 7;

  static void choose(const LaneBlocks<256>& in, Chosen* out) {
    LaneFloats levels[256], scales[16], d;
    LaneInts *const codes = out->codes, *const t = out->t;
    using T = Twin<LaneFloats>;
    if (in.weighted) {
      LaneFloats w[256], sums[16], integers[16];
      importance_weights(in, block_mean_square(in.x, 2.0f), w);
      sub_block_sums<16>(w, sums);
      for (int j = 0; j < 16; j += kSide<T>) {
        put<1>(scales, j, search_symmetric<T, 16>(in.x + 16 * j, w + 16 * j, 4, levels + 16 * j));
      }
      d = search_symmetric<LaneFloats, 16>(scales, sums, 32, integers);
      for (int j = 0; j < 16; ++j) t[j] = truncate(integers[j]);
    } else {
      descend_symmetric<16, 16>(in.x, 4, levels, scales);
      const LaneFloats extreme = first_extreme(scales, 16);
      const LaneInts zero = extreme == 0.0f;
      const LaneFloats inverse = -32.0f / extreme;
      for (int j = 0; j < 16; ++j) {
        const LaneInts byte = nearest_int(inverse * scales[j]) << 24 >> 24;  // ggml stores it in a signed byte
        t[j] = select(zero, 0, clamp(byte, -32, 31) + 32);
      }
      d = select(zero, 0.0f, 1.0f / inverse);
    }
    const Halves stored = to_f16(d);
    for (int j = 0; j < 16; ++j) {
      codes_for_stored_scale<16>(in.x + 16 * j, in.largest, stored.value * to_float(t[j] - 32), splat<LaneFloats>(0.0f),
                                 -4, 3, 4, levels + 16 * j, codes + 16 * j);
    }
    out->d = stored;
  }

  static void store(const Chosen& chosen, Block* out) {
    const LaneInts* const t = chosen.t;
    store_bytes<12>(out->scales, sizeof(Block), [&](int j) {
      if (j < 8) return (t[j] & 15) | (t[8 + j] & 15) << 4;
      return t[j - 8] >> 4 | t[j - 4] >> 4 << 2 | t[j] >> 4 << 4 | t[j + 4] >> 4 << 6;
    });
    store_crumbs(chosen.codes, out);
    store_bit_plane(chosen.codes, 2, out->hmask, sizeof(Block));
    for (int l = 0; l < kWidth; ++l) out[l].d = chosen.d.bits[l];
  }
};

// ---- q6k: w = d * sc * (code - 32), sub-blocks of 16 --------------------------------------------------------------

struct Q6K : BlockwiseFormat {
  using Block = BlockQ6K;
  static constexpr int kBlock = 256;
  static constexpr bool kTakesImportance = true;

  static void decode(const Block& block, float* w) {
    const float d = f16_to_f32(block.d);
    for (int run = 0; run < 4; ++run) {  // sixteen weights of each quarter of a half block
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

  struct Chosen {
    LaneInts codes[256], sc[16];
    Halves d;
    LaneInts overflow() const { return d.overflow; }
    LaneFloats value(int i, LaneInts code) const { return d.value * to_float(sc[i / 16]) * to_float(code - 32); }
  };
  static constexpr int kLastRank = 63;

  static void choose(const LaneBlocks<256>& in, Chosen* out) {
    LaneFloats levels[256], scales[16];
    LaneInts *const codes = out->codes, *const sc = out->sc;
    using T = Twin<LaneFloats>;
    for (int j = 0; j < 16; j += kSide<T>) {
      const LaneFloats* w = in.weighted ? in.importance + 16 * j : nullptr;
      put<1>(scales, j, search_symmetric<T, 16>(in.x + 16 * j, w, 32, levels + 16 * j));
    }
    const LaneFloats extreme = first_extreme(scales, 16);
    const LaneInts zero = abs(extreme) < kTiny;
    const LaneFloats inverse = -128.0f / extreme;
    const Halves stored = to_f16(select(zero, 0.0f, 1.0f / inverse));
    for (int j = 0; j < 16; ++j) {
      const LaneInts integer = nearest_int(inverse * scales[j]);
      sc[j] = select(zero, 0, select(integer > 127, 127, integer) << 24 >> 24);
      codes_for_stored_scale<16>(in.x + 16 * j, in.largest, stored.value * to_float(sc[j]), splat<LaneFloats>(0.0f),
                                 -32, 31, 32, levels + 16 * j, codes + 16 * j);
    }
    for (int i = 0; i < 256; ++i) codes[i] = select(zero, 0, codes[i]);  // all bytes of such a block are zero
    out->d = stored;
  }

  static void store(const Chosen& chosen, Block* out) {
    const LaneInts *const codes = chosen.codes, *const sc = chosen.sc;
    store_bytes<128>(out->ql, sizeof(Block), [&](int j) {
      const LaneInts* at = codes + 128 * (j / 64) + j % 64;
      return (at[0] & 15) | (at[64] & 15) << 4;
    });
    store_bytes<64>(out->qh, sizeof(Block), [&](int j) {
      const LaneInts* at = codes + 128 * (j / 32) + j % 32;
      return at[0] >> 4 | at[32] >> 4 << 2 | at[64] >> 4 << 4 | at[96] >> 4 << 6;
    });
    store_bytes<16>(out->scales, sizeof(Block), [&](int j) { return sc[j] & 255; });
    for (int l = 0; l < kWidth; ++l) out[l].d = chosen.d.bits[l];
  }
};

// ---- q8k: w = d * code, f32 scale ---------------------------------------------------------------------------------

struct Q8K : BlockwiseFormat {
  using Block = BlockQ8K;
  static constexpr int kBlock = 256;
  static constexpr bool kTakesImportance = false, kF16Scales = false;

  static void decode(const Block& block, float* w) {
    const float d = block.d;
    for (int i = 0; i < 256; ++i) w[i] = d * (float)block.qs[i];
  }

  struct Chosen {
    LaneInts codes[256];
    LaneFloats d;
    LaneInts overflow() const { return splat<LaneInts>(0); }
    LaneFloats value(int, LaneInts code) const { return d * to_float(code); }
  };
  static constexpr int kFirstRank = -127, kLastRank = 127;

  static void choose(const LaneBlocks<256>& in, Chosen* out) {
    const LaneFloats extreme = first_extreme(in.x, 256);
    const LaneFloats inverse = -127.0f / extreme;
    const LaneInts zero = ~(abs(inverse) <= FLT_MAX);  // all weights are zero or nearly zero
    out->d = select(zero, 0.0f, 1.0f / inverse);
    for (int i = 0; i < 256; ++i) {
      out->codes[i] = select(zero, 0, clamp(nearest_int(inverse * in.x[i]), -128, 127));
    }
  }

  static void store(const Chosen& chosen, Block* out) {
    for (int j = 0; j < 16; ++j) {
      LaneInts sum = splat<LaneInts>(0);
      for (int i = 16 * j; i < 16 * j + 16; ++i) sum += chosen.codes[i];
      for (int l = 0; l < kWidth; ++l) out[l].bsums[j] = (int16_t)sum[l];
    }
    store_bytes<256>(out->qs, sizeof(Block), [&](int i) { return chosen.codes[i] & 255; });
    for (int l = 0; l < kWidth; ++l) out[l].d = chosen.d[l];
  }
};

}  // namespace isqtorch::ISQ_ISA
