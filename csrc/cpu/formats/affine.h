// AFQ, MLX's affine formats: groups of 32, 64 or 128 weights with a 16-bit scale and bias, w = scale * code + bias.
//
// Code 0 of a group is its extreme of larger magnitude, and one code stands for exactly 0; so the scale is negative
// where the positive extreme is the larger one (mlx/backend/cpu/quantized.cpp). By default codes are computed with the
// rounded scale and bias that are stored. Rule::kMlx uses the unrounded ones, as MLX does. Rule::kSearch looks for a
// better scale and bias.
#pragma once

#include "cpu/formats/bitstream.h"
#include "cpu/formats/list.h"
#include "cpu/quantize/line_fit.h"

namespace isqtorch::ISQ_ISA {

// Rounds a scale to f16, subnormal results away from zero. Subnormal numbers are so coarse that a scale rounded down
// would cut off a large part of the group's range.
ISQ_INLINE Halves scale_to_f16(LaneFloats f) {
  Halves h = to_f16(f);
  const LaneInts short_of = (abs(h.value) < abs(f)) & (abs(f) < 0x1p-14f);
  for (int l = 0; l < kWidth; ++l) {
    if (short_of[l]) h.value[l] = f16_to_f32(++h.bits[l]);
  }
  return h;
}

// Codes 0 .. nmax, scale and bias of a unit of groups. Not inlined: one copy serves every number of bits.
template <int kGroup>
ISQ_NOINLINE void choose_affine(const LaneBlocks<kGroup>& in, int nmax, bool f16, LaneInts* codes, Halves* stored_scale,
                                Halves* stored_bias) {
  constexpr float kSmallestScale = 1e-7f;
  LaneFloats low, high;
  first_min_max(in.x, kGroup, &low, &high);
  const LaneInts negative = abs(low) > abs(high);
  LaneFloats scale = max((high - low) / (float)nmax, splat<LaneFloats>(kSmallestScale));
  scale = select(negative, scale, -scale);
  const LaneFloats edge = select(negative, low, high);
  const LaneFloats steps = round_even(edge / scale);  // from the edge to zero
  const LaneInts on_grid = steps != 0.0f;
  scale = select(on_grid, edge / steps, scale);
  LaneFloats bias = select(on_grid, edge, 0.0f);

  const bool as_mlx = in.rule == Rule::kMlx;
  *stored_scale = !f16 ? to_bf16(scale) : as_mlx ? to_f16(scale) : scale_to_f16(scale);
  *stored_bias = f16 ? to_f16(bias) : to_bf16(bias);
  if (!as_mlx) {
    scale = stored_scale->value;
    bias = stored_bias->value;
  }
  for (int i = 0; i < kGroup; ++i) {  // & nmax: where the scale is 0, of a group of one huge number, the code is NaN
    codes[i] = truncate(clamp(round_even((in.x[i] - bias) / scale), 0.0f, (float)nmax)) & nmax;
  }
  if (in.rule != Rule::kSearch) return;
  AffineLine line = {scale, bias};
  fit_lines(in, nmax, f16, &line, codes);
  *stored_scale = f16 ? to_f16(line.scale) : to_bf16(line.scale);
  *stored_bias = f16 ? to_f16(line.second) : to_bf16(line.second);
}

template <int kBits, int kGroup, Dtype kScaleType>
struct Afq : BlockwiseFormat {
#pragma pack(push, 1)
  struct Block {
    uint16_t scale, bias;
    uint8_t codes[kGroup * kBits / 8];
  };
#pragma pack(pop)
  static constexpr int kBlock = kGroup, kMax = (1 << kBits) - 1;
  static constexpr bool kTakesImportance = false;
  static constexpr uint8_t kRules = rule_bit(Rule::kMlx) | rule_bit(Rule::kSearch);
  static constexpr bool kF16 = kScaleType == Dtype::kF16, kF16Scales = kF16;

  static void decode(const Block& block, float* w) {
    const float scale = kF16 ? f16_to_f32(block.scale) : bf16_to_f32(block.scale);
    const float bias = kF16 ? f16_to_f32(block.bias) : bf16_to_f32(block.bias);
    load_stream<kBits>(block.codes, kGroup, w, [=](F8 codes) { return scale * codes + bias; });
  }

  struct Chosen {
    LaneInts codes[kGroup];
    Halves scale, bias;
    LaneInts overflow() const { return scale.overflow | bias.overflow; }
    LaneFloats value(int, LaneInts code) const { return scale.value * to_float(code) + bias.value; }
  };
  static constexpr int kLastRank = kMax;

  static void choose(const LaneBlocks<kGroup>& in, Chosen* out) {
    choose_affine<kGroup>(in, kMax, kF16, out->codes, &out->scale, &out->bias);
  }

  static void store(const Chosen& chosen, Block* out) {
    for (int l = 0; l < kWidth; ++l) {
      out[l].scale = chosen.scale.bits[l];
      out[l].bias = chosen.bias.bits[l];
      store_stream<kBits>(chosen.codes, l, kGroup, out[l].codes);
    }
  }
};

}  // namespace isqtorch::ISQ_ISA
