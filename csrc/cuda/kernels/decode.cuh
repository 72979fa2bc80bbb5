// Rows of a packed weight as floats: all rows (dequantize), or those that ids select (embedding). A thread computes
// eight weights and writes them as 16-byte words if the output is aligned for that.
#pragma once

#include "cuda/formats/format.cuh"
#include "cuda/launchers.cuh"

namespace isqtorch::cuda {

constexpr int kDecodeThreads = 256, kOct = 8;

// log2 of the number of octs in a block of 32, 64, 128 or 256 weights.
constexpr __host__ __device__ int log_octs(int block) {
  return block == 32 ? 2 : block == 64 ? 3 : block == 128 ? 4 : 5;
}

// w [8] to out [8]
ISQ_DEVICE void store_oct(const float (&w)[8], float* out, bool aligned) {
  if (aligned) {
    reinterpret_cast<float4*>(out)[0] = {w[0], w[1], w[2], w[3]};
    reinterpret_cast<float4*>(out)[1] = {w[4], w[5], w[6], w[7]};
  } else {
    for (int i = 0; i < kOct; ++i) out[i] = w[i];
  }
}
template <Element element>
ISQ_DEVICE void store_oct(const float (&w)[8], uint16_t* out, bool aligned) {
  uint32_t pairs[4];
  for (int i = 0; i < 4; ++i) {
    pairs[i] = element == Element::kBf16 ? pack_bf16(w[2 * i], w[2 * i + 1]) : pack_f16(w[2 * i], w[2 * i + 1]);
  }
  if (aligned) {
    *reinterpret_cast<uint4*>(out) = {pairs[0], pairs[1], pairs[2], pairs[3]};
  } else {
    for (int i = 0; i < kOct; ++i) out[i] = (uint16_t)(pairs[i / 2] >> 16 * (i % 2));
  }
}

// A block of threads computes 2048 weights of a row, which are whole blocks of every format. Without ids, all rows are
// treated as one long row.
template <class F, Dtype dtype>
__global__ void __launch_bounds__(kDecodeThreads)
    decode_kernel(const uint8_t* weight, void* out, int64_t row_octs, int log_block_octs, const void* ids,
                  bool wide_ids, int64_t rows, bool aligned, Shape shape) {
  static_assert(kDecodeThreads * kOct % kChunk == 0);
  const int log = F::kBlock ? log_octs(F::kBlock) : log_block_octs;
  const int block_bytes = F::kBlock ? (int)sizeof(typename F::Block) : shape.block_bytes;
  int64_t first_oct = (int64_t)blockIdx.x * kDecodeThreads, first_block = first_oct >> log, at = first_oct;
  if (ids) {
    const int64_t id =
        wide_ids ? static_cast<const int64_t*>(ids)[blockIdx.x] : static_cast<const int32_t*>(ids)[blockIdx.x];
    ISQ_ASSERT(id >= 0 && id < rows, "isqtorch: an id names no row of the weight");
    first_oct = (int64_t)blockIdx.y * kDecodeThreads;
    first_block = (id * row_octs + first_oct) >> log;
    at = blockIdx.x * row_octs + first_oct;
  }
  const int oct = threadIdx.x % kDecodeThreads;  // % tells the compiler that it is not negative
  if (oct >= row_octs - first_oct) return;
  float w[8];
  F::decode(weight + first_block * block_bytes + (oct >> log) * block_bytes, (oct & ((1 << log) - 1)) * kOct, shape, w);
  if constexpr (dtype == Dtype::kF32) {
    store_oct(w, static_cast<float*>(out) + at * kOct + oct * kOct, aligned);
  } else {
    constexpr Element kElement = dtype == Dtype::kF16 ? Element::kF16 : Element::kBf16;
    store_oct<kElement>(w, static_cast<uint16_t*>(out) + at * kOct + oct * kOct, aligned);
  }
}

template <class F, Dtype dtype>
void launch_decode(const DecodeJob& job, const Shape& shape, Stream stream) {
  const int64_t row_octs = (job.ids ? job.k : job.rows * job.k) / kOct;
  const int64_t pieces = (row_octs + kDecodeThreads - 1) / kDecodeThreads;
  if (!pieces || (job.ids && !job.count)) return;
  const dim3 grid = {(unsigned)(job.ids ? job.count : pieces), (unsigned)(job.ids ? pieces : 1)};
  const bool aligned = reinterpret_cast<uintptr_t>(job.out) % 16 == 0;
  ISQ_LAUNCH((decode_kernel<F, dtype>), grid, {kDecodeThreads}, 0, (cudaStream_t)stream, job.weight, job.out, row_octs,
             log_octs(shape.block), job.ids, job.wide_ids, job.rows, aligned, shape);
}

template <class F>
void launch_decode(const DecodeJob& job, const Shape& shape, Stream stream) {
  switch (job.dtype) {
    case Dtype::kF32:
      return launch_decode<F, Dtype::kF32>(job, shape, stream);
    case Dtype::kF16:
      return launch_decode<F, Dtype::kF16>(job, shape, stream);
    case Dtype::kBf16:
      return launch_decode<F, Dtype::kBf16>(job, shape, stream);
  }
}

}  // namespace isqtorch::cuda
