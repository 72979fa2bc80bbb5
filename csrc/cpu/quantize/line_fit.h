// The search of searches/lines.h for a unit of groups, one group per lane.
#pragma once

#include "cpu/quantize/blockwise.h"
#include "searches/lines.h"

namespace isqtorch::ISQ_ISA {

template <int kGroup>
struct LaneGroup {
  const LaneFloats* x;
  LaneFloats w[kGroup];

  explicit LaneGroup(const LaneBlocks<kGroup>& in) : x(in.x) {
    LaneFloats power = splat<LaneFloats>(0.0f);
    for (int i = 0; i < kGroup; ++i) power += x[i] * x[i];
    power /= (float)kGroup;
    for (int i = 0; i < kGroup; ++i) {
      const LaneFloats weight = error_weight(x[i], power);
      w[i] = in.weighted ? in.importance[i] * weight : weight;
    }
  }
  template <class Each>
  ISQ_INLINE void each(const Each& each) const {
    for (int i = 0; i < kGroup; ++i) each(x[i], w[i]);
  }
};

// Searches for better lines than *line, for which the default rule chose `codes`. Replaces both where it finds one.
template <int kGroup, class Line>
ISQ_NOINLINE void fit_lines(const LaneBlocks<kGroup>& in, int nmax, bool f16, Line* line, LaneInts* codes) {
  const LaneGroup<kGroup> group(in);
  LaneFloats cost = splat<LaneFloats>(0.0f), low, high;
  for (int i = 0; i < kGroup; ++i) {
    const LaneFloats off = line->value(to_float(codes[i])) - in.x[i];
    cost += group.w[i] * off * off;
  }
  first_min_max(in.x, kGroup, &low, &high);
  LineFit<Line, LaneGroup<kGroup>> fit(group, nmax, f16, *line, cost);
  for (int below = 0; below < fit.kCuts; ++below) fit.try_ranges(low, high, below);
  fit.refine();
  fit.template choose<kGroup>(in.x, codes);
  *line = fit.line;
}

}  // namespace isqtorch::ISQ_ISA
