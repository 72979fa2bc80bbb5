// x to the power p, with the same bits on every machine: a C library's own powf is one thing here and another there,
// and on a GPU a third. Additions, multiplications and one division in double, which IEEE 754 defines to the last bit;
// the result is the nearest float but for one in some million.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ISQ_ANYWHERE __host__ __device__ __forceinline__
#else
#define ISQ_ANYWHERE inline __attribute__((always_inline))
#endif

namespace isqtorch {

// For normal x > 0 and results in the normal range. 2^(p log2 x), with log from the series of artanh and exp from its
// own.
ISQ_ANYWHERE float power(float x, float p) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;  // x = m 2^exponent, m from sqrt(1/2) to sqrt(2)
  bits -= exponent * (1 << 23);
  float m;
  std::memcpy(&m, &bits, 4);

  const double s = ((double)m - 1.0) / ((double)m + 1.0), s2 = s * s;
  double series = 1.0 / 15.0;
  series = series * s2 + 1.0 / 13.0;
  series = series * s2 + 1.0 / 11.0;
  series = series * s2 + 1.0 / 9.0;
  series = series * s2 + 1.0 / 7.0;
  series = series * s2 + 1.0 / 5.0;
  series = series * s2 + 1.0 / 3.0;
  series = series * s2 + 1.0;
  constexpr double kLog2 = 0.693147180559945309417, kNearest = 6755399441055744.0;  // 1.5 * 2^52
  const double log2x = (double)exponent + 2.0 / kLog2 * s * series;

  const double y = (double)p * log2x, whole = (y + kNearest) - kNearest, t = (y - whole) * kLog2;
  double e = 1.0 / 39916800.0;  // 1 / 11!
  e = e * t + 1.0 / 3628800.0;
  e = e * t + 1.0 / 362880.0;
  e = e * t + 1.0 / 40320.0;
  e = e * t + 1.0 / 5040.0;
  e = e * t + 1.0 / 720.0;
  e = e * t + 1.0 / 120.0;
  e = e * t + 1.0 / 24.0;
  e = e * t + 1.0 / 6.0;
  e = e * t + 0.5;
  e = e * t + 1.0;
  e = e * t + 1.0;
  const int64_t scale_bits = ((int64_t)whole + 1023) << 52;
  double scale;
  std::memcpy(&scale, &scale_bits, 8);
  return (float)(e * scale);
}

}  // namespace isqtorch
