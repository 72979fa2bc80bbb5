// The weights of a slice as numbers of x's type, for many tokens.
//
// Each weight is computed in f32 by one fused multiply-add and rounded once. So the product is that of `dequantize` to
// x's type followed by a matrix product with f32 sums, for any group size, and the matrix unit sums over k. Compared
// with codes that stay integers (SliceWeights), a slice of 32 rows costs a warp about 50 instructions more, and every
// eight tokens cost 27 to 41 less: there are no sums of x, no scaling, and no pairs to assemble, because weights are
// packed in the order of x.
#pragma once

#include "cuda/kernels/product.cuh"

namespace isqtorch::cuda {

template <class F, Element element, int kTiles>
struct RoundedWeights {
  static constexpr int kGroups = kSlice / F::kGroup;

  uint32_t a[kTiles][2][4];

  // `table` begins with this lane's first row and was made with F::kFloatZero.
  ISQ_DEVICE void load(const uint8_t* const (&chunks)[2 * kTiles], const uint8_t* table, int slice, int t,
                       const Shape& shape) {
#pragma unroll
    for (int j = 0; j < 2 * kTiles; ++j) {
      float w[8];
      F::floats(chunks[j], slice, t, shape, w);
      const float2* const numbers = reinterpret_cast<const float2*>(table) + (slice * 16 * kTiles + 8 * j) * kGroups;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float2 affine = numbers[i / (8 / kGroups)];
        w[i] = fmaf(w[i], affine.x, affine.y);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[j / 2][i / 2][i % 2 * 2 + j % 2] =
            element == Element::kF16 ? pack_f16(w[2 * i], w[2 * i + 1]) : pack_bf16(w[2 * i], w[2 * i + 1]);
      }
    }
  }

  // out += product with eight tokens; `words` are a lane's numbers as they are in memory.
  ISQ_DEVICE void multiply(const uint32_t (&words)[4], float (&out)[kTiles][4]) const {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        multiply_add<element>(out[tile], a[tile][step], {words[2 * step], words[2 * step + 1]});
      }
    }
  }
};

}  // namespace isqtorch::cuda
