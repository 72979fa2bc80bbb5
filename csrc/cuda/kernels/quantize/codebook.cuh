// iq4_nl iq4_xs mxfp4. A thread has 32 weights, which is a block or a sub-block. The steps are those of
// cpu/formats/codebook.h.
#pragma once

#include "cuda/formats/codebook.cuh"
#include "cuda/kernels/quantize/kquants.cuh"
#include "searches/codebook.h"

namespace isqtorch::cuda {

// The weights of the squared errors: x^2, or with importance, of which `mean_square` is part.
template <bool kWeighted>
ISQ_DEVICE void iq4_weights(const LaneFloats (&x)[32], LaneFloats (&w)[32], LaneFloats mean_square) {
  if constexpr (kWeighted) {
    importance_weights(x, w, mean_square);
  } else {
    ISQ_GPU_UNROLL for (int i = 0; i < 32; ++i) w[i] = x[i] * x[i];
  }
}

struct QuantizeIq4Nl : TileFormat {
  using Block = BlockIq4Nl;
  static constexpr int kBlock = 32;
  static constexpr bool kTakesImportance = true;

  template <bool kWeighted>
  static ISQ_DEVICE bool quantize(const LaneFloats (&x)[32], LaneFloats (&w)[32], const BlockScope& scope) {
    LaneFloats sum = 0.0f;
    ISQ_GPU_UNROLL for (int i = 0; i < 32; ++i) sum += x[i] * x[i];
    iq4_weights<kWeighted>(x, w, sum * (2.0f / 32.0f));
    const LaneFloats d = search_iq4<LaneFloats, 32>(x, w), inverse = reciprocal_or_zero(d);
    LaneInts codes[32];
    ISQ_GPU_UNROLL for (int i = 0; i < 32; ++i) codes[i] = nearest_iq4_code(x[i] * inverse);
    const Half stored = to_f16(d);
    store_u16(scope.block, stored.bits);
    store_nibbles<4, kAlignOf<Block>>(codes, scope.block + 2);
    return stored.overflow;
  }
};

struct QuantizeIq4Xs : TileFormat {
  using Block = BlockIq4Xs;
  static constexpr int kBlock = 256;
  static constexpr bool kTakesImportance = true;

  template <bool kWeighted>
  static ISQ_DEVICE bool quantize(const LaneFloats (&x)[32], LaneFloats (&w)[32], const BlockScope& scope) {
    const Team& team = scope.team;
    iq4_weights<kWeighted>(x, w, team.sum_of_squares(x) * (2.0f / 256.0f));
    LaneFloats scales[8];
    const LaneFloats mine = search_iq4<LaneFloats, 32>(x, w);
    gather(team, mine, scales);
    const LaneFloats d = -first_extreme(scales) / 32.0f, inverse = reciprocal_or_zero(d);
    const LaneInts sc = clamp(nearest_int(inverse * mine), -32, 31);
    const LaneFloats per_step = reciprocal_or_zero(d * to_float(sc));  // ggml takes the exact d
    LaneInts codes[32], all[8];
    ISQ_GPU_UNROLL for (int i = 0; i < 32; ++i) codes[i] = nearest_iq4_code(per_step * x[i]);
    store_nibbles<4, kAlignOf<Block>>(codes, scope.block + 8 + 16 * team.member);
    gather(team, sc + 32, all);
    const Half stored = to_f16(d);
    if (team.member == 0) {
      uint32_t low = 0, high = 0;
      ISQ_GPU_UNROLL for (int j = 0; j < 8; ++j) {
        low |= ((uint32_t)all[j].v & 15) << (4 * j);
        high |= ((uint32_t)all[j].v >> 4) << (2 * j);
      }
      store_u32<4>(scope.block, stored.bits | high << 16);
      store_u32<4>(scope.block + 4, low);
    }
    return stored.overflow;
  }
};

struct QuantizeMxfp4 : TileFormat {
  using Block = BlockMxfp4;
  static constexpr int kBlock = 32;
  static ISQ_DEVICE bool f16_scales(const Shape&) { return false; }

  template <bool kWeighted>
  static ISQ_DEVICE bool quantize(const LaneFloats (&x)[32], LaneFloats (&)[32], const BlockScope& scope) {
    const LaneInts e = mxfp4_exponent(scope.largest);
    const LaneFloats step = mxfp4_step(e);
    LaneInts codes[32];
    ISQ_GPU_UNROLL for (int i = 0; i < 32; ++i) codes[i] = mxfp4_code(x[i], step);
    scope.block[0] = (uint8_t)e.v;
    store_nibbles<4, kAlignOf<Block>>(codes, scope.block + 1);
    return false;
  }
};

template <>
struct QuantizerOf<Iq4Nl> : BlockByBlock<QuantizeIq4Nl> {};
template <>
struct QuantizerOf<Iq4Xs> : BlockByBlock<QuantizeIq4Xs> {};
template <>
struct QuantizerOf<Mxfp4> : BlockByBlock<QuantizeMxfp4> {};

}  // namespace isqtorch::cuda
