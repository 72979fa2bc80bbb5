// What errors of neighbouring columns cost, and the order in which the columns of a block are rounded.
// isqtorch/quantizers/curvature.py explains both; the numbers are the same.
#pragma once

#include "cpu/quantize/blockwise.h"

namespace isqtorch::ISQ_ISA {

constexpr int kSlabColumns = 256;               // a multiple of every block
constexpr int kTileStride = kSlabColumns + 16;  // no power of two, which would put all rows into one set of a cache

// An array that is freed with its owner.
template <class T>
struct Owned {
  T* const at;
  explicit Owned(int64_t count) : at(new T[count]) {}
  ~Owned() { delete[] at; }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
};

// row[j] += a * x[j] for j in [from, until), and perhaps for the others of the first and last vector.
ISQ_INLINE void add_scaled(float a, const float* x, int from, int until, float* row) {
  for (int j = from / kWidth * kWidth; j < until; j += kWidth) {
    LaneFloats here, there;
    std::memcpy(&here, x + j, sizeof here);
    std::memcpy(&there, row + j, sizeof there);
    there += a * here;
    std::memcpy(row + j, &there, sizeof there);
  }
}

// c[i][j] = sum of V[i][k] * d[k] * V[j][k] over k, for `size` columns from `first` on. c is [size][size].
inline void curvature(const FeedbackJob& job, int64_t first, int size, float* c) {
  std::memset(c, 0, size * size * sizeof(float));
  alignas(64) float column[kSlabColumns] = {};
  for (int k = 0; k < size; ++k) {
    for (int i = 0; i < k; ++i) column[i] = job.factor[(first + i) * job.k + first + k];
    column[k] = 1;
    const float d = job.factor[(first + k) * job.k + first + k];
    for (int i = 0; i <= k; ++i) add_scaled(column[i] * d, column, i, k + 1, c + i * size);
  }
  for (int i = 0; i < size; ++i) {
    for (int j = 0; j < i; ++j) c[i * size + j] = c[j * size + i];
  }
}

// Chooses the order in which `size` columns are rounded, and factorizes c in this order: v is [size][size], of which
// the part above the diagonal is defined. Returns whether c is positive definite in f32. Overwrites c.
inline bool best_order(float* c, int size, int32_t* order, float* v) {
  alignas(64) float row[kSlabColumns];
  bool left[kSlabColumns];
  const Owned<float> columns(size * size);  // of V, with rows in the order of c
  for (int i = 0; i < size; ++i) left[i] = true;
  int position = size - 1;
  for (; position >= 0; --position) {
    int picked = -1;
    bool good = true;
    for (int i = 0; i < size; ++i) {
      if (!left[i]) continue;
      const float diagonal = c[i * size + i];
      good &= diagonal > 0 && diagonal <= FLT_MAX;
      if (picked < 0 || diagonal < c[picked * size + picked]) picked = i;
    }
    if (!good) break;
    order[position] = picked;
    left[picked] = false;
    std::memcpy(row, c + picked * size, size * sizeof(float));
    const float pivot = row[picked];
    for (int i = 0; i < size; ++i) {
      const float part = left[i] ? c[i * size + picked] / pivot : 0;
      columns.at[i * size + position] = part;
      if (left[i]) add_scaled(-part, row, 0, size, c + i * size);
    }
  }
  for (int i = 0; position < 0 && i < size; ++i) {
    std::memcpy(v + i * size, columns.at + order[i] * size, size * sizeof(float));
  }
  return position < 0;
}

// What the strips need of the factor besides itself.
struct FeedbackPlan {
  const int64_t k;
  const int block;
  Owned<int32_t> order;    // [k]: which column of its block is rounded at a position
  Owned<float> turned;     // [k][block]: V of each block, in this order
  Owned<float> couplings;  // [slabs][kSlabColumns][kTileStride]: u[i][j] = c[i][j] / c[j][j], and 0 on the diagonal
  Owned<bool> swept;       // [slabs]: whether codes are chosen again, because the couplings are finite

  FeedbackPlan(const FeedbackJob& job, int format_block)
      : k(job.k),
        block(format_block),
        order(k),
        turned(k * block),
        couplings(slabs() * kSlabColumns * kTileStride),
        swept(slabs()) {
    for_range(job, slabs(), 1, [&](int64_t begin, int64_t end) {
      const Owned<float> c(kSlabColumns * kSlabColumns);
      for (int64_t slab = begin; slab < end; ++slab) {
        couple(job, slab, c.at);
        const int64_t first = slab * kSlabColumns;
        for (int64_t column = first; column < first + columns_of(slab); column += block) {
          if (block < kSlabColumns) curvature(job, column, block, c.at);
          arrange(job, column, c.at);
        }
      }
    });
  }

  int64_t slabs() const { return (k + kSlabColumns - 1) / kSlabColumns; }
  int columns_of(int64_t slab) const {
    const int64_t left = k - slab * kSlabColumns;
    return left < kSlabColumns ? (int)left : kSlabColumns;
  }
  const float* couplings_of(int64_t slab) const { return couplings.at + slab * kSlabColumns * kTileStride; }

 private:
  void couple(const FeedbackJob& job, int64_t slab, float* c) {
    const int size = columns_of(slab);
    curvature(job, slab * kSlabColumns, size, c);
    float* const u = couplings.at + slab * kSlabColumns * kTileStride;
    bool finite = true;
    for (int i = 0; i < size; ++i) {
      for (int j = 0; j < size; ++j) {
        const float part = c[i * size + j] / c[j * size + j];
        finite &= i == j || (part <= FLT_MAX && part >= -FLT_MAX);
        u[i * kTileStride + j] = i == j ? 0 : part;
      }
    }
    swept.at[slab] = finite;
  }

  // c is the curvature of the block that begins with the column.
  void arrange(const FeedbackJob& job, int64_t column, float* c) {
    if (best_order(c, block, order.at + column, turned.at + column * block)) return;
    for (int i = 0; i < block; ++i) {
      order.at[column + i] = i;
      std::memcpy(turned.at + (column + i) * block, job.factor + (column + i) * job.k + column, block * sizeof(float));
    }
  }
};

}  // namespace isqtorch::ISQ_ISA
