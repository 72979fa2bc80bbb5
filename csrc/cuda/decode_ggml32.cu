#include "cuda/formats/list.cuh"
#include "cuda/kernels/decode.cuh"

namespace isqtorch::cuda {

#define ISQ_INSTANTIATE(F) template void launch_decode<F>(const DecodeJob&, const Shape&, Stream);
ISQ_GGML32_FORMATS(ISQ_INSTANTIATE)

}  // namespace isqtorch::cuda
