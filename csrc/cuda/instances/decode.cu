// `dequantize` and `embedding` for the formats of ISQ_FAMILY, see formats/list.cuh.
#include "cuda/formats/list.cuh"
#include "cuda/kernels/decode.cuh"

namespace isqtorch::cuda {

#define ISQ_INSTANTIATE(name, F) template void launch_decode<F>(const DecodeJob&, const Shape&, Stream);
ISQ_FAMILY(ISQ_INSTANTIATE)

}  // namespace isqtorch::cuda
