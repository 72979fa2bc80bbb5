#include "cuda/kernels/fp8_parts.cuh"

namespace isqtorch::cuda {

void quantize_activations(const void* x, Dtype dtype, int64_t m, const Fp8Parts& to, Stream stream) {
  const auto kernel = dtype == Dtype::kF32   ? quantize_activations_kernel<Dtype::kF32>
                      : dtype == Dtype::kF16 ? quantize_activations_kernel<Dtype::kF16>
                                             : quantize_activations_kernel<Dtype::kBf16>;
  if (to.rows) ISQ_LAUNCH(kernel, {parts_blocks(to)}, {kPartsThreads}, 0, (cudaStream_t)stream, x, m, to);
}

void split_fp8(const uint8_t* weight, const Fp8Parts& to, Stream stream) {
  if (to.rows) ISQ_LAUNCH(split_fp8_kernel, {parts_blocks(to)}, {kPartsThreads}, 0, (cudaStream_t)stream, weight, to);
}

void add_bias(void* y, const void* bias, Dtype dtype, int64_t m, int64_t n, Stream stream) {
  const auto kernel = dtype == Dtype::kF32   ? add_bias_kernel<Dtype::kF32>
                      : dtype == Dtype::kF16 ? add_bias_kernel<Dtype::kF16>
                                             : add_bias_kernel<Dtype::kBf16>;
  const int64_t across = n / (dtype == Dtype::kF32 ? 4 : 8), pieces = m * across;
  const auto blocks = (unsigned)((pieces + kPartsThreads - 1) / kPartsThreads);
  if (!blocks) return;
  ISQ_LAUNCH(kernel, {blocks}, {kPartsThreads}, 0, (cudaStream_t)stream, static_cast<uint4*>(y),
             static_cast<const uint4*>(bias), pieces, (uint32_t)across);
}

}  // namespace isqtorch::cuda
