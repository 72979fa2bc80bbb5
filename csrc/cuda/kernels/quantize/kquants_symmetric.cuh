// q3k q6k q8k: every sub-block, or the whole block, has a scale. There is no offset, so zero stays zero.
#pragma once

#include "cuda/kernels/quantize/kquants.cuh"

namespace isqtorch::cuda {

// ---- q3k: w = d * (t - 32) * (code - 4), sub-blocks of 16 ----------------------------------------------------------

struct QuantizeQ3K : TileFormat {
  using Block = BlockQ3K;
  static constexpr int kBlock = 256, kOwn = 16, kTeam = 16;
  static constexpr bool kTakesImportance = true;

  template <bool kWeighted>
  static ISQ_DEVICE bool quantize(const LaneFloats (&x)[16], LaneFloats (&w)[16], const BlockScope& scope) {
    const Team& team = scope.team;
    LaneFloats levels[16], scales[16], d;
    LaneInts codes[16], t[16];
    if constexpr (kWeighted) {
      importance_weights(x, w, 2.0f * team.sum_of_squares(x) / 256.0f);
      LaneFloats sum = 0.0f, sums[16], integers[16];
      ISQ_GPU_UNROLL for (int i = 0; i < 16; ++i) sum += w[i];
      gather(team, search_symmetric<LaneFloats, 16>(x, w, 4, levels), scales);
      gather(team, sum, sums);
      d = search_symmetric<LaneFloats, 16>(scales, sums, 32, integers);
      ISQ_GPU_UNROLL for (int j = 0; j < 16; ++j) t[j] = truncate(integers[j]);
    } else {
      Descent<LaneFloats, 16> descent(x, 4, levels);
      descent.run();
      gather(team, descent.finish(), scales);
      const LaneFloats extreme = first_extreme(scales);
      const LaneInts zero = extreme == 0.0f;
      const LaneFloats inverse = -32.0f / extreme;
      ISQ_GPU_UNROLL for (int j = 0; j < 16; ++j) {
        const LaneInts byte = nearest_int(inverse * scales[j]) << 24 >> 24;  // ggml stores it in a signed byte
        t[j] = select(zero, 0, clamp(byte, -32, 31) + 32);
      }
      d = select(zero, 0.0f, 1.0f / inverse);
    }
    const Half stored = to_f16(d);
    codes_for_stored_scale(x, scope.largest, stored.value * to_float(own(team, t) - 32), 0.0f, -4, 3, 4, levels, codes);
    share_codes(scope, codes);
    store_runs<QuantizeQ3K, 1, 8, 2, 1>(scope, scope.block);
    store_runs<QuantizeQ3K, 2, 4, 0, 2>(scope, scope.block + 32);
    if (team.member == 0) store_tail(t, stored, scope.block + 96);
    return stored.overflow;
  }

 private:
  // Sixteen 6-bit numbers in 12 bytes, and d.
  static ISQ_DEVICE void store_tail(const LaneInts (&t)[16], const Half& d, uint8_t* to) {
    const auto low = [&](int j) { return (t[j] & 15) | (t[8 + j] & 15) << 4; };
    const auto high = [&](int j) { return t[j] >> 4 | t[j + 4] >> 4 << 2 | t[j + 8] >> 4 << 4 | t[j + 12] >> 4 << 6; };
    store_u32<2>(to, four_bytes(low(0), low(1), low(2), low(3)));
    store_u32<2>(to + 4, four_bytes(low(4), low(5), low(6), low(7)));
    store_u32<2>(to + 8, four_bytes(high(0), high(1), high(2), high(3)));
    store_u16(to + 12, d.bits);
  }
};

// ---- q6k: w = d * sc * (code - 32), sub-blocks of 16 ---------------------------------------------------------------

struct QuantizeQ6K : TileFormat {
  using Block = BlockQ6K;
  static constexpr int kBlock = 256, kOwn = 16, kTeam = 16;
  static constexpr bool kTakesImportance = true;

  template <bool kWeighted>
  static ISQ_DEVICE bool quantize(const LaneFloats (&x)[16], LaneFloats (&importance)[16], const BlockScope& scope) {
    const Team& team = scope.team;
    LaneFloats levels[16], scales[16];
    LaneInts codes[16];
    const LaneFloats mine = search_symmetric<LaneFloats, 16>(x, kWeighted ? importance : nullptr, 32, levels);
    gather(team, mine, scales);
    const LaneFloats extreme = first_extreme(scales);
    const LaneInts zero = abs(extreme) < kTiny;
    const LaneFloats inverse = -128.0f / extreme;
    const Half stored = to_f16(select(zero, 0.0f, 1.0f / inverse));
    const LaneInts sc = select(zero, 0, min(nearest_int(inverse * mine), 127) << 24 >> 24);
    codes_for_stored_scale(x, scope.largest, stored.value * to_float(sc), 0.0f, -32, 31, 32, levels, codes);
    // All bytes of such a block are zero.
    ISQ_GPU_UNROLL for (int i = 0; i < 16; ++i) codes[i] = select(zero, 0, codes[i]);
    share_codes(scope, codes);
    store_runs_of_64(scope, scope.block);
    store_runs<QuantizeQ6K, 2, 4, 4, 2>(scope, scope.block + 128);
    scope.block[192 + team.member] = (uint8_t)sc.v;
    if (team.member == 0) store_u16(scope.block + 208, stored.bits);
    return stored.overflow;
  }

 private:
  // Byte 64h + l has the low nibbles of the codes of weights 128h + l and 128h + 64 + l.
  static ISQ_DEVICE void store_runs_of_64(const BlockScope& scope, uint8_t* to) {
    store_words<QuantizeQ6K, 32>(scope, to, [&](int j) {
      const uint32_t* const at = scope.codes + 32 * (j / 16) + j % 16;
      return (at[0] & 0x0f0f0f0f) | (at[16] & 0x0f0f0f0f) << 4;
    });
  }
};

// ---- q8k: w = d * code, f32 scale ----------------------------------------------------------------------------------

struct QuantizeQ8K : TileFormat {
  using Block = BlockQ8K;
  static constexpr int kBlock = 256;
  static ISQ_DEVICE bool f16_scales(const Shape&) { return false; }

  template <bool kWeighted>
  static ISQ_DEVICE bool quantize(const LaneFloats (&x)[32], LaneFloats (&)[32], const BlockScope& scope) {
    const Team& team = scope.team;
    const LaneFloats extreme = team.in_order(
        first_extreme(x).v, [](float first, float then) { return ::fabsf(then) > ::fabsf(first) ? then : first; });
    const LaneFloats inverse = -127.0f / extreme;
    const LaneInts zero = ~(abs(inverse) <= FLT_MAX);  // all weights are zero or nearly zero
    LaneInts codes[32], sums[2] = {0, 0};
    ISQ_GPU_UNROLL for (int i = 0; i < 32; ++i) {
      codes[i] = select(zero, 0, clamp(nearest_int(inverse * x[i]), -128, 127));
      sums[i / 16] = sums[i / 16] + codes[i];
    }
    if (team.member == 0) store_u32<4>(scope.block, (uint32_t)as_int(select(zero, 0.0f, 1.0f / inverse)).v);
    ISQ_GPU_UNROLL for (int i = 0; i < 32; i += 4) {
      store_u32<4>(scope.block + 4 + 32 * team.member + i,
                   four_bytes(codes[i], codes[i + 1], codes[i + 2], codes[i + 3]));
    }
    store_u16(scope.block + 260 + 4 * team.member, (uint32_t)sums[0].v);
    store_u16(scope.block + 262 + 4 * team.member, (uint32_t)sums[1].v);
    return false;
  }
};

template <>
struct QuantizerOf<Q3K> : BlockByBlock<QuantizeQ3K> {};
template <>
struct QuantizerOf<Q6K> : BlockByBlock<QuantizeQ6K> {};
template <>
struct QuantizerOf<Q8K> : BlockByBlock<QuantizeQ8K> {};

}  // namespace isqtorch::cuda
