// Vectors: sixteen numbers for the decoders; for the quantizers one register, with one block per lane.
//
// The order in which a quantizer adds floats decides the bytes, so a block cannot be spread over a vector. But blocks
// do not depend on each other: lane l works on block l, each lane runs the scalar algorithm step by step, and a branch
// becomes a select. The result is the same on every ISA level and equal to scalar code, as long as the compiler
// contracts nothing (-ffp-contract=off). The quantizers use exactly as many lanes as a register has: a wider vector
// would live in memory, and the compiler would load and store its parts at every step.
#pragma once

#include "cpu/prelude.h"

#define ISQ_INLINE ISQ_ALWAYS_INLINE
#define ISQ_INLINE_BODY ISQ_ALWAYS_INLINE_BODY  // after the parameters of a lambda
// Hints of the searches for a GPU's compiler (cuda/kernels/quantize/lanes.cuh), which must inline them and keep their
// arrays in registers: a function to inline, a loop to unroll, a loop not to unroll.
#define ISQ_GPU_INLINE
#define ISQ_GPU_UNROLL
#define ISQ_GPU_ROLLED

namespace isqtorch::ISQ_ISA {

template <int n>
struct Vector {
  typedef float Float ISQ_VECTOR(4 * n);
  typedef int32_t Int ISQ_VECTOR(4 * n);  // also a mask: -1 or 0 per lane
};

constexpr int kLanes = 16;
typedef Vector<kLanes>::Float F;
typedef Vector<kLanes>::Int I;

constexpr int kWidth = ISQ_VECTOR_FLOATS;
typedef Vector<kWidth>::Float LaneFloats;
typedef Vector<kWidth>::Int LaneInts;
typedef double LaneDoubles ISQ_VECTOR(8 * kWidth);

// The vector types with as many lanes as V, and the type of a lane.
template <class V>
struct Like {
  using Float = typename Vector<sizeof(V) / 4>::Float;
  using Int = typename Vector<sizeof(V) / 4>::Int;
  using Scalar = std::decay_t<decltype(V{}[0])>;
};
template <>
struct Like<float> {};
template <>
struct Like<int32_t> {};
template <class V>
using FloatOf = typename Like<V>::Float;
template <class V>
using IntOf = typename Like<V>::Int;
template <class V>
using ScalarOf = typename Like<V>::Scalar;

template <class V>
ISQ_INLINE V splat(ScalarOf<V> v) {
  return v - V{};  // not v + V{}, which would turn -0 into +0
}
ISQ_INLINE F splat(float v) { return splat<F>(v); }
ISQ_INLINE I splat(int32_t v) { return splat<I>(v); }

template <class V>
ISQ_INLINE FloatOf<V> as_float(V bits) {
  return (FloatOf<V>)bits;
}
template <class V>
ISQ_INLINE IntOf<V> as_int(V value) {
  return (IntOf<V>)value;
}
template <class V>
ISQ_INLINE FloatOf<V> to_float(V i) {
  return ISQ_CONVERT(i, FloatOf<V>);
}
template <class V>
ISQ_INLINE IntOf<V> truncate(V f) {
  return ISQ_CONVERT(f, IntOf<V>);
}

template <class V>
ISQ_INLINE LaneDoubles to_double(V v) {
  return ISQ_CONVERT(v, LaneDoubles);
}
ISQ_INLINE LaneFloats to_float(LaneDoubles d) { return ISQ_CONVERT(d, LaneFloats); }
ISQ_INLINE LaneInts truncate(LaneDoubles d) { return ISQ_CONVERT(d, LaneInts); }

// Sixteen bytes as integers: the input of every decoder. store_lanes writes its output, sixteen floats.
ISQ_INLINE I load_bytes(const uint8_t* p) {
  I v;
#if ISQ_VECTOR_FLOATS == 16
  v = (I)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128((const __m128i*)p));
#elif ISQ_VECTOR_FLOATS == 8
  const __m256i halves[2] = {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
                             _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
  std::memcpy(&v, halves, sizeof v);
#elif defined(__aarch64__)
  const uint8x16_t bytes = vld1q_u8(p);
  const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
  const uint32x4_t words[4] = {vmovl_u16(vget_low_u16(low)), vmovl_high_u16(low), vmovl_u16(vget_low_u16(high)),
                               vmovl_high_u16(high)};
  std::memcpy(&v, words, sizeof v);
#else
  for (int l = 0; l < kLanes; ++l) v[l] = p[l];
#endif
  return v;
}
ISQ_INLINE void store_lanes(F v, float* p) { std::memcpy(p, &v, sizeof v); }

template <class M, class V>
ISQ_INLINE V select(M mask, V a, V b) {
  return mask ? a : b;
}
template <class M, class V>
ISQ_INLINE V select(M mask, ScalarOf<V> a, V b) {
  return select(mask, splat<V>(a), b);
}
template <class M, class V>
ISQ_INLINE V select(M mask, V a, ScalarOf<V> b) {
  return select(mask, a, splat<V>(b));
}
template <class V>
ISQ_INLINE V min(V a, V b) {
  return a < b ? a : b;
}
template <class V>
ISQ_INLINE V max(V a, V b) {
  return a > b ? a : b;
}
#if defined(__x86_64__)
// The same with intrinsics: GCC makes two instructions of some of these.
#if ISQ_VECTOR_FLOATS == 16
ISQ_INLINE LaneFloats min(LaneFloats a, LaneFloats b) {
  return (LaneFloats)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
}
ISQ_INLINE LaneFloats max(LaneFloats a, LaneFloats b) {
  return (LaneFloats)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
}
#elif ISQ_VECTOR_FLOATS == 8
ISQ_INLINE LaneFloats min(LaneFloats a, LaneFloats b) { return (LaneFloats)_mm256_min_ps((__m256)a, (__m256)b); }
ISQ_INLINE LaneFloats max(LaneFloats a, LaneFloats b) { return (LaneFloats)_mm256_max_ps((__m256)a, (__m256)b); }
#else
ISQ_INLINE LaneFloats min(LaneFloats a, LaneFloats b) { return (LaneFloats)_mm_min_ps((__m128)a, (__m128)b); }
ISQ_INLINE LaneFloats max(LaneFloats a, LaneFloats b) { return (LaneFloats)_mm_max_ps((__m128)a, (__m128)b); }
#endif
#endif
template <class V>
ISQ_INLINE V clamp(V v, ScalarOf<V> lo, ScalarOf<V> hi) {
  return min(splat<V>(hi), max(splat<V>(lo), v));  // NaN stays NaN
}
template <class V>
ISQ_INLINE V abs(V v) {
  return as_float(as_int(v) & 0x7fffffff);
}
template <class V>
ISQ_INLINE V sqrt(V v) {
#if defined(__aarch64__)
  if constexpr (sizeof v == 16) return (V)vsqrtq_f32((float32x4_t)v);
#endif
  for (size_t l = 0; l < sizeof v / 4; ++l) v[l] = ISQ_SQRT(v[l]);
  return v;
}
// Bit l of the result is lane l of the mask.
template <class M>
ISQ_INLINE uint32_t lane_bits(M mask) {
#if ISQ_VECTOR_FLOATS == 16
  if constexpr (sizeof mask == 64) return _mm512_movepi32_mask((__m512i)mask);
#elif ISQ_VECTOR_FLOATS == 8
  if constexpr (sizeof mask == 32) return _mm256_movemask_ps((__m256)mask);
#elif defined(__aarch64__)
  if constexpr (sizeof mask == 16) return vaddvq_u32(vandq_u32((uint32x4_t)mask, uint32x4_t{1, 2, 4, 8}));
#endif
  uint32_t bits = 0;
  for (size_t l = 0; l < sizeof mask / 4; ++l) bits |= (mask[l] & 1u) << l;
  return bits;
}
template <class M>
ISQ_INLINE bool any(M mask) {
  return lane_bits(mask) != 0;
}

// ggml's rounding: half to even for |f| < 2^22. Larger numbers wrap around instead of saturating. Some searches reach
// such numbers, so the bit trick itself is part of the format.
template <class V>
ISQ_INLINE IntOf<V> nearest_int(V f) {
  const IntOf<V> bits = as_int(f + 12582912.0f);  // 1.5 * 2^23
  return (bits & 0x007fffff) - 0x00400000;
}

// The same number as a float.
template <class V>
ISQ_INLINE V nearest_float(V f) {
  const IntOf<V> bits = as_int(f + 12582912.0f);
  return as_float((bits & 0x007fffff) | 0x4b000000) - 12582912.0f;
}
// The same where |f| < 2^22.
template <class V>
ISQ_INLINE V nearest_small(V f) {
  return (f + 12582912.0f) - 12582912.0f;
}

// Half to even, for every finite f; may lose the sign of a zero.
template <class V>
ISQ_INLINE V round_even(V f) {
  const V two23 = splat<V>(8388608.0f);
  const V magic = as_float(as_int(two23) | (as_int(f) & (int32_t)0x80000000));  // 2^23 with the sign of f
  return select(abs(f) < two23, (f + magic) - magic, f);
}

// C's roundf: half away from zero.
template <class V>
ISQ_INLINE IntOf<V> round_away(V f) {
  const V whole = to_float(truncate(abs(f)));
  const V up = select(abs(f) - whole >= 0.5f, whole + 1.0f, whole);
  return truncate(select(f < 0.0f, -up, up));
}

// The nearest 16-bit number, as a float. NaN stays NaN if its low bits are 0, as in every NaN that the CPU makes.
ISQ_INLINE LaneFloats rounded_to_bf16(LaneFloats f) {
  const LaneInts bits = as_int(f);
  return as_float((bits + 0x7fff + (bits >> 16 & 1)) & (int32_t)0xffff0000);  // a carry into infinity is correct
}
ISQ_INLINE LaneFloats rounded_to_f16(LaneFloats f) {
  const LaneFloats size = abs(f);
  const LaneInts bits = as_int(size);
  const LaneFloats normal = as_float((bits + 0xfff + (bits >> 13 & 1)) & (int32_t)0xffffe000);
  const LaneFloats subnormal = (size + 0.5f) - 0.5f;  // the ulp of 0.5 is 2^-24
  const LaneFloats finite = select(size < 0x1p-14f, subnormal, normal);
  const LaneFloats rounded = select(finite > 65504.0f, ISQ_INFINITY, finite);
  return as_float(as_int(rounded) | (as_int(f) & (int32_t)0x80000000));
}

// The first element of largest magnitude, sign kept; 0 for a block of zeros.
template <class V>
ISQ_INLINE V first_extreme(const V* x, int n) {
  V largest = splat<V>(0.0f), value = splat<V>(0.0f);
  for (int i = 0; i < n; ++i) {
    const V magnitude = abs(x[i]);
    const IntOf<V> better = magnitude > largest;
    largest = select(better, magnitude, largest);
    value = select(better, x[i], value);
  }
  return value;
}

template <class V>
ISQ_INLINE V largest_magnitude(const V* x, int n) {
  V largest = splat<V>(0.0f);
  for (int i = 0; i < n; ++i) largest = max(abs(x[i]), largest);
  return largest;
}

// The smallest and the largest element. Of equal ones the first is taken, which decides the sign of a zero.
template <class V>
ISQ_INLINE void first_min_max(const V* x, int n, V* lo, V* hi) {
  *lo = splat<V>(FLT_MAX);
  *hi = splat<V>(-FLT_MAX);
  for (int i = 0; i < n; ++i) {
    *lo = select(x[i] < *lo, x[i], *lo);
    *hi = select(x[i] > *hi, x[i], *hi);
  }
}

}  // namespace isqtorch::ISQ_ISA
