// FP8: 128 codes of type e4m3fn under one f32 scale, w = value(code) * scale.
//
//   code: sign | exponent (4 bits, bias 7) | mantissa (3 bits)     largest 448 = 0x7e, NaN = 0x7f, no infinities
#pragma once

#include "cpu/formats/list.h"
#include "cpu/quantize/blockwise.h"

namespace isqtorch::ISQ_ISA {

struct Fp8 : BlockwiseFormat {
  using Block = BlockFp8;
  static constexpr int kBlock = 128;
  static constexpr bool kTakesImportance = false, kF16Scales = false;
  static constexpr float kLargest = 448.0f;

  static void decode(const Block& block, float* w) {
    const float scale = block.scale;
    for (int i = 0; i < 128; i += kLanes) store_lanes(value_of(load_bytes(block.codes + i)) * scale, w + i);
  }

  struct Chosen {
    LaneInts codes[128];
    LaneFloats scale;
    LaneInts overflow() const { return splat<LaneInts>(0); }
    LaneFloats value(int, LaneInts code) const { return value_of(code) * scale; }
  };
  // By size, with the sign of the weight. There is one zero, and NaN is not among them.
  static constexpr int kFirstRank = -0x7e, kLastRank = 0x7e;
  static LaneInts code_of(LaneInts rank) { return select(rank < 0, 0x80 - rank, rank); }
  static LaneInts rank_of(LaneInts code) { return select(code < 0x80, code, 0x80 - code); }

  static void choose(const LaneBlocks<128>& in, Chosen* out) {
    // The scale is at least the smallest normal number, because kernels may flush subnormal scales to zero.
    const LaneFloats scale = select(in.largest == 0.0f, 1.0f, max(in.largest / kLargest, splat<LaneFloats>(FLT_MIN)));
    for (int i = 0; i < 128; ++i) out->codes[i] = encode(in.x[i] / scale);
    out->scale = scale;
  }

  static void store(const Chosen& chosen, Block* out) {
    store_bytes<128>(out->codes, sizeof(Block), [&](int i) { return chosen.codes[i]; });
    for (int l = 0; l < kWidth; ++l) out[l].scale = chosen.scale[l];
  }

 private:
  // Exact. No step uses a subnormal f32, which the thread may flush to zero.
  template <class V>
  static FloatOf<V> value_of(V code) {
    const V magnitude = code & 0x7f;
    const FloatOf<V> normal = as_float((magnitude << 20) + (120 << 23));  // exponent bias 7 to 127
    const FloatOf<V> subnormal = to_float(magnitude) * 0x1p-9f;
    const FloatOf<V> value = select(magnitude < 8, subnormal, normal);
    const FloatOf<V> with_nan = select(magnitude == 0x7f, splat<FloatOf<V>>(ISQ_NAN), value);
    return as_float(as_int(with_nan) | (code & 0x80) << 24);
  }

  // To nearest even, saturating.
  static LaneInts encode(LaneFloats f) {
    const LaneFloats magnitude = min(abs(f), splat<LaneFloats>(kLargest));
    const LaneInts bits = as_int(magnitude);
    // Keeps 3 mantissa bits and changes the exponent bias from 127 to 7.
    const LaneInts normal = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
    // In steps of 2^-9; 8 steps are the smallest normal number.
    const LaneInts subnormal = truncate(round_even(magnitude * 512.0f));
    return select(magnitude < 0x1p-6f, subnormal, normal) | (as_int(f) >> 24 & 0x80);
  }
};

}  // namespace isqtorch::ISQ_ISA
