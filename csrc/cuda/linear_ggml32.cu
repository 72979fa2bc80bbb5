#include "cuda/formats/list.cuh"
#include "cuda/kernels/linear.cuh"

namespace isqtorch::cuda {

#define ISQ_INSTANTIATE(F) template void launch_linear<F>(const LinearJob&, const Shape&, Stream);
ISQ_GGML32_FORMATS(ISQ_INSTANTIATE)

}  // namespace isqtorch::cuda
