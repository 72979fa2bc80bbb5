// FP8: 128 codes of type e4m3fn under an f32 scale. A thread has 32 weights, a team of four threads the block. The
// steps are those of cpu/formats/fp8.h.
#pragma once

#include "cuda/formats/fp8.cuh"
#include "cuda/kernels/quantize/launch.cuh"
#include "cuda/kernels/quantize/rounding.cuh"

namespace isqtorch::cuda {

struct QuantizeFp8 : TileFormat {
  using Block = BlockFp8;
  static constexpr int kBlock = 128;
  static constexpr float kLargest = 448.0f;
  static ISQ_DEVICE bool f16_scales(const Shape&) { return false; }

  template <bool kWeighted>
  static ISQ_DEVICE bool quantize(const LaneFloats (&x)[32], LaneFloats (&)[32], const BlockScope& scope) {
    const LaneFloats scale = scale_of(scope.largest);
    LaneInts codes[32];
    encode_all(x, scope.largest, scale, codes);
    if (scope.team.member == 0) store_u32<4>(scope.block, (uint32_t)as_int(scale).v);
    uint8_t* const to = scope.block + 4 + 32 * scope.team.member;
    ISQ_GPU_UNROLL for (int j = 0; j < 32; j += 4) {
      store_u32<4>(to + j, four_bytes(codes[j], codes[j + 1], codes[j + 2], codes[j + 3]));
    }
    return false;
  }

  static ISQ_DEVICE LaneFloats scale_of(LaneFloats largest) {
    return select(largest == 0.0f, 1.0f, max(largest / kLargest, FLT_MIN));
  }
  // The codes of some weights of a block; `largest` and `scale` are those of the block.
  template <int kOwn>
  static ISQ_DEVICE void encode_all(const LaneFloats (&x)[kOwn], LaneFloats largest, LaneFloats scale,
                                    LaneInts (&codes)[kOwn]) {
    for_quotients(x, largest, 0.0f, scale,
                  [&](int i, LaneFloats q) { codes[i] = encode(q) | (as_int(x[i]) >> 24 & 0x80); });
  }

 private:
  // The magnitude, to nearest even, saturating.
  static ISQ_DEVICE LaneInts encode(LaneFloats f) {
    const LaneFloats magnitude = min(abs(f), kLargest);
    const LaneInts bits = as_int(magnitude);
    const LaneInts normal = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
    const LaneInts subnormal = nearest_int(magnitude * 512.0f);  // of 2^-9
    return select(magnitude < 0x1p-6f, subnormal, normal);
  }
};

template <>
struct QuantizerOf<Fp8> : BlockByBlock<QuantizeFp8> {};

}  // namespace isqtorch::cuda
