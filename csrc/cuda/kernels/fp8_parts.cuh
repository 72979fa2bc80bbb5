// Separates codes and scales for torch's FP8 product. Eight threads share a run of 128 columns, sixteen columns each. A
// warp has four runs of a row and a block of threads eight rows of these. So reads are coalesced, and the scales of
// neighbouring rows are written at about the same time.
#pragma once

#include "cuda/fp8_parts.h"
#include "cuda/kernels/quantize/fp8.cuh"

namespace isqtorch::cuda {

constexpr int kPartsThreads = 256, kOwnCodes = 16, kRunThreads = Fp8Parts::kRun / kOwnCodes;
constexpr int kPartsRows = kPartsThreads / gpu::kWarp, kPartsRuns = gpu::kWarp / kRunThreads;

// The number of blocks of threads for a matrix. Those of a row follow one another.
inline unsigned parts_blocks(const Fp8Parts& to) {
  const int64_t across = (to.k / Fp8Parts::kRun + kPartsRuns - 1) / kPartsRuns;
  return (unsigned)(across * ((to.rows + kPartsRows - 1) / kPartsRows));
}

// The sixteen elements of this thread.
struct RunPart {
  int64_t row;
  int run, member;  // number of the run in the row; of the thread in the run
  bool inside;      // whether they are inside the matrix

  ISQ_DEVICE explicit RunPart(const Fp8Parts& to) {
    const uint32_t runs = (uint32_t)(to.k / Fp8Parts::kRun), across = (runs + kPartsRuns - 1) / kPartsRuns;
    const uint32_t down = blockIdx.x / across;
    row = (int64_t)down * kPartsRows + threadIdx.x / gpu::kWarp;
    run = (int)((blockIdx.x - down * across) * kPartsRuns + threadIdx.x % gpu::kWarp / kRunThreads);
    member = (int)threadIdx.x % kRunThreads;
    inside = row < to.rows && (uint32_t)run < runs;
  }
  ISQ_DEVICE int64_t element(int64_t k) const { return row * k + run * Fp8Parts::kRun + member * kOwnCodes; }
  ISQ_DEVICE void store(const Fp8Parts& to, const uint4& codes, float scale) const {
    *reinterpret_cast<uint4*>(to.codes + element(to.k)) = codes;
    if (member == 0) to.scales[run * to.rows + row] = scale;
  }
};

template <Dtype dtype>
__global__ void __launch_bounds__(kPartsThreads) quantize_activations_kernel(const void* x, int64_t m, Fp8Parts to) {
  constexpr int kEach = dtype == Dtype::kF32 ? 4 : 8;  // in 16 bytes
  const RunPart part(to);
  LaneFloats own[kOwnCodes];
  const bool filled = part.inside && part.row < m;
  const uint4* const from = static_cast<const uint4*>(x) + (filled ? part.element(to.k) / kEach : 0);
  ISQ_GPU_UNROLL for (int p = 0; p < kOwnCodes / kEach; ++p) {
    const uint4 piece = filled ? from[p] : uint4{0, 0, 0, 0};
    ISQ_GPU_UNROLL for (int i = 0; i < kEach; ++i) own[p * kEach + i] = element_of(piece, dtype, i);
  }
  float extreme = 0.0f;
  ISQ_GPU_UNROLL for (int i = 0; i < kOwnCodes; ++i) extreme = gpu::max_or_nan(::fabsf(own[i].v), extreme);
  const uint32_t bits = Team{kRunThreads, part.member}.largest(__float_as_uint(extreme) & kMagnitude);
  if (!part.inside) return;

  const LaneFloats largest = __uint_as_float(bits), scale = QuantizeFp8::scale_of(largest);
  LaneInts codes[kOwnCodes];
  QuantizeFp8::encode_all(own, largest, scale, codes);
  uint32_t quads[4];
  ISQ_GPU_UNROLL for (int j = 0; j < 4; ++j) {
    quads[j] = four_bytes(codes[4 * j], codes[4 * j + 1], codes[4 * j + 2], codes[4 * j + 3]);
  }
  const float numbers_only = bits < kInfinityBits ? scale.v : __uint_as_float(0x7fc00000);
  part.store(to, {quads[0], quads[1], quads[2], quads[3]}, numbers_only);
}

__global__ void __launch_bounds__(kPartsThreads) split_fp8_kernel(const uint8_t* weight, Fp8Parts to) {
  const RunPart part(to);
  if (!part.inside) return;
  const int64_t block = part.row * (to.k / Fp8Parts::kRun) + part.run;
  const uint8_t* const from = weight + block * (int64_t)sizeof(QuantizeFp8::Block);
  const uint8_t* const codes = from + sizeof(float) + part.member * kOwnCodes;
  const uint4 own = {load_u32<4>(codes), load_u32<4>(codes + 4), load_u32<4>(codes + 8), load_u32<4>(codes + 12)};
  part.store(to, own, __uint_as_float(load_u32<4>(from)));
}

// A thread has 16 bytes of y.
template <Dtype dtype>
__global__ void __launch_bounds__(kPartsThreads)
    add_bias_kernel(uint4* y, const uint4* bias, int64_t pieces, uint32_t across) {
  const int64_t at = (int64_t)blockIdx.x * kPartsThreads + threadIdx.x;
  if (at >= pieces) return;
  const uint4 a = y[at], b = bias[at % across];
  const auto sum = [&](int i) { return element_of(a, dtype, i) + element_of(b, dtype, i); };
  if constexpr (dtype == Dtype::kF32) {
    y[at] = {__float_as_uint(sum(0)), __float_as_uint(sum(1)), __float_as_uint(sum(2)), __float_as_uint(sum(3))};
  } else {
    const auto pair = [&](int i) {
      return dtype == Dtype::kF16 ? gpu::pack_f16(sum(i), sum(i + 1)) : gpu::pack_bf16(sum(i), sum(i + 1));
    };
    y[at] = {pair(0), pair(2), pair(4), pair(6)};
  }
}

}  // namespace isqtorch::cuda
