// The errors of a panel of rows, and what they carry to other columns.
//
// Rows lie in the lanes: a panel consists of strips of kStripRows rows, and errors and sums of a strip are [column][row
// of the strip]. Every sum is added in the order of columns, one rounding for the product and one for the sum. So the
// result does not depend on threads, panels or ISA level.
#pragma once

#include "cpu/quantize/curvature.h"

namespace isqtorch::ISQ_ISA {

#if ISQ_VECTOR_FLOATS == 16 || defined(__aarch64__)  // 32 registers
constexpr int kStripUnits = 4;
#else
constexpr int kStripUnits = 2;
#endif
constexpr int kStripRows = kStripUnits * kWidth;
constexpr int kTileColumns = 4;   // with kStripUnits, as many sums as fit into registers
constexpr int kTileDepth = 64;    // earlier columns at a time: errors of a strip stay in the first-level cache
constexpr int kRowsAtOnce = 256;  // sums of a slab, and a tile of the factor, stay in the second-level cache
static_assert(kRowsAtOnce % kStripRows == 0);

// The state of a thread: errors and sums of a panel of rows.
struct FeedbackPanel {
  const FeedbackJob& job;
  const int64_t most_strips;
  int64_t first_row = 0, strips = 0;
  Owned<LaneFloats> errors, sums;  // [strip][column][kStripUnits]: of all columns, and of a slab
  Owned<float> tile;               // of the factor: [kTileDepth][kTileStride]

  FeedbackPanel(const FeedbackJob& j, int64_t most)
      : job(j),
        most_strips(most),
        errors(most * j.k * kStripUnits),
        sums(most * kSlabColumns * kStripUnits),
        tile(kTileStride * kTileDepth) {}

  LaneFloats* errors_of(int64_t strip, int64_t column) const {
    return errors.at + (strip * job.k + column) * kStripUnits;
  }
  LaneFloats* sums_of(int64_t strip, int64_t column) const {
    return sums.at + (strip * kSlabColumns + column % kSlabColumns) * kStripUnits;
  }
  // The part of the factor's row `from` that begins at column `to`.
  const float* factor(int64_t from, int64_t to) const { return job.factor + from * job.k + to; }

  void clear_sums() { std::memset((void*)sums.at, 0, strips * kSlabColumns * kStripUnits * sizeof(LaneFloats)); }

  // Adds to the sums of columns [to, to + count) the errors of columns [from, until), in `number` strips from `first`
  // on.
  ISQ_NOINLINE void carry(int64_t from, int64_t until, int64_t to, int64_t count, int64_t first, int64_t number) {
    for (int64_t begin = from; begin < until; begin += kTileDepth) {
      const int64_t depth = until - begin < kTileDepth ? until - begin : kTileDepth;
      for (int64_t k = 0; k < depth; ++k) {
        std::memcpy(tile.at + k * kTileStride, factor(begin + k, to), count * sizeof(float));
      }
      for (int64_t strip = first; strip < first + number; ++strip) {
        for (int64_t c = 0; c < count; c += kTileColumns) {
          add_products(errors_of(strip, begin), tile.at + c, depth, sums_of(strip, to + c));
        }
      }
    }
  }

  // sums[c][u] += errors[k][u] * factor[k][c], for k < depth in this order. Rows of `factor` are kTileStride apart.
  static void add_products(const LaneFloats* errors, const float* factor, int64_t depth, LaneFloats* sums) {
    LaneFloats held[kTileColumns][kStripUnits];
    ISQ_UNROLL_BY(4)
    for (int c = 0; c < kTileColumns; ++c) {
      ISQ_UNROLL_BY(4)
      for (int u = 0; u < kStripUnits; ++u) held[c][u] = sums[c * kStripUnits + u];
    }
    for (int64_t k = 0; k < depth; ++k) {
      LaneFloats error[kStripUnits];
      ISQ_UNROLL_BY(4)
      for (int u = 0; u < kStripUnits; ++u) error[u] = errors[k * kStripUnits + u];
      ISQ_UNROLL_BY(4)
      for (int c = 0; c < kTileColumns; ++c) {
        const LaneFloats weight = splat<LaneFloats>(factor[k * kTileStride + c]);
        ISQ_UNROLL_BY(4)
        for (int u = 0; u < kStripUnits; ++u) held[c][u] += error[u] * weight;
      }
    }
    ISQ_UNROLL_BY(4)
    for (int c = 0; c < kTileColumns; ++c) {
      ISQ_UNROLL_BY(4)
      for (int u = 0; u < kStripUnits; ++u) sums[c * kStripUnits + u] = held[c][u];
    }
  }
};

}  // namespace isqtorch::ISQ_ISA
