#include "cuda/formats/fp8.cuh"
#include "cuda/kernels/quantize/fp8.cuh"
#include "cuda/kernels/quantize/launch.cuh"

namespace isqtorch::cuda {

ISQ_QUANTIZER(Fp8, BlockByBlock<QuantizeFp8>)

}  // namespace isqtorch::cuda
