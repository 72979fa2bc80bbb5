// Rule::kSearch of the affine and HQQ families: the line through a group's levels that costs least.
//
// A group's weights are approximated by scale * level + offset, both of 16 bits. The default rules take them from the
// extremes of the group. Here sixteen ranges are tried, the group's own and ones cut off by up to 3/4 of a step at
// either end; for the levels of each, the weighted least-squares line is rounded as it will be stored and judged by its
// error with the levels that belong to it. The best one is refined twice in the same way. The default rule's line is a
// candidate too, so no group gets worse.
#pragma once

#include "cpu/quantize/blockwise.h"

namespace isqtorch::ISQ_ISA {

// The nearest numbers of 16 bits, as floats.
ISQ_INLINE LaneFloats rounded_to_bf16(LaneFloats f) {
  const LaneInts bits = as_int(f);
  return as_float((bits + 0x7fff + (bits >> 16 & 1)) & (int32_t)0xffff0000);  // the carry may reach infinity, rightly
}
ISQ_INLINE LaneFloats rounded_to_f16(LaneFloats f) {
  const LaneFloats size = abs(f);
  const LaneInts bits = as_int(size);
  const LaneFloats normal = as_float((bits + 0xfff + (bits >> 13 & 1)) & (int32_t)0xffffe000);
  const LaneFloats subnormal = (size + 0.5f) - 0.5f;  // 0.5 has the ulp 2^-24
  const LaneFloats finite = select(size < 0x1p-14f, subnormal, normal);
  const LaneFloats rounded = select(finite > 65504.0f, __builtin_inff(), finite);
  return as_float(as_int(rounded) | (as_int(f) & (int32_t)0x80000000));
}
ISQ_INLINE LaneFloats rounded_to(bool f16, LaneFloats f) { return f16 ? rounded_to_f16(f) : rounded_to_bf16(f); }

// What the squared error of each element counts: sqrt(mean square of the group + x^2), times its importance if there
// is one.
template <int kGroup>
ISQ_INLINE void error_weights(const LaneBlocks<kGroup>& in, LaneFloats* w) {
  LaneFloats power = splat<LaneFloats>(0.0f);
  for (int i = 0; i < kGroup; ++i) power += in.x[i] * in.x[i];
  power /= (float)kGroup;
  for (int i = 0; i < kGroup; ++i) {
    const LaneFloats root = sqrt(power + in.x[i] * in.x[i]);
    w[i] = in.weighted ? in.importance[i] * root : root;
  }
}

// Searches for better lines than *line, with which the default rule chose `codes`; replaces both where it finds one.
// A Line has two numbers, `scale` and `second`, rounded as they are stored, and
//   static Line rounded(LaneFloats scale, LaneFloats low, bool f16)   the nearest to scale * level + low
//   Position position()    -> a function of x: where it lies between the levels
//   LaneFloats value(LaneFloats level)                                with the roundings of the format's decoder
template <int kGroup, class Line>
__attribute__((noinline)) void fit_lines(const LaneBlocks<kGroup>& in, int nmax, bool f16, Line* line,
                                         LaneInts* codes) {
  constexpr int kCuts = 4, kRefinements = 2;
  constexpr float kCut = 0.25f;  // of a step
  const LaneFloats* x = in.x;
  LaneFloats w[kGroup];
  error_weights(in, w);

  LaneFloats sum_w = splat<LaneFloats>(0.0f), sum_x = sum_w, least = sum_w;
  for (int i = 0; i < kGroup; ++i) {
    sum_w += w[i];
    sum_x += w[i] * x[i];
    const LaneFloats off = line->value(to_float(codes[i])) - x[i];
    least += w[i] * off * off;
  }
  const auto level = [&](LaneFloats position) { return nearest_small(clamp(position, 0.0f, (float)nmax)); };
  LaneInts improved = splat<LaneInts>(0);
  const auto attempt = [&](const auto& position) {
    LaneFloats sum_l = splat<LaneFloats>(0.0f), sum_l2 = sum_l, sum_xl = sum_l, error = sum_l;
    for (int i = 0; i < kGroup; ++i) {
      const LaneFloats l = level(position(x[i])), wl = w[i] * l;
      sum_l += wl;
      sum_l2 += wl * l;
      sum_xl += wl * x[i];
    }
    const LaneFloats determinant = sum_w * sum_l2 - sum_l * sum_l;
    const Line found = Line::rounded((sum_w * sum_xl - sum_x * sum_l) / determinant,
                                     (sum_l2 * sum_x - sum_l * sum_xl) / determinant, f16);
    const auto place = found.position();
    for (int i = 0; i < kGroup; ++i) {
      const LaneFloats off = found.value(level(place(x[i]))) - x[i];
      error += w[i] * off * off;
    }
    const LaneInts better = (determinant > 0.0f) & (error < least);  // false where a number is not finite
    least = select(better, error, least);
    line->scale = select(better, found.scale, line->scale);
    line->second = select(better, found.second, line->second);
    improved |= better;
  };

  LaneFloats low, high;
  first_min_max(x, kGroup, &low, &high);
  const LaneFloats span = high - low, step = span / (float)nmax;
  for (int below = 0; below < kCuts; ++below) {
    for (int above = 0; above < kCuts; ++above) {
      const LaneFloats start = low + step * (kCut * (float)below);
      const LaneFloats inverse = (float)nmax / (span - step * (kCut * (float)(below + above)));
      attempt([=](LaneFloats at) { return (at - start) * inverse; });
    }
  }
  for (int i = 0; i < kRefinements; ++i) attempt(line->position());
  const auto place = line->position();
  for (int i = 0; i < kGroup; ++i) codes[i] = select(improved, truncate(level(place(x[i]))), codes[i]);
}

}  // namespace isqtorch::ISQ_ISA
