// The coordinate descent (searches/descent.h) for many blocks: first for those that stay where they start, then for the
// others.
#pragma once

#include "cpu/lanes.h"
#include "searches/descent.h"

namespace isqtorch::ISQ_ISA {

// The descent of kBlocks vectors of blocks. Four blocks of five stay where they start. The others take different
// numbers of sweeps, and in a sweep every step waits for the one before. So these blocks are first gathered into full
// vectors.
template <int kCount, int kBlocks>
ISQ_NOINLINE void descend_symmetric(const LaneFloats* x, int nmax, LaneFloats* levels, LaneFloats* scales) {
  using T = Twin<Twin<LaneFloats>>;
  constexpr int kSide = sizeof(T) / sizeof(LaneFloats), kDense = kSide * kWidth;
  struct Place {
    uint8_t block, lane;
  };
  Place restless[kBlocks * kWidth];
  int found = 0;
  for (int b = 0; b < kBlocks; ++b) {
    Descent<LaneFloats, kCount> descent(x + kCount * b, nmax, levels + kCount * b);
    for (uint32_t bits = lane_bits(descent.restless()); bits; bits &= bits - 1) {
      restless[found++] = {(uint8_t)b, (uint8_t)ISQ_TRAILING_ZEROS(bits)};
    }
    scales[b] = descent.finish();
  }
  for (int first = 0; first < found; first += kDense) {
    const int count = found - first < kDense ? found - first : kDense;
    LaneFloats dense_x[kSide * kCount] = {}, dense_levels[kSide * kCount], dense_scales[kSide];
    for (int n = 0; n < count; ++n) {
      const Place p = restless[first + n];
      for (int i = 0; i < kCount; ++i) dense_x[n / kWidth * kCount + i][n % kWidth] = x[p.block * kCount + i][p.lane];
    }
    Descent<T, kCount> descent(dense_x, nmax, dense_levels);
    descent.run();
    put<1>(dense_scales, 0, descent.finish());
    for (int n = 0; n < count; ++n) {
      const Place p = restless[first + n];
      for (int i = 0; i < kCount; ++i) {
        levels[p.block * kCount + i][p.lane] = dense_levels[n / kWidth * kCount + i][n % kWidth];
      }
      scales[p.block][p.lane] = dense_scales[n / kWidth][n % kWidth];
    }
  }
}

}  // namespace isqtorch::ISQ_ISA
