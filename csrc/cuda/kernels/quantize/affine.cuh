// AFQ: groups of 32, 64 or 128 weights with a 16-bit scale and bias. A thread has 32 weights; a team of threads has the
// group. The steps are those of cpu/formats/affine.h.
#pragma once

#include "cuda/kernels/quantize/line_fit.cuh"
#include "cuda/kernels/quantize/rounding.cuh"

namespace isqtorch::cuda {

// Stores a thread's 32 codes as a bit stream of kBits words.
template <int kBits>
ISQ_DEVICE void store_stream(const LaneInts (&codes)[32], uint8_t* to) {
  ISQ_GPU_UNROLL for (int n = 0; n < kBits; ++n) {
    uint32_t word = 0;
    ISQ_GPU_UNROLL for (int i = 0; i < 32; ++i) {
      const int at = i * kBits - 32 * n;
      if (at > -kBits && at < 32) word |= at < 0 ? (uint32_t)codes[i].v >> -at : (uint32_t)codes[i].v << at;
    }
    store_u32<4>(to + 4 * n, word);
  }
}

// To f16, subnormal results away from zero: these are so coarse that a scale rounded down would cut off a large part of
// the group's range.
ISQ_DEVICE Half scale_to_f16(LaneFloats f) {
  Half h = to_f16(f);
  if (any((abs(h.value) < abs(f)) & (abs(f) < 0x1p-14f))) h.value = f16_to_f32(++h.bits);
  return h;
}

// kSearch: for Rule::kSearch; otherwise for the other rules.
template <int kBits, bool kSearch>
struct QuantizeAffine : TileFormat {
  using Block = uint8_t;
  static constexpr int kBlock = 0, kMax = (1 << kBits) - 1;
  static constexpr bool kTakesImportance = kSearch;
  static ISQ_DEVICE bool f16_scales(const Shape& shape) { return shape.header == Header::kScaleBiasF16; }

  template <bool kWeighted>
  static ISQ_DEVICE bool quantize(const LaneFloats (&x)[32], LaneFloats (&importance)[32], const BlockScope& scope) {
    constexpr float kSmallestScale = 1e-7f;
    const bool f16 = f16_scales(scope.shape), as_mlx = scope.rule == Rule::kMlx;
    StagedGroup group;
    if constexpr (kSearch) group = share_group<kWeighted>(x, importance, scope);
    LaneFloats low, high;
    range_of(x, scope.team, &low, &high);
    const LaneInts negative = abs(low) > abs(high);
    LaneFloats scale = max((high - low) / (float)kMax, kSmallestScale);
    scale = select(negative, scale, -scale);
    const LaneFloats edge = select(negative, low, high);
    const LaneFloats steps = round_even(edge / scale);  // from the edge to zero
    const LaneInts on_grid = steps != 0.0f;
    scale = select(on_grid, edge / steps, scale);
    LaneFloats bias = select(on_grid, edge, 0.0f);

    Half stored_scale = !f16 ? to_bf16(scale) : as_mlx ? to_f16(scale) : scale_to_f16(scale);
    Half stored_bias = f16 ? to_f16(bias) : to_bf16(bias);
    if (!as_mlx) {
      scale = stored_scale.value;
      bias = stored_bias.value;
    }
    LaneInts codes[32];
    for_quotients(x, scope.largest, -bias, scale,
                  [&](int i, LaneFloats q) { codes[i] = nearest_code(q, (float)kMax); });
    if constexpr (kSearch) {
      AffineLine line = {scale, bias};
      fit_line(group, scope, kMax, f16, low, high, &line, codes);
      stored_scale = f16 ? to_f16(line.scale) : to_bf16(line.scale);
      stored_bias = f16 ? to_f16(line.second) : to_bf16(line.second);
    }
    if (scope.team.member == 0) {
      store_u16(scope.block, stored_scale.bits);
      store_u16(scope.block + 2, stored_bias.bits);
    }
    store_stream<kBits>(codes, scope.block + 4 + 4 * kBits * scope.team.member);
    return stored_scale.overflow || stored_bias.overflow;
  }
};

}  // namespace isqtorch::cuda
