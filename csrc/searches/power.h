// x to the power p, with the same bits on every machine; powf differs between C libraries and GPUs. It consists of
// additions, multiplications and one division in double, which IEEE 754 defines exactly. The result is the nearest
// float in all but one of ten thousand cases.
#pragma once

#include "searches/contract.h"

namespace isqtorch::ISQ_ISA {

// For normal x > 0 and results in the normal range. Computes 2^(p log2 x), with the artanh series for the logarithm and
// the exponential series. Both are added in pairs of pairs, so that not every addition waits for the one before.
ISQ_INLINE LaneFloats power(LaneFloats x, float p) {
  const LaneInts bits = as_int(x), exponent = (bits - 0x3f3504f3) >> 23;   // x = m 2^exponent,
  const LaneDoubles m = to_double(as_float(bits - exponent * (1 << 23)));  // m from sqrt(1/2) to sqrt(2)
  const LaneDoubles s = (m - 1.0) / (m + 1.0), s2 = s * s, s4 = s2 * s2;
  const LaneDoubles series =
      (1.0 + 1.0 / 3.0 * s2) + (1.0 / 5.0 + 1.0 / 7.0 * s2) * s4 + (1.0 / 9.0 + 1.0 / 11.0 * s2) * (s4 * s4);
  constexpr double kLog2 = 0.693147180559945309417, kNearest = 6755399441055744.0;  // 1.5 * 2^52
  const LaneDoubles y = (double)p * (to_double(exponent) + 2.0 / kLog2 * s * series);

  const LaneDoubles whole = (y + kNearest) - kNearest, t = (y - whole) * kLog2, t2 = t * t, t4 = t2 * t2;
  const LaneDoubles low = (1.0 + t) + (1.0 / 2.0 + 1.0 / 6.0 * t) * t2;
  const LaneDoubles middle = (1.0 / 24.0 + 1.0 / 120.0 * t) + (1.0 / 720.0 + 1.0 / 5040.0 * t) * t2;
  const LaneDoubles e = (low + middle * t4) + (1.0 / 40320.0 + 1.0 / 362880.0 * t) * (t4 * t4);
  return to_float(e * to_double(as_float((truncate(whole) + 127) * (1 << 23))));
}

}  // namespace isqtorch::ISQ_ISA
