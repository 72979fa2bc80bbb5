// Rule::kSearch on a GPU: the search of searches/lines.h with one lane.
//
// The sums run through a group in order, so one thread computes a whole attempt. But the sixteen ranges do not depend
// on each other, and the threads of a group's team share them. Each thread sees the whole group in shared memory. A
// team reads one address at a time; the teams of a warp read different banks.
#pragma once

#include "cuda/kernels/quantize/searches.cuh"
#include "cuda/kernels/quantize/tile.cuh"

namespace isqtorch::cuda {

// The smallest and the largest weight of a team's group. The GPU's own minimum is good enough here: it may give a zero
// of another sign than the CPU's, but no code, scale, bias or zero point depends on that.
ISQ_DEVICE void range_of(const LaneFloats (&x)[32], const Team& team, LaneFloats* low, LaneFloats* high) {
  float least = x[0].v, most = x[0].v;
  ISQ_GPU_UNROLL for (int i = 1; i < 32; ++i) {
    least = ::fminf(x[i].v, least);
    most = ::fmaxf(x[i].v, most);
  }
  *low = team.in_order(least, [](float first, float then) { return ::fminf(first, then); });
  *high = team.in_order(most, [](float first, float then) { return ::fmaxf(first, then); });
}

// A team's group in shared memory: its weights, and the weights of their squared errors.
struct StagedGroup {
  const float *x, *w;  // at the group's first element, in the layout of staged_at
  int count;

  template <class Each>
  ISQ_DEVICE void each(const Each& each) const {
    constexpr int kAtOnce = 16;
    ISQ_GPU_ROLLED for (int first = 0; first < count; first += kAtOnce) {
      const int at = staged_at<32>(first);
      ISQ_GPU_UNROLL for (int i = 0; i < kAtOnce; ++i) each(LaneFloats(x[at + i]), LaneFloats(w[at + i]));
    }
  }
};

// Copies the group to shared memory. `importance` is not needed after that, and its registers are free.
template <bool kWeighted>
ISQ_DEVICE StagedGroup share_group(const LaneFloats (&x)[32], const LaneFloats (&importance)[32],
                                   const BlockScope& scope) {
  ISQ_SHARED(float, weights, [TileMemory<32>::kFloats]);
  const LaneFloats power = scope.team.sum_of_squares(x) / (float)scope.shape.block;
  LaneFloats w[32];
  ISQ_GPU_UNROLL for (int i = 0; i < 32; ++i) {
    w[i] = error_weight(x[i], power);
    if (kWeighted) w[i] = importance[i] * w[i];
  }
  put_own(x, scope.staged);
  put_own(w, weights);
  __syncwarp();
  const int begin = staged_at<32>(32 * ((int)threadIdx.x - scope.team.member));
  return {scope.staged + begin, weights + begin, scope.shape.block};
}

// Gives the best line of the team to all members. Of equally good lines the first wins, as if one thread had tried them
// all.
template <class Fit>
ISQ_DEVICE void share_best(const Team& team, Fit& fit) {
  for (int step = 1; step < team.size; step *= 2) {
    const auto of_other = [&](auto mine) { return decltype(mine)(__shfl_xor_sync(kAllLanes, mine.v, step)); };
    const LaneFloats cost = of_other(fit.cost), scale = of_other(fit.line.scale), second = of_other(fit.line.second);
    const LaneInts improved = of_other(fit.improved);
    const bool other_is_first = team.member & step;
    if (other_is_first ? !any(fit.cost < cost) : any(cost < fit.cost)) {
      fit.cost = cost;
      fit.line = {scale, second};
      fit.improved = improved;
    }
  }
}

// Searches for a better line than *line, for which the default rule chose `codes`. Replaces both if it finds one. Every
// thread of the block must call this: it ends with a barrier, after which nobody reads the group.
template <class Line>
ISQ_DEVICE void fit_line(const StagedGroup& group, const BlockScope& scope, int nmax, bool f16, LaneFloats low,
                         LaneFloats high, Line* line, LaneInts (&codes)[32]) {
  const Team& team = scope.team;
  const int own = staged_at<32>(32 * team.member);
  const LaneFloats cost = team.sum<32>([&](int i) {
    const LaneFloats off = line->value(to_float(codes[i])) - group.x[own + i];
    return group.w[own + i] * off * off;
  });
  LineFit<Line, StagedGroup> fit(group, nmax, f16, *line, cost);
  const int share = fit.kCuts / team.size;
  ISQ_GPU_ROLLED for (int i = 0; i < share; ++i) fit.try_ranges(low, high, team.member * share + i);
  share_best(team, fit);
  fit.refine();
  LaneFloats x[32];
  ISQ_GPU_UNROLL for (int i = 0; i < 32; ++i) x[i] = group.x[own + i];
  fit.template choose<32>(x, codes);
  *line = fit.line;
  __syncthreads();
}

}  // namespace isqtorch::cuda
