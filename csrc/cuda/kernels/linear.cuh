// `linear`: selects the kernel by the number of rows of x.
#pragma once

#include "cuda/kernels/linear_rows.cuh"
#include "cuda/kernels/linear_tile.cuh"

namespace isqtorch::cuda {

inline Task linear_task(const LinearJob& job, const Shape& shape) {
  Task task = {};
  task.x = static_cast<const uint8_t*>(job.x);
  task.weight = job.weight;
  task.bias = job.bias;
  task.y = job.y;
  task.m = (int)job.m, task.n = (int)job.n, task.k = (int)job.k;
  task.parts = 1;
  set_shape(task, shape);
  return task;
}

// The task for more rows of x than the rows kernel takes, and how blocks share it.
template <class F, Dtype dtype>
struct TiledLinear {
  int tiles;
  TileTask task = {};
  TilePlan plan;

  TiledLinear(const LinearJob& job, const Shape& shape) : tiles(token_tiles<F, dtype>(job.m)) {
    static_cast<Task&>(task) = linear_task(job, shape);
    task.parts = (unsigned)((job.m + 8 * tiles - 1) / (8 * tiles));
    plan = tile_plan<F, dtype>(task, tiles, task.parts, true);
    task.slab_stride = (job.m * job.n + 3) / 4 * 4;
  }
  int64_t workspace() const { return plan.slabs == 1 ? 0 : plan.slabs * task.slab_stride * (int64_t)sizeof(float); }
};

template <class F, Dtype dtype>
void launch_linear_of(const LinearJob& job, const Shape& shape, Stream stream) {
  if (job.m <= kFewRows) return launch_rows<F, dtype>(linear_task(job, shape), stream);
  TiledLinear<F, dtype> of(job, shape);
  if (of.plan.slabs > 1) of.task.partial_sums = static_cast<float*>(job.workspace);
  launch_tiles<F, dtype>(of.task, of.tiles, of.plan, stream);
}

template <class F>
int64_t linear_workspace(const LinearJob& job, const Shape& shape) {
  if (job.m <= kFewRows || !job.n) return 0;
  if (job.dtype == Dtype::kF32) return TiledLinear<F, Dtype::kF32>(job, shape).workspace();
  return TiledLinear<F, Dtype::kBf16>(job, shape).workspace();  // f16 needs the same
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
