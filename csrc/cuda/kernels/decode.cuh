// Rows of a packed weight as floats: all rows (dequantize), or those that ids name (embedding). A thread makes eight
// weights, and writes them as 16-byte words where the output lies so.
#pragma once

#include "cuda/formats/format.cuh"
#include "cuda/launchers.cuh"

namespace isqtorch::cuda {

constexpr int kDecodeThreads = 256, kOct = 8;

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

// The rows `row_octs` long, one after the other if there are no ids. Blocks of threads: x along a row, y over rows.
template <class F, Dtype dtype, class Id>
__global__ void __launch_bounds__(kDecodeThreads)
    decode_kernel(const uint8_t* weight, void* out, int64_t row_octs, int block_octs_log, const Id* ids, int64_t count,
                  int64_t rows, bool aligned, Shape shape) {
  const int64_t oct = (int64_t)blockIdx.x * kDecodeThreads + threadIdx.x;
  if (oct >= row_octs) return;
  const int log = F::kBlock ? (F::kBlock == 256 ? 5 : F::kBlock == 128 ? 4 : 2) : block_octs_log;
  const int block_bytes = F::kBlock ? (int)sizeof(typename F::Block) : shape.block_bytes;
  const int first = (int)(oct & ((1 << log) - 1)) * kOct;
  for (int64_t row = blockIdx.y; row < count; row += gridDim.y) {
    int64_t block = oct >> log;
    if (ids) {
      const int64_t id = ids[row];
      ISQ_ASSERT(id >= 0 && id < rows, "isqtorch: an id names no row of the weight");
      block += id * (row_octs >> log);
    }
    float w[8];
    F::decode(weight + block * block_bytes, first, shape, w);
    const int64_t at = (row * row_octs + oct) * kOct;
    if constexpr (dtype == Dtype::kF32) {
      store_oct(w, static_cast<float*>(out) + at, aligned);
    } else {
      store_oct<dtype == Dtype::kF16 ? Element::kF16 : Element::kBf16>(w, static_cast<uint16_t*>(out) + at, aligned);
    }
  }
}

template <class F, Dtype dtype, class Id>
void launch_decode(const DecodeJob& job, const Shape& shape, Stream stream) {
  // Without ids, blocks follow each other through all rows: as good as one long row.
  const int64_t count = job.ids ? job.count : 1, row_octs = (job.ids ? job.k : job.rows * job.k) / kOct;
  if (!count || !row_octs) return;
  int log = 0;
  while (kOct << log < shape.block) ++log;
  const dim3 grid = {(unsigned)((row_octs + kDecodeThreads - 1) / kDecodeThreads),
                     (unsigned)(count < 65535 ? count : 65535)};
  const bool aligned = reinterpret_cast<uintptr_t>(job.out) % 16 == 0;
  ISQ_LAUNCH((decode_kernel<F, dtype, Id>), grid, {kDecodeThreads}, 0, (cudaStream_t)stream, job.weight, job.out,
             row_octs, log, static_cast<const Id*>(job.ids), count, job.rows, aligned, shape);
}

template <class F, Dtype dtype>
void launch_decode(const DecodeJob& job, const Shape& shape, Stream stream) {
  const auto launch = job.wide_ids ? launch_decode<F, dtype, int64_t> : launch_decode<F, dtype, int32_t>;
  launch(job, shape, stream);
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
