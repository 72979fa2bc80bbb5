// FP8: 128 codes of type e4m3 behind one f32 scale, w = value(code) * scale.
//
//   code: sign | exponent (4 bits, bias 7) | mantissa (3 bits)     subnormal numbers, NaN = 0x7f, no infinities
//
// Shifted into place, a code is a bf16 or f16 number with an exponent bias other than 7, which a product with a power
// of two corrects. (If the scale did that, bf16 products of 2^-120 with activations would underflow in f32.)
#pragma once

#include "blocks.h"
#include "cuda/formats/format.cuh"

namespace isqtorch::cuda {

struct Fp8 {
  using Block = BlockFp8;
  static constexpr int kBlock = 128, kAlign = 4, kGroup = 32, kMaxChunkBytes = 2 * sizeof(Block);
  static constexpr Order kOrder = Order::kQuads;
  template <Element element>
  static constexpr int kPieces = 1;
  template <Element element>
  static constexpr float kZero = 0.0f;
  template <Element element>
  static constexpr bool kSums = false;

  struct Row {};
  static ISQ_DEVICE Row open(const uint8_t*, const Shape&) { return {}; }

  template <Element element>
  static ISQ_DEVICE void codes(const uint8_t* chunk, int slice, int t, const Shape&, uint32_t (&pairs)[1][4]) {
    const uint8_t* const at = chunk + slice / 4 * sizeof(Block) + 4 + 32 * (slice % 4) + 4 * t;
    for (int half = 0; half < 2; ++half) {
      const uint32_t quad = load_u32<4>(at + 16 * half);
      pairs[0][2 * half] = pair<element>(quad << 8);
      pairs[0][2 * half + 1] = pair<element>(quad);
    }
  }
  static constexpr float kFloatZero = 0.0f;
  static ISQ_DEVICE void floats(const uint8_t* chunk, int slice, int t, const Shape&, float (&to)[8]) {
    const uint8_t* const at = chunk + slice / 4 * sizeof(Block) + 4 + 32 * (slice % 4) + 4 * t;
    for (int half = 0; half < 2; ++half) quad_floats(load_u32<4>(at + 16 * half), to + 4 * half);
  }
  static ISQ_DEVICE Affine affine(const Row&, const uint8_t* chunk, int group, const Shape&) {
    return {__uint_as_float(load_u32<4>(chunk + group / 4 * sizeof(Block))), 0.0f};
  }
  static ISQ_DEVICE void decode(const uint8_t* block, int first, const Shape&, float (&w)[8]) {
    const float scale = __uint_as_float(load_u32<4>(block));
    for (int i = 0; i < 8; i += 4) quad_floats(load_u32<4>(block + 4 + first + i), w + i);
    for (int i = 0; i < 8; ++i) w[i] *= scale;
  }

 private:
  static ISQ_DEVICE void quad_floats(uint32_t quad, float* floats) {
    const uint32_t even = pair<Element::kBf16>(quad << 8), odd = pair<Element::kBf16>(quad);  // exact in bf16
    floats[0] = __uint_as_float(even << 16);
    floats[1] = __uint_as_float(odd << 16);
    floats[2] = __uint_as_float(even & 0xffff0000);
    floats[3] = __uint_as_float(odd & 0xffff0000);
  }

  // The codes in the upper bytes of both halves. Adding one to a code carries into the next bit of the exponent only if
  // it is NaN; then the rest of its exponent is set.
  template <Element element>
  static ISQ_DEVICE uint32_t pair(uint32_t codes) {
    if constexpr (element == Element::kBf16) {
      const uint32_t size = codes >> 4 & 0x07f007f0, nan = (size + 0x00100010) & 0x08000800;
      return multiply_bf16(lop3<0xea>(codes, 0x80008000, size + 15 * nan), 0x7b807b80);  // 2^120
    } else {
      const uint32_t size = codes >> 1 & 0x3f803f80;
      const uint32_t with_nan = lop3<0xea>(size + 0x00800080, 0x40004000, size);
      return multiply_f16(lop3<0xea>(codes, 0x80008000, with_nan), 0x5c005c00);  // 2^8
    }
  }
};

}  // namespace isqtorch::cuda
