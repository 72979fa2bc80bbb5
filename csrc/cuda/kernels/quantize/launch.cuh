// From a format's struct to its quantizer, and the launches.
#pragma once

#include "cuda/kernels/quantize/tile.cuh"
#include "cuda/kernels/quantize/row_mean_square.cuh"
#include "cuda/launchers.cuh"

namespace isqtorch::cuda {

inline unsigned tiles_of(const QuantizeJob& job, int tile) { return (unsigned)((job.rows * job.k + tile - 1) / tile); }

inline void launch_row_mean_square(const QuantizeJob& job, float* mean_square, Stream stream) {
  const auto kernel = job.dtype == Dtype::kF32   ? row_mean_square_kernel<Dtype::kF32>
                      : job.dtype == Dtype::kF16 ? row_mean_square_kernel<Dtype::kF16>
                                                 : row_mean_square_kernel<Dtype::kBf16>;
  ISQ_LAUNCH(kernel, {(unsigned)((job.rows + kMeanRows - 1) / kMeanRows)}, {kQuantizeThreads}, 0,
             (cudaStream_t)stream, job, mean_square);
}

template <class Q>
int64_t workspace_of(const QuantizeJob& job) {
  return Q::kNeedsRowMeanSquare && job.importance ? job.rows * (int64_t)sizeof(float) : 0;
}

template <class Q>
void launch_quantizer(const QuantizeJob& job, const Shape& shape, Stream stream) {
  if (!job.rows || !job.k) return;
  const dim3 grid = {tiles_of(job, TileMemory<Q::kOwn>::kTile)};
  float* const row_mean_square = static_cast<float*>(job.workspace);
  if constexpr (Q::kTakesImportance) {
    if (job.importance) {
      if (Q::kNeedsRowMeanSquare) launch_row_mean_square(job, row_mean_square, stream);
      ISQ_LAUNCH((quantize_kernel<Q, true>), grid, {kQuantizeThreads}, 0, (cudaStream_t)stream, job, shape,
                 row_mean_square);
      return;
    }
  }
  ISQ_LAUNCH((quantize_kernel<Q, false>), grid, {kQuantizeThreads}, 0, (cudaStream_t)stream, job, shape,
             row_mean_square);
}

}  // namespace isqtorch::cuda
