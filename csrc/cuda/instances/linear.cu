// `linear` and `experts_linear` for the formats of ISQ_FAMILY, see formats/list.cuh. They launch the same kernels, so
// they are compiled together.
#include "cuda/formats/list.cuh"
#include "cuda/kernels/experts.cuh"
#include "cuda/kernels/linear.cuh"

namespace isqtorch::cuda {

#define ISQ_INSTANTIATE(name, F)                                          \
  template int64_t linear_workspace<F>(const LinearJob&, const Shape&);   \
  template void launch_linear<F>(const LinearJob&, const Shape&, Stream); \
  template int64_t experts_workspace<F>(const ExpertsJob&, const Shape&); \
  template void launch_experts<F>(const ExpertsJob&, const Shape&, Stream);
ISQ_FAMILY(ISQ_INSTANTIATE)

}  // namespace isqtorch::cuda
