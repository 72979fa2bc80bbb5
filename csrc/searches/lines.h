// Rule::kSearch of the affine and HQQ families: the line through a group's levels that costs least.
//
// A group's weights are approximated by scale * level + offset, both of 16 bits. The default rules take them from the
// extremes of the group. Here sixteen ranges are tried, the group's own and ones cut off by up to 3/4 of a step at
// either end; for the levels of each, the weighted least-squares line is rounded as it will be stored and judged by its
// error with the levels that belong to it. The best one is refined twice in the same way. The default rule's line is a
// candidate too, so no group gets worse.
//
// As many groups at a time as a vector has lanes (line_fit.h), or one lane's that several threads of a GPU share
// (cuda/kernels/quantize/line_fit.cuh).
#pragma once

#include "searches/contract.h"

namespace isqtorch::ISQ_ISA {

// ---- lines ---------------------------------------------------------------------------------------------------------

// A Line has two numbers, `scale` and `second`, rounded as they are stored, and
//   static Line rounded(LaneFloats scale, LaneFloats low, bool f16)   the nearest to scale * level + low
//   Position position()    -> a function of x: where it lies between the levels
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

// What the squared error of an element counts, its importance aside; `power` is the mean square of its group.
ISQ_INLINE LaneFloats error_weight(LaneFloats x, LaneFloats power) { return sqrt(power + x * x); }

// The best line so far, and what it takes to judge another.
//
// group.each(f) calls f(x, w) for every element of the group in order, w what its squared error counts.
template <class Line, class Group>
struct LineFit {
  static constexpr int kCuts = 4;  // at either end

  const Group& group;
  float nmax;  // levels run from 0 to this
  bool f16;    // how the line's numbers are stored
  Line line;
  LaneFloats cost;           // of its errors
  LaneInts improved;         // whether it was found here
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

  // A range of levels that starts `below` cuts above the least x, and all that may end below the largest one.
  ISQ_GPU_INLINE void try_ranges(LaneFloats low, LaneFloats high, int below) {
    constexpr float kCut = 0.25f;  // of a step
    const LaneFloats span = high - low, step = span / nmax, start = low + step * (kCut * (float)below);
    ISQ_GPU_ROLLED for (int above = 0; above < kCuts; ++above) {
      const LaneFloats inverse = nmax / (span - step * (kCut * (float)(below + above)));
      attempt([=](LaneFloats x) { return (x - start) * inverse; });
    }
  }

  ISQ_GPU_INLINE void refine() { ISQ_GPU_ROLLED for (int i = 0; i < 2; ++i) attempt(line.position()); }

  // The codes that belong to the line; those given where it is the given one.
  template <int kCount>
  ISQ_GPU_INLINE void choose(const LaneFloats* x, LaneInts* codes) const {
    const auto place = line.position();
    ISQ_GPU_UNROLL for (int i = 0; i < kCount; ++i) {
      codes[i] = select(improved, truncate(level(place(x[i]))), codes[i]);
    }
  }

 private:
  ISQ_INLINE LaneFloats level(LaneFloats position) const { return nearest_small(clamp(position, 0.0f, nmax)); }

  // The line for the levels that `position` gives.
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
