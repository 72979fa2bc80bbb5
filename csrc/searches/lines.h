// Rule::kSearch of AFQ and HQQ: the line through the levels of a group that has the least error.
//
// A group's weights are approximated by scale * level + offset, both stored in 16 bits. The default rules take scale
// and offset from the extremes of the group. This search tries sixteen ranges: that of the group, and smaller ones with
// up to 3/4 of a step cut off at either end. A range gives levels; the weighted least-squares line through these is
// rounded as it will be stored, and its error is computed with the levels nearest to it. The best line is refined twice
// in the same way. The line of the default rule competes too, so no group gets worse.
//
// On a CPU a vector has one group per lane (cpu/quantize/line_fit.h). On a GPU several threads share one group
// (cuda/kernels/quantize/line_fit.cuh).
#pragma once

#include "searches/contract.h"

namespace isqtorch::ISQ_ISA {

// ---- lines ---------------------------------------------------------------------------------------------------------

// A Line has two numbers, `scale` and `second`, rounded as they are stored, and these functions:
//   static Line rounded(LaneFloats scale, LaneFloats low, bool f16)   the nearest to scale * level + low
//   Position position()    -> a function of x: its position between the levels
//   LaneFloats value(LaneFloats level)                                with the roundings of the format's decoder

// scale * level + bias
struct AffineLine {
  LaneFloats scale, second;

  static ISQ_INLINE AffineLine rounded(LaneFloats scale, LaneFloats low, bool f16) {
    return f16 ? AffineLine{rounded_to_f16(scale), rounded_to_f16(low)}
               : AffineLine{rounded_to_bf16(scale), rounded_to_bf16(low)};
  }
  ISQ_INLINE auto position() const {
    return [inverse = 1.0f / scale, bias = second](LaneFloats x) { return (x - bias) * inverse; };
  }
  ISQ_INLINE LaneFloats value(LaneFloats level) const { return scale * level + second; }
};

// (level - zero) * scale
struct HqqLine {
  LaneFloats scale, second;

  static ISQ_INLINE HqqLine rounded(LaneFloats scale, LaneFloats low, bool) {
    const LaneFloats stored = rounded_to_f16(scale);
    return {stored, rounded_to_f16(-low / stored)};
  }
  ISQ_INLINE auto position() const {
    return [inverse = 1.0f / scale, zero = second](LaneFloats x) { return x * inverse + zero; };
  }
  ISQ_INLINE LaneFloats value(LaneFloats level) const { return (level - second) * scale; }
};

// ---- the search ----------------------------------------------------------------------------------------------------

// The weight of an element's squared error, without its importance; `power` is the mean square of its group.
ISQ_INLINE LaneFloats error_weight(LaneFloats x, LaneFloats power) { return sqrt(power + x * x); }

// The best line so far, and the sums needed to compare it with another.
//
// group.each(f) calls f(x, w) for every element of the group in order; w is the weight of its squared error.
template <class Line, class Group>
struct LineFit {
  static constexpr int kCuts = 4;  // at either end

  const Group& group;
  float nmax;  // levels run from 0 to this
  bool f16;    // how the line's numbers are stored
  Line line;
  LaneFloats cost;           // of its errors
  LaneInts improved;         // whether this search found the line
  LaneFloats sum_w, sum_wx;  // over the group

  ISQ_GPU_INLINE LineFit(const Group& group, int nmax, bool f16, const Line& line, LaneFloats cost)
      : group(group),
        nmax((float)nmax),
        f16(f16),
        line(line),
        cost(cost),
        improved(splat<LaneInts>(0)),
        sum_w(splat<LaneFloats>(0.0f)),
        sum_wx(sum_w) {
    group.each([&](LaneFloats x, LaneFloats w) {
      sum_w += w;
      sum_wx += w * x;
    });
  }

  // Tries ranges that start `below` cuts above the least x and end 0 .. kCuts - 1 cuts below the largest x.
  ISQ_GPU_INLINE void try_ranges(LaneFloats low, LaneFloats high, int below) {
    constexpr float kCut = 0.25f;  // of a step
    const LaneFloats span = high - low, step = span / nmax, start = low + step * (kCut * (float)below);
    ISQ_GPU_ROLLED for (int above = 0; above < kCuts; ++above) {
      const LaneFloats inverse = nmax / (span - step * (kCut * (float)(below + above)));
      attempt([=](LaneFloats x) { return (x - start) * inverse; });
    }
  }

  ISQ_GPU_INLINE void refine() { ISQ_GPU_ROLLED for (int i = 0; i < 2; ++i) attempt(line.position()); }

  // Computes the codes for the line, unless it is still the given one, whose codes are kept.
  template <int kCount>
  ISQ_GPU_INLINE void choose(const LaneFloats* x, LaneInts* codes) const {
    const auto place = line.position();
    ISQ_GPU_UNROLL for (int i = 0; i < kCount; ++i) {
      codes[i] = select(improved, truncate(level(place(x[i]))), codes[i]);
    }
  }

 private:
  ISQ_INLINE LaneFloats level(LaneFloats position) const { return nearest_small(clamp(position, 0.0f, nmax)); }

  // Tries the line through the levels that `position` gives.
  template <class Position>
  ISQ_GPU_INLINE void attempt(const Position& position) {
    LaneFloats sum_l = splat<LaneFloats>(0.0f), sum_l2 = sum_l, sum_xl = sum_l, error = sum_l;
    group.each([&](LaneFloats x, LaneFloats w) {
      const LaneFloats l = level(position(x)), wl = w * l;
      sum_l += wl;
      sum_l2 += wl * l;
      sum_xl += wl * x;
    });
    const LaneFloats determinant = sum_w * sum_l2 - sum_l * sum_l;
    const Line found = Line::rounded((sum_w * sum_xl - sum_wx * sum_l) / determinant,
                                     (sum_l2 * sum_wx - sum_l * sum_xl) / determinant, f16);
    const auto place = found.position();
    group.each([&](LaneFloats x, LaneFloats w) {
      const LaneFloats off = found.value(level(place(x))) - x;
      error += w * off * off;
    });
    const LaneInts better = (determinant > 0.0f) & (error < cost);  // false where a number is not finite
    cost = select(better, error, cost);
    line.scale = select(better, found.scale, line.scale);
    line.second = select(better, found.second, line.second);
    improved |= better;
  }
};

}  // namespace isqtorch::ISQ_ISA
