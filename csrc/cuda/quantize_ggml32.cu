#include "cuda/formats/ggml32.cuh"
#include "cuda/kernels/quantize/blocks32.cuh"
#include "cuda/kernels/quantize/launch.cuh"

namespace isqtorch::cuda {

ISQ_QUANTIZER(Q4_0, BlockByBlock<QuantizeSymmetric32<4, BlockQ4_0>>)
ISQ_QUANTIZER(Q4_1, BlockByBlock<QuantizeMinMax32<4, BlockQ4_1>>)
ISQ_QUANTIZER(Q5_0, BlockByBlock<QuantizeSymmetric32<5, BlockQ5_0>>)
ISQ_QUANTIZER(Q5_1, BlockByBlock<QuantizeMinMax32<5, BlockQ5_1>>)
ISQ_QUANTIZER(Q8_0, BlockByBlock<QuantizeBytes32<BlockQ8_0, false>>)
ISQ_QUANTIZER(Q8_1, BlockByBlock<QuantizeBytes32<BlockQ8_1, true>>)

}  // namespace isqtorch::cuda
