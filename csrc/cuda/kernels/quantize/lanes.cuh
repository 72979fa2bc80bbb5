// The lanes of searches/contract.h for a GPU: a vector has one lane, a thread. So the searches are written once and
// give the same bytes as on a CPU.
//
// A number is a struct and not a plain float, so that masks can be integers (-1 or 0) as on the CPU. Minimum, maximum
// and comparisons are C++ expressions and not the GPU's own instructions, which differ for NaN and for zeros of both
// signs.
#pragma once

#include <cfloat>
#include <type_traits>
#include <utility>

#include "cuda/gpu.h"

#define ISQ_ISA one_lane
#define ISQ_INLINE ISQ_DEVICE
#define ISQ_GPU_INLINE ISQ_DEVICE
#if defined(__CUDACC__)
#define ISQ_GPU_UNROLL _Pragma("unroll")
#define ISQ_GPU_ROLLED _Pragma("unroll 1")
#else
#define ISQ_GPU_UNROLL
#define ISQ_GPU_ROLLED
#endif

namespace isqtorch::one_lane {

using gpu::f16_to_f32;
using gpu::f32_to_f16;

constexpr int kWidth = 1;

struct LaneInts {
  int32_t v;
  LaneInts() = default;
  ISQ_DEVICE constexpr LaneInts(int32_t value) : v(value) {}
};
struct LaneFloats {
  float v;
  LaneFloats() = default;
  ISQ_DEVICE constexpr LaneFloats(float value) : v(value) {}
};

struct LaneDoubles {
  double v;
  LaneDoubles() = default;
  ISQ_DEVICE constexpr LaneDoubles(double value) : v(value) {}
};

template <class V>
struct Like;
template <>
struct Like<LaneFloats> {
  using Float = LaneFloats;
  using Int = LaneInts;
  using Scalar = float;
};
template <>
struct Like<LaneInts> {
  using Float = LaneFloats;
  using Int = LaneInts;
  using Scalar = int32_t;
};
template <class V>
using FloatOf = typename Like<V>::Float;
template <class V>
using IntOf = typename Like<V>::Int;
template <class V>
using ScalarOf = typename Like<V>::Scalar;

#define ISQ_LANE_OPERATOR(Type, op, Result) \
  ISQ_DEVICE Result operator op(Type a, Type b) { return Result(a.v op b.v); }
#define ISQ_LANE_COMPARISON(Type, op) \
  ISQ_DEVICE LaneInts operator op(Type a, Type b) { return LaneInts(a.v op b.v ? -1 : 0); }
ISQ_LANE_OPERATOR(LaneFloats, +, LaneFloats)
ISQ_LANE_OPERATOR(LaneFloats, -, LaneFloats)
ISQ_LANE_OPERATOR(LaneFloats, *, LaneFloats)
ISQ_LANE_OPERATOR(LaneFloats, /, LaneFloats)
ISQ_LANE_OPERATOR(LaneDoubles, +, LaneDoubles)
ISQ_LANE_OPERATOR(LaneDoubles, -, LaneDoubles)
ISQ_LANE_OPERATOR(LaneDoubles, *, LaneDoubles)
ISQ_LANE_OPERATOR(LaneDoubles, /, LaneDoubles)
ISQ_LANE_OPERATOR(LaneInts, +, LaneInts)
ISQ_LANE_OPERATOR(LaneInts, -, LaneInts)
ISQ_LANE_OPERATOR(LaneInts, *, LaneInts)
ISQ_LANE_OPERATOR(LaneInts, &, LaneInts)
ISQ_LANE_OPERATOR(LaneInts, |, LaneInts)
ISQ_LANE_COMPARISON(LaneFloats, <)
ISQ_LANE_COMPARISON(LaneFloats, >)
ISQ_LANE_COMPARISON(LaneFloats, <=)
ISQ_LANE_COMPARISON(LaneFloats, >=)
ISQ_LANE_COMPARISON(LaneFloats, ==)
ISQ_LANE_COMPARISON(LaneFloats, !=)
ISQ_LANE_COMPARISON(LaneInts, <)
ISQ_LANE_COMPARISON(LaneInts, >)
ISQ_LANE_COMPARISON(LaneInts, ==)
ISQ_LANE_COMPARISON(LaneInts, !=)
#undef ISQ_LANE_OPERATOR
#undef ISQ_LANE_COMPARISON
ISQ_DEVICE LaneFloats operator-(LaneFloats a) { return -a.v; }
ISQ_DEVICE LaneInts operator~(LaneInts a) { return ~a.v; }
ISQ_DEVICE LaneInts operator<<(LaneInts a, int by) { return (int32_t)((uint32_t)a.v << by); }
ISQ_DEVICE LaneInts operator>>(LaneInts a, int by) { return a.v >> by; }
ISQ_DEVICE LaneFloats& operator+=(LaneFloats& a, LaneFloats b) { return a = a + b; }
ISQ_DEVICE LaneInts& operator|=(LaneInts& a, LaneInts b) { return a = a | b; }

template <class V>
ISQ_DEVICE V splat(ScalarOf<V> v) {
  return v;
}
ISQ_DEVICE LaneFloats as_float(LaneInts bits) { return __int_as_float(bits.v); }
ISQ_DEVICE LaneInts as_int(LaneFloats value) { return __float_as_int(value.v); }
ISQ_DEVICE LaneFloats to_float(LaneInts i) { return (float)i.v; }
ISQ_DEVICE LaneFloats to_float(LaneDoubles d) { return (float)d.v; }
ISQ_DEVICE LaneDoubles to_double(LaneFloats f) { return (double)f.v; }
ISQ_DEVICE LaneDoubles to_double(LaneInts i) { return (double)i.v; }
ISQ_DEVICE LaneInts truncate(LaneDoubles d) { return (int32_t)d.v; }
// Outside the range of int32 the result differs by machine.
ISQ_DEVICE LaneInts truncate(LaneFloats f) {
#if defined(__CUDACC__)
  return (int32_t)f.v;
#else
  return f.v > -0x1p31f && f.v < 0x1p31f ? (int32_t)f.v : 0;
#endif
}
ISQ_DEVICE LaneFloats select(LaneInts mask, LaneFloats a, LaneFloats b) { return mask.v ? a : b; }
ISQ_DEVICE LaneInts select(LaneInts mask, LaneInts a, LaneInts b) { return mask.v ? a : b; }
ISQ_DEVICE bool any(LaneInts mask) { return mask.v != 0; }
ISQ_DEVICE LaneFloats min(LaneFloats a, LaneFloats b) { return select(a < b, a, b); }
ISQ_DEVICE LaneFloats max(LaneFloats a, LaneFloats b) { return select(a > b, a, b); }
ISQ_DEVICE LaneInts min(LaneInts a, LaneInts b) { return select(a < b, a, b); }
ISQ_DEVICE LaneInts max(LaneInts a, LaneInts b) { return select(a > b, a, b); }
// With the GPU's minimum and maximum that propagate NaN. A zero may get another sign than on the CPU, but no sum and no
// code depends on that.
ISQ_DEVICE LaneFloats clamp(LaneFloats v, float lo, float hi) { return gpu::min_or_nan(gpu::max_or_nan(v.v, lo), hi); }
ISQ_DEVICE LaneInts clamp(LaneInts v, int32_t lo, int32_t hi) { return min(hi, max(lo, v)); }
ISQ_DEVICE LaneFloats abs(LaneFloats v) { return as_float(as_int(v) & 0x7fffffff); }
ISQ_DEVICE LaneFloats sqrt(LaneFloats v) { return ::sqrtf(v.v); }

// The CPU's bit arithmetic turns its own NaN, whose low bits are 0, into 0. A GPU's NaN has all bits set.
ISQ_DEVICE LaneFloats zero_for_nan(LaneFloats f) { return select(f == f, f, 0.0f); }
ISQ_DEVICE LaneInts nearest_int(LaneFloats f) {
  return (as_int(zero_for_nan(f) + 12582912.0f) & 0x007fffff) - 0x00400000;
}
ISQ_DEVICE LaneFloats nearest_float(LaneFloats f) {
  return as_float((as_int(zero_for_nan(f) + 12582912.0f) & 0x007fffff) | 0x4b000000) - 12582912.0f;
}
ISQ_DEVICE LaneFloats nearest_small(LaneFloats f) { return (f + 12582912.0f) - 12582912.0f; }
ISQ_DEVICE LaneFloats round_even(LaneFloats f) {
  const LaneFloats magic = as_float(LaneInts(0x4b000000) | (as_int(f) & (int32_t)0x80000000));
  return select(abs(f) < 8388608.0f, (f + magic) - magic, f);
}

// The nearest 16-bit number, as a float. Not by the bit arithmetic of the CPU, which would turn this NaN into -0.
ISQ_DEVICE LaneFloats rounded_to_f16(LaneFloats f) { return f16_to_f32(f32_to_f16(f.v)); }
ISQ_DEVICE LaneFloats rounded_to_bf16(LaneFloats f) { return gpu::bf16_to_f32(gpu::f32_to_bf16(f.v)); }

template <int kCount>
ISQ_DEVICE LaneFloats first_extreme(const LaneFloats (&x)[kCount]) {
  LaneFloats largest = 0.0f, value = 0.0f;
  ISQ_GPU_UNROLL for (int i = 0; i < kCount; ++i) {
    const LaneInts better = abs(x[i]) > largest;
    largest = select(better, abs(x[i]), largest);
    value = select(better, x[i], value);
  }
  return value;
}

template <int kCount>
ISQ_DEVICE void first_min_max(const LaneFloats (&x)[kCount], LaneFloats* lo, LaneFloats* hi) {
  *lo = FLT_MAX;
  *hi = -FLT_MAX;
  ISQ_GPU_UNROLL for (int i = 0; i < kCount; ++i) {
    *lo = select(x[i] < *lo, x[i], *lo);
    *hi = select(x[i] > *hi, x[i], *hi);
  }
}

}  // namespace isqtorch::one_lane
