#include "cuda/formats/kquants.cuh"
#include "cuda/kernels/quantize/kquants_affine.cuh"
#include "cuda/kernels/quantize/kquants_symmetric.cuh"
#include "cuda/kernels/quantize/launch.cuh"

namespace isqtorch::cuda {

ISQ_QUANTIZER(Q2K, BlockByBlock<QuantizeQ2K>)
ISQ_QUANTIZER(Q3K, BlockByBlock<QuantizeQ3K>)
ISQ_QUANTIZER(Q4K, BlockByBlock<QuantizePairs256<4, BlockQ4K>>)
ISQ_QUANTIZER(Q5K, BlockByBlock<QuantizePairs256<5, BlockQ5K>>)
ISQ_QUANTIZER(Q6K, BlockByBlock<QuantizeQ6K>)
ISQ_QUANTIZER(Q8K, BlockByBlock<QuantizeQ8K>)

}  // namespace isqtorch::cuda
