// q2k q4k q5k: every sub-block has a scale and a minimum.
#pragma once

#include "cuda/kernels/quantize/kquants.cuh"

namespace isqtorch::cuda {

// The first half of the team works on the scales, the other half on the minimums. Each thread has all integers of its
// half and their common factor. This gives both to every thread.
template <int kTeam>
ISQ_DEVICE void exchange_halves(const Team& team, LaneFloats number, const LaneInts (&integers)[kTeam], LaneFloats* d,
                                LaneFloats* dmin, LaneInts (&scales)[kTeam], LaneInts (&mins)[kTeam]) {
  *d = team.from(number.v, 0);
  *dmin = team.from(number.v, kTeam / 2);
  ISQ_GPU_UNROLL for (int j = 0; j < kTeam; ++j) {
    scales[j] = team.from(integers[j].v, 0);
    mins[j] = team.from(integers[j].v, kTeam / 2);
  }
}

// From the scale and offset of this thread's sub-block to those of all sub-blocks, as integers up to kMax times d and
// dmin. `sum_w` is the sum of the error weights of the sub-block. Without importance, `plain` chooses the integers.
template <bool kWeighted, int kMax, int kTeam, class Plain>
ISQ_DEVICE void scales_of_scales(const Team& team, LaneFloats scale, LaneFloats offset, LaneFloats sum_w,
                                 const Plain& plain, LaneFloats* d, LaneFloats* dmin, LaneInts (&scales)[kTeam],
                                 LaneInts (&mins)[kTeam]) {
  LaneFloats mine[kTeam], sums[kTeam], other[kTeam];
  LaneInts integers[kTeam];
  gather(team, scale, mine);
  gather(team, offset, other);
  ISQ_GPU_UNROLL for (int j = 0; j < kTeam; ++j) {
    if (team.member >= kTeam / 2) mine[j] = other[j];
  }
  LaneFloats number;
  if constexpr (kWeighted) {
    gather(team, sum_w, sums);
    number = search_positive<kTeam>(mine, sums, kMax, integers);
  } else {
    number = plain(mine, integers);
  }
  exchange_halves(team, number, integers, d, dmin, scales, mins);
}

template <int kOwn>
ISQ_DEVICE LaneFloats sum_of(const LaneFloats (&w)[kOwn]) {
  LaneFloats sum = 0.0f;
  ISQ_GPU_UNROLL for (int i = 0; i < kOwn; ++i) sum += w[i];
  return sum;
}

// ---- q2k: w = d * sc * code - dmin * mn, sub-blocks of 16 ----------------------------------------------------------

struct QuantizeQ2K : TileFormat {
  using Block = BlockQ2K;
  static constexpr int kBlock = 256, kOwn = 16, kTeam = 16;
  static constexpr bool kTakesImportance = true;

  template <bool kWeighted>
  static ISQ_DEVICE bool quantize(const LaneFloats (&x)[16], LaneFloats (&w)[16], const BlockScope& scope) {
    const Team& team = scope.team;
    if constexpr (kWeighted) {
      importance_weights(x, w, 1.0f * team.sum_of_squares(x) / 256.0f);
    } else {
      ISQ_GPU_UNROLL for (int i = 0; i < 16; ++i) w[i] = abs(x[i]);
    }
    const Guesses guesses = kWeighted ? weighted_guesses() : Guesses{-0.5f, 0.1f, 15, true};
    LaneFloats levels[16], offset, d, dmin;
    LaneInts codes[16], scales[16], mins[16];
    const LaneFloats scale = search_affine<LaneFloats, 16>(x, w, 3, guesses, levels, &offset);
    scales_of_scales<kWeighted, 15>(team, scale, offset, sum_of(w), integer_scales, &d, &dmin, scales, mins);
    const Half stored_d = to_f16(d), stored_dmin = to_f16(dmin);
    const LaneInts sc = own(team, scales), mn = own(team, mins);
    codes_for_stored_scale(x, scope.largest, stored_d.value * to_float(sc), stored_dmin.value * to_float(mn), 0, 3, 0,
                           levels, codes);
    share_codes(scope, codes);
    scope.block[team.member] = (uint8_t)((sc & 15) | (mn & 15) << 4).v;
    store_runs<QuantizeQ2K, 2, 4, 0, 2>(scope, scope.block + 16);
    if (team.member == 0) {
      store_u16(scope.block + 80, stored_d.bits);
      store_u16(scope.block + 82, stored_dmin.bits);
    }
    return stored_d.overflow || stored_dmin.overflow;
  }

 private:
  // Nonnegative scales as integers 0 .. 15, each times the returned number.
  static ISQ_DEVICE LaneFloats integer_scales(const LaneFloats (&scales)[16], LaneInts (&integers)[16]) {
    LaneFloats largest = 0.0f;
    ISQ_GPU_UNROLL for (int j = 0; j < 16; ++j) largest = max(scales[j], largest);
    const LaneInts zero = ~(largest > 0.0f);
    const LaneFloats inverse = 15.0f / largest;
    ISQ_GPU_UNROLL for (int j = 0; j < 16; ++j) integers[j] = select(zero, 0, nearest_int(inverse * scales[j]));
    return select(zero, 0.0f, largest / 15.0f);
  }
};

// ---- q4k, q5k: w = d * ls * code - dmin * lm, sub-blocks of 32 -----------------------------------------------------

template <int kBits, class BlockType>
struct QuantizePairs256 : TileFormat {
  using Block = BlockType;
  static constexpr int kBlock = 256, kOwn = 32, kTeam = 8, kMax = (1 << kBits) - 1;
  static constexpr bool kTakesImportance = true;

  template <bool kWeighted>
  static ISQ_DEVICE bool quantize(const LaneFloats (&x)[32], LaneFloats (&w)[32], const BlockScope& scope) {
    const Team& team = scope.team;
    if constexpr (kWeighted) {
      importance_weights(x, w, 2.0f * team.sum_of_squares(x) / 256.0f);
    } else {
      magnitude_weights(x, w);
    }
    const Guesses guesses = kWeighted    ? weighted_guesses()
                            : kBits == 4 ? Guesses{-1.0f, 0.1f, 20, false}
                                         : Guesses{-0.5f, 0.1f, 15, false};
    LaneFloats levels[32], offset, d, dmin;
    LaneInts codes[32], ls[8], lm[8];
    const LaneFloats scale = search_affine<LaneFloats, 32>(x, w, kMax, guesses, levels, &offset);
    scales_of_scales<kWeighted, 63>(team, scale, offset, sum_of(w), integer_scales, &d, &dmin, ls, lm);
    const Half stored_d = to_f16(d), stored_dmin = to_f16(dmin);
    codes_for_stored_scale(x, scope.largest, stored_d.value * to_float(own(team, ls)),
                           stored_dmin.value * to_float(own(team, lm)), 0, kMax, 0, levels, codes);
    share_codes(scope, codes);
    if (team.member == 0) store_header(stored_d, stored_dmin, ls, lm, scope.block);
    if constexpr (kBits == 5) store_runs<QuantizePairs256, 1, 8, 4, 1>(scope, scope.block + 16);
    store_runs<QuantizePairs256, 4, 2, 0, 4>(scope, scope.block + (kBits == 5 ? 48 : 16));
    return stored_d.overflow || stored_dmin.overflow;
  }

 private:
  // Without importance: |x| plus the sub-block's root mean square.
  static ISQ_DEVICE void magnitude_weights(const LaneFloats (&x)[32], LaneFloats (&w)[32]) {
    LaneFloats sum = 0.0f;
    ISQ_GPU_UNROLL for (int i = 0; i < 32; ++i) sum += x[i] * x[i];
    const LaneFloats rms = sqrt(sum / 32.0f);
    ISQ_GPU_UNROLL for (int i = 0; i < 32; ++i) w[i] = rms + abs(x[i]);
  }

  // Nonnegative scales as integers 0 .. 63, each times the returned number.
  static ISQ_DEVICE LaneFloats integer_scales(const LaneFloats (&scales)[8], LaneInts (&integers)[8]) {
    LaneFloats largest = 0.0f;
    ISQ_GPU_UNROLL for (int j = 0; j < 8; ++j) largest = max(scales[j], largest);
    const LaneFloats inverse = select(largest > 0.0f, 63.0f / largest, 0.0f);
    ISQ_GPU_UNROLL for (int j = 0; j < 8; ++j) {
      integers[j] = min(nearest_int(inverse * scales[j]) & 255, 63);  // ggml stores it in an unsigned byte
    }
    return largest / 63.0f;
  }

  // d, dmin, and eight pairs of 6-bit numbers in 12 bytes.
  static ISQ_DEVICE void store_header(const Half& d, const Half& dmin, const LaneInts (&ls)[8], const LaneInts (&lm)[8],
                                      uint8_t* to) {
    const auto with_top = [](LaneInts low, LaneInts high) { return low | high >> 4 << 6; };
    const auto nibbles = [](LaneInts scale, LaneInts minimum) { return (scale & 15) | (minimum & 15) << 4; };
    store_u16(to, d.bits);
    store_u16(to + 2, dmin.bits);
    store_u32<4>(to + 4, four_bytes(with_top(ls[0], ls[4]), with_top(ls[1], ls[5]), with_top(ls[2], ls[6]),
                                    with_top(ls[3], ls[7])));
    store_u32<4>(to + 8, four_bytes(with_top(lm[0], lm[4]), with_top(lm[1], lm[5]), with_top(lm[2], lm[6]),
                                    with_top(lm[3], lm[7])));
    store_u32<4>(to + 12, four_bytes(nibbles(ls[4], lm[4]), nibbles(ls[5], lm[5]), nibbles(ls[6], lm[6]),
                                     nibbles(ls[7], lm[7])));
  }
};

template <>
struct QuantizerOf<Q2K> : BlockByBlock<QuantizeQ2K> {};
template <>
struct QuantizerOf<Q4K> : BlockByBlock<QuantizePairs256<4, BlockQ4K>> {};
template <>
struct QuantizerOf<Q5K> : BlockByBlock<QuantizePairs256<5, BlockQ5K>> {};

}  // namespace isqtorch::cuda
