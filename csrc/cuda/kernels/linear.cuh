// `linear`: the kernel for the number of rows of x.
#pragma once

#include "cuda/kernels/linear_tile.cuh"

namespace isqtorch::cuda {

template <class F, Dtype dtype>
void launch_linear_of(const LinearJob& job, const Shape& shape, Stream stream) {
  Task task = {};
  task.x = static_cast<const uint8_t*>(job.x);
  task.weight = job.weight;
  task.bias = job.bias;
  task.y = job.y;
  task.m = (int)job.m, task.n = (int)job.n, task.k = (int)job.k;
  set_shape(task, shape);
  task.parts = 1;
  if (job.m <= kRowsTokens) return launch_rows<F, dtype>(task, stream);
  const int tiles = token_tiles<dtype>(job.m);
  task.parts = (unsigned)((job.m + 8 * tiles - 1) / (8 * tiles));
  launch_tiles<F, dtype>(task, tiles, task.parts, stream);
}

template <class F>
void launch_linear(const LinearJob& job, const Shape& shape, Stream stream) {
  if (!job.m || !job.n) return;
  switch (job.dtype) {
    case Dtype::kF32:
      return launch_linear_of<F, Dtype::kF32>(job, shape, stream);
    case Dtype::kF16:
      return launch_linear_of<F, Dtype::kF16>(job, shape, stream);
    case Dtype::kBf16:
      return launch_linear_of<F, Dtype::kBf16>(job, shape, stream);
  }
}

}  // namespace isqtorch::cuda
