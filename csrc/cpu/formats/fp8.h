// FP8: 128 codes of type e4m3fn under one f32 scale, w = value(code) * scale.
//
//   code: sign | exponent (4 bits, bias 7) | mantissa (3 bits)     largest 448 = 0x7e, NaN = 0x7f, no infinities
#pragma once

#include "cpu/quantize/blockwise.h"

namespace isqtorch::ISQ_ISA {

// The value of every code. A table, because bit tricks on f32 would pass through subnormal numbers.
struct E4m3Table {
  float value[256];
  constexpr E4m3Table() : value() {
    for (int code = 0; code < 256; ++code) {
      const int exponent = code >> 3 & 15, mantissa = code & 7;
      float magnitude = (exponent ? 8 + mantissa : mantissa) / 512.0f;  // of 2^-9
      for (int i = 1; i < exponent; ++i) magnitude *= 2;
      if ((code & 127) == 127) magnitude = __builtin_nanf("");
      value[code] = code & 128 ? -magnitude : magnitude;
    }
  }
};
inline constexpr E4m3Table kE4m3;

struct Fp8 : BlockwiseFormat {
#pragma pack(push, 1)
  struct Block {
    float scale;
    uint8_t codes[128];
  };
#pragma pack(pop)
  static constexpr const char* kName = "fp8";
  static constexpr int kBlock = 128;
  static constexpr bool kTakesImportance = false;
  static constexpr float kLargest = 448.0f;

  static void decode(const Block& block, float* w) {
    const float scale = block.scale;
    for (int i = 0; i < 128; ++i) w[i] = kE4m3.value[block.codes[i]] * scale;
  }

  static I quantize(const LaneBlocks<128>& in, Block* out) {
    const F largest = largest_magnitude(in.x, 128);
    // At least the smallest normal number: kernels may flush subnormal scales to zero.
    const F scale = select(largest == 0.0f, splat(1.0f), max(largest / kLargest, splat(FLT_MIN)));
    for (int i = 0; i < 128; ++i) {
      const I code = encode(in.x[i] / scale);
      for (int l = 0; l < kLanes; ++l) out[l].codes[i] = (uint8_t)code[l];
    }
    for (int l = 0; l < kLanes; ++l) out[l].scale = scale[l];
    return splat(0);
  }

 private:
  // To nearest even, saturating.
  static I encode(F f) {
    const F magnitude = min(abs(f), splat(kLargest));
    const I bits = as_int(magnitude);
    const I normal = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);  // keep 3 mantissa bits; exponent bias 127 to 7
    const I subnormal = truncate(round_even(magnitude * 512.0f));               // of 2^-9; 8 of them are the first normal number
    return select(magnitude < 0x1p-6f, subnormal, normal) | (as_int(f) >> 24 & 0x80);
  }
};

}  // namespace isqtorch::ISQ_ISA
