// ggml's searches for scales: try several and keep the one with the least weighted squared error. They work on as many
// blocks at a time as T has lanes: a vector, or a twin of vectors (twin.h).
//
// The formulas and their order of evaluation are those of ggml-quants.c (commit d99724f2); each function names its
// original there. `w` are the weights of the errors and `levels` the chosen integers, kept as floats. x[i], w[i] and
// levels[i] are element i of every lane's block. If T is a twin, its second sub-blocks follow the first ones.
#pragma once

#include "searches/twin.h"

namespace isqtorch::ISQ_ISA {

constexpr float kTiny = 1e-15f;  // a block whose extreme is below this counts as zero

template <class T, int kCount>
ISQ_INLINE T first_extreme(const LaneFloats* x) {
  T largest = splat<T>(0.0f), value = splat<T>(0.0f);
  ISQ_GPU_UNROLL for (int i = 0; i < kCount; ++i) {
    const T at = get<T, kCount>(x, i), magnitude = abs(at);
    const IntOf<T> better = magnitude > largest;
    largest = select(better, magnitude, largest);
    value = select(better, at, value);
  }
  return value;
}

// Symmetric: integers -nmax .. nmax - 1, stored as level = integer + nmax. Returns the scale. (make_qx_quants with
// rmse_type 1. If w is null, the weight of an error is x^2.)
template <class T, int kCount>
ISQ_GPU_INLINE T search_symmetric(const LaneFloats* x, const LaneFloats* w, int nmax, LaneFloats* levels) {
  const T extreme = first_extreme<T, kCount>(x);
  const IntOf<T> zero = abs(extreme) < kTiny;

  T weights[kCount], weighted[kCount];  // w, w * x
  ISQ_GPU_UNROLL for (int i = 0; i < kCount; ++i) {
    const T at = get<T, kCount>(x, i);
    weights[i] = w ? get<T, kCount>(w, i) : at * at;
    weighted[i] = weights[i] * at;
  }

  // No element is larger than the extreme, so inverse * x is small enough for nearest_small. It also stays within the
  // range of integers at an end where the guess maps the extreme far enough inside: `low` and `high` say which end
  // needs a clamp.
  const auto integer = [&](T inverse, T at, bool low, bool high) {
    T l = nearest_small(inverse * at);
    if (high) l = min(splat<T>((float)nmax - 1.0f), l);
    if (low) l = max(splat<T>(-(float)nmax), l);
    return l;
  };
  T best_inverse, scale, best, sum_lx, sum_l2;
  // Maps the extreme to nmax + excess and computes the sums that measure the error.
  const auto attempt = [&](float excess) {
    constexpr float kMargin = 0.01f;  // more than the rounding error of inverse * x
    const bool low = excess > 0.5f - kMargin, high = excess > -0.5f - kMargin;
    const T inverse = -((float)nmax + excess) / extreme;
    sum_lx = sum_l2 = splat<T>(0.0f);
    ISQ_GPU_UNROLL for (int i = 0; i < kCount; ++i) {
      const T l = integer(inverse, get<T, kCount>(x, i), low, high);
      sum_lx += weighted[i] * l;
      sum_l2 += weights[i] * l * l;
    }
    return inverse;
  };

  best_inverse = attempt(0.0f);
  scale = select(sum_l2 != 0.0f, sum_lx / sum_l2, 0.0f);
  best = scale * sum_lx;
  ISQ_GPU_ROLLED for (int step = -9; step <= 9; ++step) {
    if (step == 0) continue;
    const T inverse = attempt(0.1f * (float)step);
    const IntOf<T> better = (sum_l2 > 0.0f) & (sum_lx * sum_lx > best * sum_l2);
    best_inverse = select(better, inverse, best_inverse);
    scale = select(better, sum_lx / sum_l2, scale);
    best = select(better, scale * sum_lx, best);
  }
  ISQ_GPU_UNROLL for (int i = 0; i < kCount; ++i) {
    const T l = integer(best_inverse, get<T, kCount>(x, i), true, true) + (float)nmax;
    put<kCount>(levels, i, select(zero, 0.0f, l));
  }
  return select(zero, 0.0f, scale);
}

// The scales that the asymmetric search tries: guess i maps the range onto first + i * step + nmax integers.
struct Guesses {
  float first, step;
  int count;
  bool absolute_error;  // sum w |e| instead of sum w e^2
};

// Asymmetric: integers 0 .. nmax, x ~ scale * level - offset with offset >= 0. Returns the scale. (make_qkx2_quants and
// make_qkx3_quants, which differ only in their guesses.)
template <class T, int kCount>
ISQ_GPU_INLINE T search_affine(const LaneFloats* x, const LaneFloats* w, int nmax, const Guesses& guesses,
                               LaneFloats* levels, T* offset) {
  T low = get<T, kCount>(x, 0), high = low, sum_w = get<T, kCount>(w, 0), sum_x = sum_w * low;
  ISQ_GPU_UNROLL for (int i = 1; i < kCount; ++i) {
    const T at = get<T, kCount>(x, i), weight = get<T, kCount>(w, i);
    low = select(at < low, at, low);
    high = select(at > high, at, high);
    sum_w += weight;
    sum_x += weight * at;
  }
  low = select(low > 0.0f, 0.0f, low);
  const IntOf<T> flat = high <= low;

  // `small`: in no lane is the number so large that nearest_int would wrap around.
  const auto level = [&](T inverse, T minimum, T at, bool small) {
    const T exact = inverse * (at - minimum);
    return clamp(small ? nearest_small(exact) : nearest_float(exact), 0.0f, (float)nmax);
  };
  const auto cost = [&](T weight, T e) { return weight * (guesses.absolute_error ? abs(e) : e * e); };

  // The levels of the best guess are not kept. They are computed again at the end, from its inverse scale and offset.
  T minimum = low;
  T best_inverse = (float)nmax / (high - minimum), best_minimum = minimum;
  T scale = 1.0f / best_inverse, best = splat<T>(0.0f);
  ISQ_GPU_UNROLL for (int i = 0; i < kCount; ++i) {
    const T at = get<T, kCount>(x, i);
    best += cost(get<T, kCount>(w, i), scale * level(best_inverse, minimum, at, false) + minimum - at);
  }
  ISQ_GPU_ROLLED for (int guess = 0; guess <= guesses.count; ++guess) {
    // From the best minimum so far and not from the block's, as ggml does it.
    const T inverse = (guesses.first + guesses.step * (float)guess + (float)nmax) / (high - minimum);
    // The largest element is mapped near nmax. The smallest can be far off only where a fit has put the minimum next to
    // the largest element.
    const bool small = !any(~flat & ~(abs(inverse * (low - minimum)) < 0x1p21f));
    T sum_l = splat<T>(0.0f), sum_l2 = splat<T>(0.0f), sum_xl = splat<T>(0.0f);
    ISQ_GPU_UNROLL for (int i = 0; i < kCount; ++i) {
      const T at = get<T, kCount>(x, i), l = level(inverse, minimum, at, small), wl = get<T, kCount>(w, i) * l;
      put<kCount>(levels, i, l);
      sum_l += wl;
      sum_l2 += wl * l;
      sum_xl += wl * at;
    }
    const T determinant = sum_w * sum_l2 - sum_l * sum_l;
    T new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
    T new_minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
    const IntOf<T> above = new_minimum > 0.0f;
    new_minimum = select(above, 0.0f, new_minimum);
    if (any(above)) new_scale = select(above, sum_xl / sum_l2, new_scale);
    T error = splat<T>(0.0f);
    ISQ_GPU_UNROLL for (int i = 0; i < kCount; ++i) {
      const T e = new_scale * get<T, kCount>(levels, i) + new_minimum - get<T, kCount>(x, i);
      error += cost(get<T, kCount>(w, i), e);
    }
    const IntOf<T> better = (determinant > 0.0f) & (error < best);
    best = select(better, error, best);
    scale = select(better, new_scale, scale);
    best_inverse = select(better, inverse, best_inverse);
    best_minimum = select(better, minimum, best_minimum);
    minimum = select(better, new_minimum, minimum);
  }
  ISQ_GPU_UNROLL for (int i = 0; i < kCount; ++i) {
    put<kCount>(levels, i, select(flat, 0.0f, level(best_inverse, best_minimum, get<T, kCount>(x, i), false)));
  }
  *offset = -select(flat, low, minimum);
  return select(flat, 0.0f, scale);
}

// Nonnegative x, integers 0 .. nmax, for scales of scales. Returns the scale. (make_qp_quants.)
template <int kCount>
ISQ_GPU_INLINE LaneFloats search_positive(const LaneFloats* x, const LaneFloats* w, int nmax, LaneInts* levels) {
  LaneFloats high = splat<LaneFloats>(0.0f);
  ISQ_GPU_UNROLL for (int i = 0; i < kCount; ++i) high = max(x[i], high);
  const LaneInts zero = high < kTiny;

  const auto upto_nmax = [&](LaneInts v) { return select(v > nmax, nmax, v); };
  const auto error_of = [&](LaneFloats inverse, bool clamped) {
    const LaneFloats scale = 1.0f / inverse;
    LaneFloats error = splat<LaneFloats>(0.0f);
    ISQ_GPU_UNROLL for (int i = 0; i < kCount; ++i) {
      const LaneInts l = nearest_int(inverse * x[i]);
      const LaneFloats e = x[i] - scale * to_float(clamped ? upto_nmax(l) : l);
      error += w[i] * e * e;
    }
    return error;
  };
  LaneFloats inverse = (float)nmax / high;
  LaneFloats best = error_of(inverse, false);
  ISQ_GPU_ROLLED for (int step = -4; step <= 4; ++step) {
    if (step == 0) continue;
    const LaneFloats candidate = (0.1f * (float)step + (float)nmax) / high;
    const LaneFloats error = error_of(candidate, true);
    const LaneInts better = error < best;
    best = select(better, error, best);
    inverse = select(better, candidate, inverse);
  }

  LaneFloats sum_lx = splat<LaneFloats>(0.0f), sum_l2 = splat<LaneFloats>(0.0f);
  ISQ_GPU_UNROLL for (int i = 0; i < kCount; ++i) {
    levels[i] = upto_nmax(nearest_int(inverse * x[i])) & 255;  // ggml stores them in bytes
    const LaneFloats l = to_float(levels[i]);
    sum_lx += w[i] * x[i] * l;
    sum_l2 += w[i] * l * l;
  }
  ISQ_GPU_ROLLED for (int sweep = 0; sweep < 5; ++sweep) {
    LaneInts changed = splat<LaneInts>(0);
    ISQ_GPU_UNROLL for (int i = 0; i < kCount; ++i) {
      const LaneFloats l = to_float(levels[i]);
      LaneFloats rest_lx = sum_lx - w[i] * x[i] * l;
      LaneFloats rest_l2 = sum_l2 - w[i] * l * l;
      const LaneInts candidate = upto_nmax(nearest_int(x[i] * rest_l2 / rest_lx));
      const LaneFloats c = to_float(candidate);
      const LaneInts allowed = (rest_lx > 0.0f) & (rest_l2 > 0.0f) & (candidate != levels[i]);
      rest_lx += w[i] * x[i] * c;
      rest_l2 += w[i] * c * c;
      const LaneInts better = allowed & (rest_lx * rest_lx * sum_l2 > sum_lx * sum_lx * rest_l2);
      levels[i] = select(better, candidate & 255, levels[i]);
      sum_lx = select(better, rest_lx, sum_lx);
      sum_l2 = select(better, rest_l2, sum_l2);
      changed |= better;
    }
    if (!any(changed)) break;
  }
  ISQ_GPU_UNROLL for (int i = 0; i < kCount; ++i) levels[i] = select(zero, 0, levels[i]);
  return select(zero | ~(sum_l2 > 0.0f), 0.0f, sum_lx / sum_l2);
}

}  // namespace isqtorch::ISQ_ISA
