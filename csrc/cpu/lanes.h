// Sixteen blocks side by side: the vector type all quantizers are written in.
//
// A quantizer's inner loops add up floats in an order that decides the bytes, so a block cannot be spread over a
// vector. But blocks do not depend on each other: lane l works on block l, each lane runs the scalar algorithm step by
// step, and a branch becomes a select. The result is the same on every ISA level and equal to scalar code, as long as
// nothing is contracted
// (-ffp-contract=off). The compiler maps the 64-byte vector onto whatever registers the level has.
#pragma once

#include "cpu/isa/prelude.h"

#define ISQ_INLINE inline __attribute__((always_inline))

namespace isqtorch::ISQ_ISA {

constexpr int kLanes = 16;
typedef float F __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));  // also a mask: -1 or 0 per lane

ISQ_INLINE F splat(float v) { return v - F{}; }  // not v + 0: that would lose the sign of -0
ISQ_INLINE I splat(int32_t v) { return v + I{}; }

ISQ_INLINE F as_float(I bits) { return (F)bits; }
ISQ_INLINE I as_int(F value) { return (I)value; }
ISQ_INLINE F to_float(I i) { return __builtin_convertvector(i, F); }
ISQ_INLINE I truncate(F f) { return __builtin_convertvector(f, I); }

// Sixteen bytes as integers, and sixteen floats to memory: the two ends of every decoder.
ISQ_INLINE I load_bytes(const uint8_t* p) {
  I v;
#if ISQ_VECTOR_FLOATS == 16
  v = (I)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128((const __m128i*)p));
#elif ISQ_VECTOR_FLOATS == 8
  const __m256i halves[2] = {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
                             _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
  std::memcpy(&v, halves, sizeof v);
#else
  for (int l = 0; l < kLanes; ++l) v[l] = p[l];
#endif
  return v;
}
ISQ_INLINE void store_lanes(F v, float* p) { std::memcpy(p, &v, sizeof v); }

ISQ_INLINE F select(I mask, F a, F b) { return mask ? a : b; }
ISQ_INLINE I select(I mask, I a, I b) { return mask ? a : b; }
ISQ_INLINE F min(F a, F b) { return a < b ? a : b; }
ISQ_INLINE F max(F a, F b) { return a > b ? a : b; }
ISQ_INLINE I clamp(I v, int lo, int hi) {
  v = v < lo ? splat(lo) : v;
  return v > hi ? splat(hi) : v;
}
ISQ_INLINE F clamp(F v, float lo, float hi) {
  v = v < lo ? splat(lo) : v;
  return v > hi ? splat(hi) : v;
}
ISQ_INLINE F abs(F v) { return as_float(as_int(v) & 0x7fffffff); }
ISQ_INLINE F sqrt(F v) {
  for (int l = 0; l < kLanes; ++l) v[l] = __builtin_sqrtf(v[l]);
  return v;
}
ISQ_INLINE bool any(I mask) {
  int32_t seen = 0;
  for (int l = 0; l < kLanes; ++l) seen |= mask[l];
  return seen != 0;
}

// ggml's rounding: half to even for |f| < 2^22. Beyond that it wraps around instead of saturating, and some searches do
// go there, so the bit trick itself is part of the format.
ISQ_INLINE I nearest_int(F f) {
  const I bits = as_int(f + 12582912.0f);  // 1.5 * 2^23
  return (bits & 0x007fffff) - 0x00400000;
}

// Half to even, for every finite f; may lose the sign of a zero.
ISQ_INLINE F round_even(F f) {
  const F two23 = splat(8388608.0f);
  const F magic = as_float(as_int(two23) | (as_int(f) & (int32_t)0x80000000));  // 2^23 with the sign of f
  return select(abs(f) < two23, (f + magic) - magic, f);
}

// C's roundf: half away from zero.
ISQ_INLINE I round_away(F f) {
  const F whole = to_float(truncate(abs(f)));
  const F up = whole + select(abs(f) - whole >= 0.5f, splat(1.0f), splat(0.0f));
  return truncate(select(f < 0.0f, -up, up));
}

// The first element of largest magnitude, sign kept; 0 for a block of zeros.
ISQ_INLINE F first_extreme(const F* x, int n) {
  F largest = splat(0.0f), value = splat(0.0f);
  for (int i = 0; i < n; ++i) {
    const F magnitude = abs(x[i]);
    const I better = magnitude > largest;
    largest = select(better, magnitude, largest);
    value = select(better, x[i], value);
  }
  return value;
}

ISQ_INLINE F largest_magnitude(const F* x, int n) {
  F largest = splat(0.0f);
  for (int i = 0; i < n; ++i) largest = max(abs(x[i]), largest);
  return largest;
}

// The first smallest and the first largest element: ties keep the earlier one, which decides the sign of a zero.
ISQ_INLINE void first_min_max(const F* x, int n, F* lo, F* hi) {
  *lo = splat(FLT_MAX);
  *hi = splat(-FLT_MAX);
  for (int i = 0; i < n; ++i) {
    *lo = select(x[i] < *lo, x[i], *lo);
    *hi = select(x[i] > *hi, x[i], *hi);
  }
}

}  // namespace isqtorch::ISQ_ISA
