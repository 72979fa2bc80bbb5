// Dot products of one decoded weight row with up to eight activation rows, in f32: the compute half of `linear` for few
// rows. The decoded weights stay in the first-level cache and every one of them is used for all activation rows.
#pragma once

#include "cpu/lanes.h"

namespace isqtorch::ISQ_ISA {

// The level's native vector of floats. Contraction is off for the quantizers' sake, so a fused multiply-add is asked
// for by name.
#if ISQ_VECTOR_FLOATS == 16
typedef __m512 V;
ISQ_INLINE V load_vector(const float* p) { return _mm512_loadu_ps(p); }
ISQ_INLINE V multiply_add(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
#elif ISQ_VECTOR_FLOATS == 8
typedef __m256 V;
ISQ_INLINE V load_vector(const float* p) { return _mm256_loadu_ps(p); }
ISQ_INLINE V multiply_add(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
#else
typedef float V __attribute__((vector_size(16)));
ISQ_INLINE V load_vector(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
ISQ_INLINE V multiply_add(V a, V b, V c) { return a * b + c; }
#endif

ISQ_INLINE float sum(V v) {
  float s = 0;
  for (int l = 0; l < ISQ_VECTOR_FLOATS; ++l) s += v[l];
  return s;
}

template <int kRows>
void dot_block(const float* w, const float* x, int64_t ldx, int64_t k, float* y) {
  // Enough sums in flight to hide the latency of the multiply-add.
  constexpr int kChains = kRows >= 4 ? 1 : 4 / kRows, kStep = kChains * ISQ_VECTOR_FLOATS;
  V acc[kRows][kChains] = {};
  int64_t i = 0;
  for (; i + kStep <= k; i += kStep) {
    for (int c = 0; c < kChains; ++c) {
      const int64_t at = i + c * ISQ_VECTOR_FLOATS;
      const V weights = load_vector(w + at);
      for (int m = 0; m < kRows; ++m) acc[m][c] = multiply_add(weights, load_vector(x + m * ldx + at), acc[m][c]);
    }
  }
  for (; i < k; i += ISQ_VECTOR_FLOATS) {  // k is a multiple of 32
    const V weights = load_vector(w + i);
    for (int m = 0; m < kRows; ++m) acc[m][0] = multiply_add(weights, load_vector(x + m * ldx + i), acc[m][0]);
  }
  for (int m = 0; m < kRows; ++m) {
    for (int c = 0; c < kChains; ++c) y[m] += sum(acc[m][c]);
  }
}

void dot_rows(const float* w, const float* x, int64_t ldx, int rows, int64_t k, float* y) {
  constexpr decltype(&dot_block<1>) kByRows[kMaxDotRows] = {dot_block<1>, dot_block<2>, dot_block<3>, dot_block<4>,
                                                            dot_block<5>, dot_block<6>, dot_block<7>, dot_block<8>};
  kByRows[rows - 1](w, x, ldx, k, y);
}

}  // namespace isqtorch::ISQ_ISA
