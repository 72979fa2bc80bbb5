// ggml's coordinate descent, by which q3k finds a scale without importance: change one integer at a time as long as the
// error falls (ggml-quants.c, commit d99724f2: make_q3_quants). On a CPU, cpu/quantize/descend.h runs it for many
// blocks.
#pragma once

#include "searches/search.h"

namespace isqtorch::ISQ_ISA {

// The descent of one vector or twin of blocks, with symmetric integers -nmax .. nmax - 1.
template <class T, int kCount>
struct Descent {
  const LaneFloats* x;
  LaneFloats* levels;  // -nmax .. nmax - 1 during the descent
  float nmax;
  T part_lx[kCount], part_l2[kCount];  // what each element adds to the sums
  T sum_lx, sum_l2;
  IntOf<T> zero;

  // The starting point.
  ISQ_INLINE Descent(const LaneFloats* x_, int nmax_, LaneFloats* levels_)
      : x(x_), levels(levels_), nmax((float)nmax_) {
    const T extreme = first_extreme<T, kCount>(x), inverse = -nmax / extreme;
    zero = abs(extreme) < kTiny;
    sum_lx = sum_l2 = splat<T>(0.0f);
    ISQ_GPU_UNROLL for (int i = 0; i < kCount; ++i) {
      const T at = get<T, kCount>(x, i), weight = at * at;
      const T l = clamp(nearest_small(inverse * at), -nmax, nmax - 1.0f);
      put<kCount>(levels, i, l);
      sum_lx += part_lx[i] = weight * at * l;
      sum_l2 += part_l2[i] = weight * l * l;
    }
  }

  // The best level i while all other levels stay as they are.
  struct Step {
    T at, level, rest_lx, rest_l2, candidate;
    IntOf<T> allowed;
  };
  ISQ_INLINE Step step(int i) const {
    Step s;
    s.at = get<T, kCount>(x, i);
    s.level = get<T, kCount>(levels, i);
    s.rest_lx = sum_lx - part_lx[i];
    s.rest_l2 = sum_l2 - part_l2[i];
    s.candidate = clamp(nearest_float(s.at * s.rest_l2 / s.rest_lx), -nmax, nmax - 1.0f);
    s.allowed = (s.rest_lx > 0.0f) & (s.candidate != s.level);
    return s;
  }

  // The blocks in which some level may change. The others remain at the starting point.
  ISQ_INLINE IntOf<T> restless() const {
    IntOf<T> found = splat<IntOf<T>>(0);
    ISQ_GPU_UNROLL for (int i = 0; i < kCount; ++i) found |= step(i).allowed;
    return found;
  }

  ISQ_INLINE void run() {
    ISQ_GPU_ROLLED for (int sweep = 0; sweep < 5; ++sweep) {
      IntOf<T> changed = splat<IntOf<T>>(0);
      ISQ_GPU_UNROLL for (int i = 0; i < kCount; ++i) {
        const Step s = step(i);
        const T weight = s.at * s.at;
        const T new_part_lx = weight * s.at * s.candidate, new_lx = s.rest_lx + new_part_lx;
        const T new_part_l2 = weight * s.candidate * s.candidate, new_l2 = s.rest_l2 + new_part_l2;
        const IntOf<T> better = s.allowed & (new_l2 > 0.0f) & (new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2);
        put<kCount>(levels, i, select(better, s.candidate, s.level));
        part_lx[i] = select(better, new_part_lx, part_lx[i]);
        part_l2[i] = select(better, new_part_l2, part_l2[i]);
        sum_lx = select(better, new_lx, sum_lx);
        sum_l2 = select(better, new_l2, sum_l2);
        changed |= better;
      }
      if (!any(changed)) break;  // a block without a change would see the same sums again
    }
  }

  // Returns the scale.
  ISQ_INLINE T finish() {
    ISQ_GPU_UNROLL for (int i = 0; i < kCount; ++i) {
      put<kCount>(levels, i, select(zero, 0.0f, get<T, kCount>(levels, i) + nmax));
    }
    return select(zero | ~(sum_l2 > 0.0f), 0.0f, sum_lx / sum_l2);
  }
};

}  // namespace isqtorch::ISQ_ISA
