// ggml's searches for scales: try several, keep the one of least weighted squared error. Sixteen blocks at a time
// (lanes.h).
//
// The formulas and their order of evaluation are those of ggml-quants.c (commit d99724f2); each function names its
// model there. `w` are the weights of the errors, `levels` the chosen integers.
#pragma once

#include "cpu/lanes.h"

namespace isqtorch::ISQ_ISA {

constexpr float kTiny = 1e-15f;  // a block whose extreme is below this counts as zero

// Symmetric, integers -nmax .. nmax - 1, stored as level = integer + nmax. Returns the scale. (make_qx_quants,
// rmse_type 1: w null means that a weight's error counts x^2.)
template <int kCount>
F search_symmetric(const F* x, const F* w, int nmax, I* levels) {
  const F extreme = first_extreme(x, kCount);
  const I zero = abs(extreme) < kTiny;

  F best_inverse, scale, best;
  const auto integer = [&](F inverse, int i) { return clamp(nearest_int(inverse * x[i]), -nmax, nmax - 1); };
  const auto attempt = [&](F inverse, F* sum_lx, F* sum_l2) {
    *sum_lx = *sum_l2 = splat(0.0f);
    for (int i = 0; i < kCount; ++i) {
      const F l = to_float(integer(inverse, i));
      const F weight = w ? w[i] : x[i] * x[i];
      *sum_lx += weight * x[i] * l;
      *sum_l2 += weight * l * l;
    }
  };

  F sum_lx, sum_l2;
  best_inverse = -(float)nmax / extreme;
  attempt(best_inverse, &sum_lx, &sum_l2);
  scale = select(sum_l2 != 0.0f, sum_lx / sum_l2, splat(0.0f));
  best = scale * sum_lx;
  for (int step = -9; step <= 9; ++step) {
    if (step == 0) continue;
    const F inverse = -((float)nmax + 0.1f * (float)step) / extreme;
    attempt(inverse, &sum_lx, &sum_l2);
    const I better = (sum_l2 > 0.0f) & (sum_lx * sum_lx > best * sum_l2);
    best_inverse = select(better, inverse, best_inverse);
    scale = select(better, sum_lx / sum_l2, scale);
    best = select(better, scale * sum_lx, best);
  }
  for (int i = 0; i < kCount; ++i) levels[i] = select(zero, splat(0), integer(best_inverse, i) + nmax);
  return select(zero, splat(0.0f), scale);
}

// Coordinate descent for symmetric integers -nmax .. nmax - 1: change one at a time while the error falls.
// (make_q3_quants.)
template <int kCount>
F descend_symmetric(const F* x, int nmax, I* levels) {
  const F extreme = first_extreme(x, kCount);
  const I zero = abs(extreme) < kTiny;
  const F inverse = -(float)nmax / extreme;

  F sum_lx = splat(0.0f), sum_l2 = splat(0.0f);
  for (int i = 0; i < kCount; ++i) {
    levels[i] = clamp(nearest_int(inverse * x[i]), -nmax, nmax - 1);
    const F l = to_float(levels[i]), weight = x[i] * x[i];
    sum_lx += weight * x[i] * l;
    sum_l2 += weight * l * l;
  }
  for (int sweep = 0; sweep < 5; ++sweep) {
    I changed = splat(0);
    for (int i = 0; i < kCount; ++i) {
      const F l = to_float(levels[i]), weight = x[i] * x[i];
      F rest_lx = sum_lx - weight * x[i] * l;
      F rest_l2 = sum_l2 - weight * l * l;
      const I candidate = clamp(nearest_int(x[i] * rest_l2 / rest_lx), -nmax, nmax - 1);
      const F c = to_float(candidate);
      const I allowed = (rest_lx > 0.0f) & (candidate != levels[i]);
      rest_lx += weight * x[i] * c;
      rest_l2 += weight * c * c;
      const I better = allowed & (rest_l2 > 0.0f) & (rest_lx * rest_lx * sum_l2 > sum_lx * sum_lx * rest_l2);
      levels[i] = select(better, candidate, levels[i]);
      sum_lx = select(better, rest_lx, sum_lx);
      sum_l2 = select(better, rest_l2, sum_l2);
      changed |= better;
    }
    if (!any(changed)) break;  // a block without a change would see the same sums again
  }
  for (int i = 0; i < kCount; ++i) levels[i] = select(zero, splat(0), levels[i] + nmax);
  return select(zero | ~(sum_l2 > 0.0f), splat(0.0f), sum_lx / sum_l2);
}

// How the asymmetric search tries scales: the i-th guess maps the range onto first + i * step + nmax integers.
struct Guesses {
  float first, step;
  int count;
  bool absolute_error;  // sum w |e| instead of sum w e^2
};

// Asymmetric, integers 0 .. nmax: x ~ scale * level - offset with offset >= 0. Returns the scale. (make_qkx2_quants and
// make_qkx3_quants, which differ only in their guesses.)
template <int kCount>
F search_affine(const F* x, const F* w, int nmax, const Guesses& guesses, I* levels, F* offset) {
  F low = x[0], high = x[0], sum_w = w[0], sum_x = w[0] * x[0];
  for (int i = 1; i < kCount; ++i) {
    low = select(x[i] < low, x[i], low);
    high = select(x[i] > high, x[i], high);
    sum_w += w[i];
    sum_x += w[i] * x[i];
  }
  low = select(low > 0.0f, splat(0.0f), low);
  const I flat = high <= low;

  // The levels of the best guess are not kept but computed again at the end, from its inverse scale and offset.
  const auto level = [&](F inverse, F minimum, int i) {
    return clamp(nearest_int(inverse * (x[i] - minimum)), 0, nmax);
  };
  const auto error_of = [&](F inverse, F minimum, F scale, F new_minimum) {
    F error = splat(0.0f);
    for (int i = 0; i < kCount; ++i) {
      const F e = scale * to_float(level(inverse, minimum, i)) + new_minimum - x[i];
      error += w[i] * (guesses.absolute_error ? abs(e) : e * e);
    }
    return error;
  };

  F minimum = low;
  F best_inverse = (float)nmax / (high - minimum), best_minimum = minimum;
  F scale = 1.0f / best_inverse;
  F best = error_of(best_inverse, minimum, scale, minimum);
  for (int guess = 0; guess <= guesses.count; ++guess) {
    // From the minimum found so far, not from the block's: that is how the model does it.
    const F inverse = (guesses.first + guesses.step * (float)guess + (float)nmax) / (high - minimum);
    F sum_l = splat(0.0f), sum_l2 = splat(0.0f), sum_xl = splat(0.0f);
    for (int i = 0; i < kCount; ++i) {
      const F l = to_float(level(inverse, minimum, i));
      sum_l += w[i] * l;
      sum_l2 += w[i] * l * l;
      sum_xl += w[i] * l * x[i];
    }
    const F determinant = sum_w * sum_l2 - sum_l * sum_l;
    F new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
    F new_minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
    const I above = new_minimum > 0.0f;
    new_minimum = select(above, splat(0.0f), new_minimum);
    new_scale = select(above, sum_xl / sum_l2, new_scale);
    const F error = error_of(inverse, minimum, new_scale, new_minimum);
    const I better = (determinant > 0.0f) & (error < best);
    best = select(better, error, best);
    scale = select(better, new_scale, scale);
    best_inverse = select(better, inverse, best_inverse);
    best_minimum = select(better, minimum, best_minimum);
    minimum = select(better, new_minimum, minimum);
  }
  for (int i = 0; i < kCount; ++i) levels[i] = select(flat, splat(0), level(best_inverse, best_minimum, i));
  *offset = -select(flat, low, minimum);
  return select(flat, splat(0.0f), scale);
}

// Nonnegative x, integers 0 .. nmax, for scales of scales. Returns the scale. (make_qp_quants.)
template <int kCount>
F search_positive(const F* x, const F* w, int nmax, I* levels) {
  F high = splat(0.0f);
  for (int i = 0; i < kCount; ++i) high = max(x[i], high);
  const I zero = high < kTiny;

  const auto upto_nmax = [&](I v) { return select(v > nmax, splat(nmax), v); };
  const auto error_of = [&](F inverse, bool clamped) {
    const F scale = 1.0f / inverse;
    F error = splat(0.0f);
    for (int i = 0; i < kCount; ++i) {
      const I l = nearest_int(inverse * x[i]);
      const F e = x[i] - scale * to_float(clamped ? upto_nmax(l) : l);
      error += w[i] * e * e;
    }
    return error;
  };
  F inverse = (float)nmax / high;
  F best = error_of(inverse, false);
  for (int step = -4; step <= 4; ++step) {
    if (step == 0) continue;
    const F candidate = (0.1f * (float)step + (float)nmax) / high;
    const F error = error_of(candidate, true);
    const I better = error < best;
    best = select(better, error, best);
    inverse = select(better, candidate, inverse);
  }

  F sum_lx = splat(0.0f), sum_l2 = splat(0.0f);
  for (int i = 0; i < kCount; ++i) {
    levels[i] = upto_nmax(nearest_int(inverse * x[i])) & 255;  // the model keeps them in bytes
    const F l = to_float(levels[i]);
    sum_lx += w[i] * x[i] * l;
    sum_l2 += w[i] * l * l;
  }
  for (int sweep = 0; sweep < 5; ++sweep) {
    I changed = splat(0);
    for (int i = 0; i < kCount; ++i) {
      const F l = to_float(levels[i]);
      F rest_lx = sum_lx - w[i] * x[i] * l;
      F rest_l2 = sum_l2 - w[i] * l * l;
      const I candidate = upto_nmax(nearest_int(x[i] * rest_l2 / rest_lx));
      const F c = to_float(candidate);
      const I allowed = (rest_lx > 0.0f) & (rest_l2 > 0.0f) & (candidate != levels[i]);
      rest_lx += w[i] * x[i] * c;
      rest_l2 += w[i] * c * c;
      const I better = allowed & (rest_lx * rest_lx * sum_l2 > sum_lx * sum_lx * rest_l2);
      levels[i] = select(better, candidate & 255, levels[i]);
      sum_lx = select(better, rest_lx, sum_lx);
      sum_l2 = select(better, rest_l2, sum_l2);
      changed |= better;
    }
    if (!any(changed)) break;
  }
  for (int i = 0; i < kCount; ++i) levels[i] = select(zero, splat(0), levels[i]);
  return select(zero | ~(sum_l2 > 0.0f), splat(0.0f), sum_lx / sum_l2);
}

}  // namespace isqtorch::ISQ_ISA
