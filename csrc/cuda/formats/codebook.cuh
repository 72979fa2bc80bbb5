// The formats whose codes are numbers of levels in a table: iq4_nl, iq4_xs and mxfp4. A byte of sixteen holds the code
// of weight j in its low nibble and that of weight j + 16 in the high one.
//
// Levels are integers below 128, which bf16 and f16 hold exactly. So a code becomes its level by two look-ups, one for
// each byte of the 16-bit float, and nothing is added to it. A table of 16 bytes is four registers. One instruction
// picks four of eight bytes by the low three bits of four codes, for either half of the table; a third one chooses
// between the halves by the highest bits.
#pragma once

#include <cstddef>

#include "blocks.h"
#include "cuda/formats/format.cuh"

namespace isqtorch::cuda {

// The bits of an integer below 128 as bf16 or f16.
constexpr uint32_t small_integer_bits(Element element, int value) {
  const uint32_t size = value < 0 ? -value : value;
  if (size == 0) return 0;
  int exponent = 0;
  while (size >> exponent > 1) ++exponent;
  const int mantissa_bits = element == Element::kBf16 ? 7 : 10, bias = element == Element::kBf16 ? 127 : 15;
  const uint32_t mantissa = (size << (mantissa_bits - exponent)) & ((1u << mantissa_bits) - 1);
  return (value < 0 ? 0x8000u : 0) | (uint32_t)(bias + exponent) << mantissa_bits | mantissa;
}

struct Iq4Levels {
  static constexpr int8_t kAll[16] = {ISQ_IQ4_LEVELS};
};
struct E2m1Levels {
  static constexpr int8_t kAll[16] = {ISQ_E2M1_LEVELS};
};

// Bytes `byte` (0: low, 1: high) of the levels 4 quarter .. + 3.
template <class Levels>
constexpr uint32_t level_bytes(Element element, int quarter, int byte) {
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) {
    word |= (small_integer_bits(element, Levels::kAll[4 * quarter + i]) >> (8 * byte) & 255) << (8 * i);
  }
  return word;
}
template <class Levels, Element element, int quarter, int byte>
constexpr uint32_t kLevelBytes = level_bytes<Levels>(element, quarter, byte);

// What these formats share; F has `quads(block, slice, at)`: a word whose bytes hold the codes 32 slice + at .. + 3 in
// their low and 32 slice + 16 + at .. + 3 in their high nibbles, `at` a multiple of 4.
template <class F, class BlockType, class Levels>
struct LevelFormat {
  using Block = BlockType;
  static constexpr int kAlign = kAlignOf<Block>, kGroup = 32;
  static constexpr Order kOrder = Order::kQuads;
  template <Element element>
  static constexpr int kPieces = 1;
  template <Element element>
  static constexpr float kZero = 0.0f;
  template <Element element>
  static constexpr bool kSums = false;
  static constexpr float kFloatZero = 0.0f;

  template <Element element>
  static ISQ_DEVICE void codes(const uint8_t* chunk, int slice, int t, const Shape&, uint32_t (&pairs)[1][4]) {
    const uint32_t both = F::quads(chunk, slice, 4 * t);
    look_up<element>(both, pairs[0]);
    look_up<element>(both >> 4, pairs[0] + 2);
  }
  static ISQ_DEVICE void floats(const uint8_t* chunk, int slice, int t, const Shape&, float (&to)[8]) {
    const uint32_t both = F::quads(chunk, slice, 4 * t);
    for (int half = 0; half < 2; ++half) quad_floats(both >> (4 * half), to + 4 * half);
  }

 protected:
  // Levels of weights first .. + 7 of a block.
  static ISQ_DEVICE void levels(const uint8_t* block, int first, float (&w)[8]) {
    const int shift = first % 32 / 16 * 4;
    for (int i = 0; i < 8; i += 4) quad_floats(F::quads(block, first / 32, first % 16 + i) >> shift, w + i);
  }

 private:
  // The low nibbles of four bytes as the pairs (0, 2) and (1, 3).
  template <Element element>
  static ISQ_DEVICE void look_up(uint32_t quad, uint32_t* pairs) {
    quad &= 0x0f0f0f0f;
    const uint32_t four = quad | quad >> 12;  // codes 0, 2, 1, 3 in the lowest nibbles
    const uint32_t low = bytes_of<element, 0>(four), high = bytes_of<element, 1>(four);
    pairs[0] = permute(low, high, 0x5140);
    pairs[1] = permute(low, high, 0x7362);
  }
  template <Element element, int byte>
  static ISQ_DEVICE uint32_t bytes_of(uint32_t four) {
    const uint32_t within = four & 0x7777;
    const uint32_t lower =
        permute(kLevelBytes<Levels, element, 0, byte>, kLevelBytes<Levels, element, 1, byte>, within);
    const uint32_t upper =
        permute(kLevelBytes<Levels, element, 2, byte>, kLevelBytes<Levels, element, 3, byte>, within);
    return permute(lower, upper, 0x3210 | (four & 0x8888) >> 1);
  }
  static ISQ_DEVICE void quad_floats(uint32_t quad, float* floats) {
    uint32_t pairs[2];
    look_up<Element::kBf16>(quad, pairs);
    for (int i = 0; i < 2; ++i) {
      floats[i] = __uint_as_float(pairs[i] << 16);
      floats[i + 2] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
  }
};

// ---- iq4_nl: w = d * level -----------------------------------------------------------------------------------------

struct Iq4Nl : LevelFormat<Iq4Nl, BlockIq4Nl, Iq4Levels> {
  static constexpr int kBlock = 32, kMaxChunkBytes = 8 * sizeof(Block);

  struct Row {};
  static ISQ_DEVICE Row open(const uint8_t*, const Shape&) { return {}; }
  static ISQ_DEVICE Affine affine(const Row&, const uint8_t* chunk, int group, const Shape&) {
    return {f16_to_f32(load_u16(chunk + group * sizeof(Block))), 0.0f};
  }
  static ISQ_DEVICE uint32_t quads(const uint8_t* chunk, int slice, int at) {
    return load_u32<kAlign>(chunk + slice * sizeof(Block) + offsetof(Block, qs) + at);
  }
  static ISQ_DEVICE void decode(const uint8_t* block, int first, const Shape&, float (&w)[8]) {
    const float d = f16_to_f32(load_u16(block));
    levels(block, first, w);
    for (int i = 0; i < 8; ++i) w[i] = d * w[i];
  }
};

// ---- mxfp4: w = 2^(e - 128) * level --------------------------------------------------------------------------------

struct Mxfp4 : LevelFormat<Mxfp4, BlockMxfp4, E2m1Levels> {
  static constexpr int kBlock = 32, kMaxChunkBytes = 8 * sizeof(Block);

  struct Row {};
  static ISQ_DEVICE Row open(const uint8_t*, const Shape&) { return {}; }
  static ISQ_DEVICE Affine affine(const Row&, const uint8_t* chunk, int group, const Shape&) {
    return {scale(chunk[group * sizeof(Block)]), 0.0f};
  }
  // Levels are 4-bit floats times two. Shifted into place, a code is a bf16 or f16 number with another exponent bias,
  // which a product with a power of two corrects. That takes fewer instructions than looking up.
  template <Element element>
  static ISQ_DEVICE void codes(const uint8_t* chunk, int slice, int t, const Shape&, uint32_t (&pairs)[1][4]) {
    const uint32_t both = quads(chunk, slice, 4 * t);
    for (int i = 0; i < 4; ++i) pairs[0][i] = pair<element>(both >> (8 * (i % 2) + 4 * (i / 2)));
  }
  static ISQ_DEVICE void floats(const uint8_t* chunk, int slice, int t, const Shape&, float (&to)[8]) {
    const uint32_t both = quads(chunk, slice, 4 * t);
    for (int i = 0; i < 4; ++i) {
      const uint32_t two = pair<Element::kBf16>(both >> (8 * (i % 2) + 4 * (i / 2)));
      to[i / 2 * 4 + i % 2] = __uint_as_float(two << 16);
      to[i / 2 * 4 + i % 2 + 2] = __uint_as_float(two & 0xffff0000u);
    }
  }
  // Blocks begin at odd addresses, too.
  static ISQ_DEVICE uint32_t quads(const uint8_t* chunk, int slice, int at) {
    const uint8_t* const from = chunk + slice * sizeof(Block) + offsetof(Block, qs) + at;
    return load_u32<kAlign>(from);
  }
  static ISQ_DEVICE void decode(const uint8_t* block, int first, const Shape&, float (&w)[8]) {
    const float by = scale(block[0]);
    levels(block, first, w);
    for (int i = 0; i < 8; ++i) w[i] = by * w[i];
  }

 private:
  // The codes in the low nibbles of both halves.
  template <Element element>
  static ISQ_DEVICE uint32_t pair(uint32_t word) {
    if constexpr (element == Element::kBf16) {
      const uint32_t moved = (word & 0x000f000f) * 0x1040;   // to bits 12 and 6 at once
      return multiply_bf16(moved & 0x81c081c0, 0x7f007f00);  // 2^127
    } else {
      const uint32_t size = word << 9 & 0x0e000e00;
      return multiply_f16(lop3<0xea>(word << 12, 0x80008000, size), 0x78007800);  // 2^15
    }
  }
  static ISQ_DEVICE float scale(uint32_t e) { return __uint_as_float(e > 1 ? (e - 1) << 23 : 0x200000u << e); }
};

// ---- iq4_xs: w = d * (ls - 32) * level, sub-blocks of 32 -----------------------------------------------------------

struct Iq4Xs : LevelFormat<Iq4Xs, BlockIq4Xs, Iq4Levels> {
  static constexpr int kBlock = 256, kMaxChunkBytes = sizeof(Block);

  struct Row {
    float d;
    uint32_t ls[2];  // four bytes each
  };
  static ISQ_DEVICE Row open(const uint8_t* chunk, const Shape&) {
    const uint32_t head = load_u32<4>(chunk), low = load_u32<4>(chunk + offsetof(Block, scales_l));
    Row row = {f16_to_f32((uint16_t)head), {}};
    for (int i = 0; i < 2; ++i) {
      uint32_t four = low >> (16 * i) & 0xffff, two = head >> (16 + 8 * i) & 0xff;  // bits of each group
      four = (four | four << 8) & 0x00ff00ff;
      four = (four | four << 4) & 0x0f0f0f0f;
      two = (two | two << 12) & 0x000f000f;
      two = (two | two << 6) & 0x03030303;
      row.ls[i] = four | two << 4;
    }
    return row;
  }
  static ISQ_DEVICE Affine affine(const Row& row, const uint8_t*, int group, const Shape&) {
    return {row.d * (biased_byte(row.ls[group / 4], group % 4) - (kByteBias + 32)), 0.0f};
  }
  static ISQ_DEVICE uint32_t quads(const uint8_t* block, int slice, int at) {
    return load_u32<4>(block + offsetof(Block, qs) + 16 * slice + at);
  }
  static ISQ_DEVICE void decode(const uint8_t* block, int first, const Shape&, float (&w)[8]) {
    const int j = first / 32;
    const int low = block[offsetof(Block, scales_l) + j / 2] >> (4 * (j % 2)) & 15;
    const int high = block[offsetof(Block, scales_h) + j / 4] >> (2 * (j % 4)) & 3;
    const float scale = f16_to_f32(load_u16(block)) * (float)((low | high << 4) - 32);
    levels(block, first, w);
    for (int i = 0; i < 8; ++i) w[i] = scale * w[i];
  }
};

}  // namespace isqtorch::cuda
