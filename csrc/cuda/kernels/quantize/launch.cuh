// The launches of quantizers, and which quantizer a format has.
#pragma once

#include "cuda/kernels/quantize/row_mean_square.cuh"
#include "cuda/launchers.cuh"

namespace isqtorch::cuda {

inline unsigned tiles_of(const QuantizeJob& job, int tile) { return (unsigned)((job.rows * job.k + tile - 1) / tile); }

// Launches for formats whose blocks do not depend on each other.
template <class Q>
struct BlockByBlock {
  static int64_t workspace(const QuantizeJob& job, const Shape&) {
    return Q::kNeedsRowMeanSquare && job.importance ? job.rows * (int64_t)sizeof(float) : 0;
  }

  static void launch(const QuantizeJob& job, const Shape& shape, Stream stream) {
    if constexpr (Q::kTakesImportance) {
      if (job.importance) {
        float* const row_mean_square = static_cast<float*>(job.workspace);
        if constexpr (Q::kNeedsRowMeanSquare) launch_row_mean_square(job, row_mean_square, stream);
        return launch<true>(job, shape, row_mean_square, stream);
      }
    }
    launch<false>(job, shape, nullptr, stream);
  }

 private:
  static void launch_row_mean_square(const QuantizeJob& job, float* mean_square, Stream stream) {
    const auto kernel = job.dtype == Dtype::kF32   ? row_mean_square_kernel<Dtype::kF32>
                        : job.dtype == Dtype::kF16 ? row_mean_square_kernel<Dtype::kF16>
                                                   : row_mean_square_kernel<Dtype::kBf16>;
    ISQ_LAUNCH(kernel, {(unsigned)((job.rows + kMeanRows - 1) / kMeanRows)}, {kQuantizeThreads}, 0,
               (cudaStream_t)stream, job, mean_square);
  }

  template <bool kWeighted>
  static void launch(const QuantizeJob& job, const Shape& shape, const float* row_mean_square, Stream stream) {
    ISQ_LAUNCH((quantize_kernel<Q, kWeighted>), {tiles_of(job, TileMemory<Q::kOwn>::kTile)}, {kQuantizeThreads}, 0,
               (cudaStream_t)stream, job, shape, row_mean_square);
  }
};

// What quantizes a format, by the format's struct: a class with `workspace` and `launch` as above.
template <class F>
struct QuantizerOf;

template <class F>
int64_t quantize_workspace(const QuantizeJob& job, const Shape& shape) {
  return QuantizerOf<F>::workspace(job, shape);
}
template <class F>
void launch_quantize(const QuantizeJob& job, const Shape& shape, Stream stream) {
  if (job.rows && job.k) QuantizerOf<F>::launch(job, shape, stream);
}

}  // namespace isqtorch::cuda
