#include "cuda/formats/list.cuh"
#include "cuda/kernels/experts.cuh"
#include "cuda/kernels/linear.cuh"

namespace isqtorch::cuda {

// Both in one file, for they launch the same kernels.
#define ISQ_INSTANTIATE(F)                                                \
  template int64_t linear_workspace<F>(const LinearJob&, const Shape&);   \
  template void launch_linear<F>(const LinearJob&, const Shape&, Stream); \
  template int64_t experts_workspace<F>(const ExpertsJob&, const Shape&); \
  template void launch_experts<F>(const ExpertsJob&, const Shape&, Stream);
ISQ_STREAM_STRUCTS(ISQ_INSTANTIATE)

}  // namespace isqtorch::cuda
