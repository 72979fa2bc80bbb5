// Roundings with the same results as the CPU's in every bit, in a way that is fast on a GPU.
#pragma once

#include "cuda/kernels/quantize/tile.cuh"

namespace isqtorch::cuda {

// The 16 bits of a number, and their value.
struct Half {
  uint16_t bits;
  LaneFloats value;
  bool overflow;  // infinite, or NaN from a search whose sums overflowed
};
ISQ_DEVICE Half to_f16(LaneFloats f) {
  const uint16_t bits = f32_to_f16(f.v);
  return {bits, f16_to_f32(bits), (bits & 0x7fff) >= 0x7c00};
}
ISQ_DEVICE Half to_bf16(LaneFloats f) {
  const uint16_t bits = f32_to_bf16(f.v);
  return {bits, bf16_to_f32(bits), (bits & 0x7fff) >= 0x7f80};
}

// 1 / d, or 0 where that is not finite.
ISQ_DEVICE LaneFloats reciprocal_or_zero(LaneFloats d) {
  const LaneFloats inverse = 1.0f / d;
  return select(abs(inverse) <= FLT_MAX, inverse, 0.0f);
}

// each(i, (x[i] + add) / d) for every i; no |x| exceeds `largest`.
//
// A full division takes a reciprocal, some ten steps, and a check whether these were exact. If the reciprocal is known,
// two corrections by the remainder give the nearest quotient (Markstein), as long as no intermediate number leaves the
// normal range. That holds for divisors that are neither huge nor tiny. Then only a quotient below 2^-40 may lose its
// last bits, and a zero its sign; callers round quotients to integers and notice neither.
template <int kOwn, class Each>
ISQ_DEVICE void for_quotients(const LaneFloats (&x)[kOwn], LaneFloats largest, LaneFloats add, LaneFloats d,
                              const Each& each) {
  const float size = abs(d).v;
  if (size > 0x1p-60f && size < 0x1p60f && (largest + abs(add)).v < 0x1p60f) {
    const float inverse = 1.0f / d.v;
    ISQ_GPU_UNROLL for (int i = 0; i < kOwn; ++i) {
      const float a = x[i].v + add.v;
      float q = a * inverse;
      q = ::fmaf(::fmaf(-d.v, q, a), inverse, q);
      each(i, LaneFloats(::fmaf(::fmaf(-d.v, q, a), inverse, q)));
    }
  } else {
    ISQ_GPU_UNROLL for (int i = 0; i < kOwn; ++i) each(i, (x[i] + add) / d);
  }
}

// Half away from zero, for |f| < 2^22: first half to even, then corrected. A conversion would be slow on a GPU.
ISQ_DEVICE LaneInts small_round_away(LaneFloats f) {
  const LaneFloats even = nearest_small(abs(f)), up = select(abs(f) - even >= 0.5f, even + 1.0f, even);
  return nearest_int(select(f < 0.0f, -up, up));
}

// Half to even, clamped to the range of codes, as an integer. NaN gives some code; such blocks are reported.
ISQ_DEVICE LaneInts nearest_code(LaneFloats f, float nmax) {
  return as_int(::fminf(::fmaxf(f.v, 0.0f), nmax) + 12582912.0f) & 255;
}

}  // namespace isqtorch::cuda
