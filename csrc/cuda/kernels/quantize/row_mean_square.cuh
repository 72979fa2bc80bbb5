// The mean square of every row, added in the order of the columns, for the 32-weight formats with importance. One
// thread sums up a row, so the other threads of its block only load the numbers, a tile in advance.
#pragma once

#include "cuda/kernels/quantize/tile.cuh"

namespace isqtorch::cuda {

constexpr int kMeanRows = 32, kMeanColumns = 128;

// mean_square[r] = sum of w[r]^2 / k. k is a multiple of 32.
template <Dtype dtype>
__global__ void __launch_bounds__(kQuantizeThreads) row_mean_square_kernel(QuantizeJob job, float* mean_square) {
  constexpr int kEach = dtype == Dtype::kF32 ? 4 : 8, kPieces = kMeanColumns / kEach;
  constexpr int kStride = kMeanColumns + 1, kLoaders = kQuantizeThreads - kMeanRows;
  ISQ_SHARED(float, tiles, [2 * kMeanRows * kStride]);
  const int64_t first_row = (int64_t)blockIdx.x * kMeanRows;
  const int rows = job.rows - first_row < kMeanRows ? (int)(job.rows - first_row) : kMeanRows;
  const bool summing = threadIdx.x < kMeanRows;
  float sum = 0.0f;
  // Round n loads tile n and sums up tile n - 1.
  const int64_t tiles_of_row = (job.k + kMeanColumns - 1) / kMeanColumns;
  for (int64_t n = 0; n <= tiles_of_row; ++n) {
    if (!summing && n < tiles_of_row) {
      float* const tile = tiles + n % 2 * (kMeanRows * kStride);
      for (int p = (int)threadIdx.x - kMeanRows; p < rows * kPieces; p += kLoaders) {
        const int row = p / kPieces, column = p % kPieces * kEach;
        if (n * kMeanColumns + column >= job.k) continue;
        const uint8_t* const from =
            static_cast<const uint8_t*>(job.w) + ((first_row + row) * job.k + n * kMeanColumns + column) * (16 / kEach);
        const uint4 piece = load_piece(from, reinterpret_cast<uintptr_t>(from) % 16 == 0);
        ISQ_GPU_UNROLL for (int i = 0; i < kEach; ++i) tile[row * kStride + column + i] = element_of(piece, dtype, i);
      }
    }
    if (summing && n > 0 && (int)threadIdx.x < rows) {
      const float* const tile = tiles + (n - 1) % 2 * (kMeanRows * kStride) + threadIdx.x * kStride;
      const int64_t left = job.k - (n - 1) * kMeanColumns;
      const int columns = left < kMeanColumns ? (int)left : kMeanColumns;
      for (int i = 0; i < columns; i += 32) {
        ISQ_GPU_UNROLL for (int j = 0; j < 32; ++j) sum += tile[i + j] * tile[i + j];
      }
    }
    __syncthreads();
  }
  if ((int)threadIdx.x < rows) mean_square[first_row + threadIdx.x] = sum / (float)job.k;
}

}  // namespace isqtorch::cuda
