#include "cuda/formats/list.cuh"
#include "cuda/kernels/experts.cuh"

namespace isqtorch::cuda {

#define ISQ_INSTANTIATE(F)                                                       \
  template int64_t experts_workspace<F>(const ExpertsJob&, const Shape&);        \
  template void launch_experts<F>(const ExpertsJob&, const Shape&, Stream);
ISQ_GGML32_FORMATS(ISQ_INSTANTIATE)

}  // namespace isqtorch::cuda
