// How weights become codes of formats with a table of levels: iq4_nl, iq4_xs and mxfp4.
//
// The formulas and their order of evaluation are those of ggml-quants.c (commit d99724f2): quantize_row_iq4_nl_impl and
// quantize_row_mxfp4_ref.
#pragma once

#include "searches/search.h"

namespace isqtorch::ISQ_ISA {

// Functions with local arrays, because device code cannot read arrays outside of it. Unrolled loops make constants of
// their results.
ISQ_INLINE constexpr int iq4_level(int i) {
  constexpr int8_t levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  return levels[i];
}
ISQ_INLINE constexpr int e2m1_level(int i) {
  constexpr int8_t levels[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  return levels[i];
}

// The middle between the iq4 levels i - 1 and i. A number there gets level i.
ISQ_INLINE constexpr float iq4_middle(int i) { return 0.5f * (float)(iq4_level(i - 1) + iq4_level(i)); }

template <class T>
ISQ_INLINE T nearest_iq4_level(T scaled) {
  T level = splat<T>((float)iq4_level(15));
  ISQ_GPU_UNROLL for (int i = 15; i > 0; --i) level = select(scaled < iq4_middle(i), (float)iq4_level(i - 1), level);
  return level;
}
// The number of that level.
ISQ_INLINE LaneInts nearest_iq4_code(LaneFloats scaled) {
  LaneInts code = splat<LaneInts>(15);
  ISQ_GPU_UNROLL for (int i = 15; i > 0; --i) code = code + (scaled < iq4_middle(i));
  return code;
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
ISQ_INLINE LaneInts mxfp4_code(LaneFloats x, LaneFloats step) {
  LaneInts code = splat<LaneInts>(0);
  ISQ_GPU_UNROLL for (int i = 1; i < 8; ++i) {
    code = code - (abs(x) > step * (0.5f * (float)(e2m1_level(i - 1) + e2m1_level(i))));
  }
  return code | (select(code > 0, as_int(x), splat<LaneInts>(0)) >> 28 & 8);
}

}  // namespace isqtorch::ISQ_ISA
