// How weights become codes of formats with a table of levels: iq4_nl, iq4_xs and mxfp4.
//
// The formulas and their order of evaluation are those of ggml-quants.c (commit d99724f2): quantize_row_iq4_nl_impl and
// quantize_row_mxfp4_ref.
#pragma once

#include "blocks.h"
#include "searches/search.h"

namespace isqtorch::ISQ_ISA {

constexpr int8_t kIq4Levels[16] = {ISQ_IQ4_LEVELS}, kE2m1Levels[16] = {ISQ_E2M1_LEVELS};

// Variables and not elements of arrays, which device code cannot read. The middle is that between levels i - 1 and i; a
// number there gets level i of iq4.
template <int i>
constexpr float kIq4Level = kIq4Levels[i];
template <int i>
constexpr float kIq4Middle = 0.5f * (kIq4Levels[i - 1] + kIq4Levels[i]);
template <int i>
constexpr float kE2m1Middle = 0.5f * (kE2m1Levels[i - 1] + kE2m1Levels[i]);

// Folded, so that every middle and level is a constant; GCC keeps loops over them.
template <class T, int... i>
ISQ_INLINE T nearest_iq4_level(T scaled, std::integer_sequence<int, i...>) {
  T level = splat<T>(kIq4Level<15>);
  ((level = select(scaled < kIq4Middle<15 - i>, kIq4Level<14 - i>, level)), ...);
  return level;
}
template <class T>
ISQ_INLINE T nearest_iq4_level(T scaled) {
  return nearest_iq4_level(scaled, std::make_integer_sequence<int, 15>{});
}
// The number of that level.
template <int... i>
ISQ_INLINE LaneInts nearest_iq4_code(LaneFloats scaled, std::integer_sequence<int, i...>) {
  LaneInts code = splat<LaneInts>(15);
  ((code = code + (scaled < kIq4Middle<15 - i>)), ...);
  return code;
}
ISQ_INLINE LaneInts nearest_iq4_code(LaneFloats scaled) {
  return nearest_iq4_code(scaled, std::make_integer_sequence<int, 15>{});
}

// x ~ scale * level. Returns the scale. The first try maps the extreme to 127, the others to -120 .. -134.
template <class T, int kCount>
ISQ_GPU_INLINE T search_iq4(const LaneFloats* x, const LaneFloats* w) {
  const T extreme = first_extreme<T, kCount>(x);
  T sum_lx, sum_l2;
  const auto attempt = [&](T inverse) {
    sum_lx = sum_l2 = splat<T>(0.0f);
    ISQ_GPU_UNROLL for (int i = 0; i < kCount; ++i) {
      const T at = get<T, kCount>(x, i), l = nearest_iq4_level(inverse * at), wl = get<T, kCount>(w, i) * l;
      sum_lx += wl * at;
      sum_l2 += wl * l;
    }
  };
  attempt(1.0f / (extreme / 127.0f));
  T scale = select(sum_l2 > 0.0f, sum_lx / sum_l2, 0.0f), best = scale * sum_lx;
  ISQ_GPU_ROLLED for (int step = -7; step <= 7; ++step) {
    attempt(((float)step - 127.0f) / extreme);
    const IntOf<T> better = (sum_l2 > 0.0f) & (sum_lx * sum_lx > best * sum_l2);
    scale = select(better, sum_lx / sum_l2, scale);
    best = select(better, scale * sum_lx, best);
  }
  return select(abs(extreme) < kTiny, 0.0f, scale);
}

// ---- mxfp4 ---------------------------------------------------------------------------------------------------------

// floor(log2(largest)) - 2 + 127, but not less than 0, where the logarithm is rounded to f32 before it is cut. Just
// below a power of two, the rounded logarithm is that of the power. Its distance is 1 / ln 2 units of the mantissa; the
// spacing of floats near the logarithm decides. In integers, because no two systems have the same log2.
ISQ_INLINE LaneInts mxfp4_exponent(LaneFloats largest) {
  const LaneInts bits = as_int(largest), above = (bits >> 23) - 126;  // the power of two above `largest`
  const LaneInts units = 0x800000 - (bits & 0x7fffff);                // of the mantissa, up to it
  const LaneInts n = select(above > 0, above - 1, 0 - above);
  const LaneFloats spacing = as_float(as_int(to_float(n)) & 0x7f800000);  // the power of two that is not above n
  const LaneInts rounds_up = to_float(units) <= 0.6931472f * spacing;     // -1 or 0
  return select(largest > 0.0f, max(above + 124 - rounds_up, splat<LaneInts>(0)), splat<LaneInts>(0));
}
// 2^(e - 128); the two smallest are subnormal.
ISQ_INLINE LaneFloats mxfp4_step(LaneInts e) {
  return as_float(select(e > 1, (e - 1) << 23, select(e > 0, splat<LaneInts>(0x400000), splat<LaneInts>(0x200000))));
}
// The nearest level, the smaller of two that are equally near. Zero has no sign.
template <int... i>
ISQ_INLINE LaneInts mxfp4_code(LaneFloats x, LaneFloats step, std::integer_sequence<int, i...>) {
  LaneInts code = splat<LaneInts>(0);
  ((code = code - (abs(x) > step * kE2m1Middle<i + 1>)), ...);
  return code | (select(code > 0, as_int(x), splat<LaneInts>(0)) >> 28 & 8);
}
ISQ_INLINE LaneInts mxfp4_code(LaneFloats x, LaneFloats step) {
  return mxfp4_code(x, step, std::make_integer_sequence<int, 7>{});
}

}  // namespace isqtorch::ISQ_ISA
