// `quantize` for the formats of ISQ_FAMILY, see formats/list.cuh.
#include "cuda/formats/list.cuh"
#include "cuda/kernels/quantize/blocks32.cuh"
#include "cuda/kernels/quantize/codebook.cuh"
#include "cuda/kernels/quantize/fp8.cuh"
#include "cuda/kernels/quantize/kquants_affine.cuh"
#include "cuda/kernels/quantize/kquants_symmetric.cuh"
#include "cuda/kernels/quantize/stream.cuh"

namespace isqtorch::cuda {

#define ISQ_INSTANTIATE(name, F)                                            \
  template int64_t quantize_workspace<F>(const QuantizeJob&, const Shape&); \
  template void launch_quantize<F>(const QuantizeJob&, const Shape&, Stream);
ISQ_FAMILY(ISQ_INSTANTIATE)

}  // namespace isqtorch::cuda
