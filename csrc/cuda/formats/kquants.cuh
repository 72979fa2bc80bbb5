// The formats with 256 weights in a block, which is a chunk. Codes lie in planes of 32 bytes with a few bits of several
// slices, so a lane's quad of a slice is four neighbouring bytes, shifted. Sub-blocks of 16 or 32 weights have small
// integer scales. These stay packed, four to a register, until they are needed.
#pragma once

#include <cstddef>

#include "blocks.h"
#include "cuda/formats/format.cuh"

namespace isqtorch::cuda {

// d * (byte - from) for the bytes of a word.
struct ByteScale {
  float d, minus;
  static ISQ_DEVICE ByteScale of(float d, float from) { return {d, -(kByteBias + from) * d}; }
  ISQ_DEVICE float times(uint32_t word, int i) const { return fmaf(d, biased_byte(word, i), minus); }
};

// What all of them share; F has `quad(block, slice, at)`: codes 32 slice + at .. + 3, `at` a multiple of 4.
template <class F, class BlockType, int kBits, int kFrom>
struct Block256 : Codes<kBits, kFrom> {
  using Block = BlockType;
  static constexpr int kBlock = 256, kAlign = kAlignOf<Block>, kMaxChunkBytes = sizeof(Block);
  static constexpr Order kOrder = Order::kQuads;

  template <Element element>
  static ISQ_DEVICE void codes(const uint8_t* chunk, int slice, int t, const Shape&,
                               uint32_t (&pairs)[Block256::template kPieces<element>][4]) {
    for (int half = 0; half < 2; ++half) {
      Block256::template quad_pairs<element>(F::quad(chunk, slice, 16 * half + 4 * t), 2 * half, pairs);
    }
  }
  static ISQ_DEVICE void floats(const uint8_t* chunk, int slice, int t, const Shape&, float (&to)[8]) {
    for (int half = 0; half < 2; ++half) {
      Block256::quad_floats(F::quad(chunk, slice, 16 * half + 4 * t), to + 4 * half);
    }
  }

 protected:
  static ISQ_DEVICE uint32_t word(const uint8_t* p) { return load_u32<kAlign>(p); }
  static ISQ_DEVICE void numbers(const uint8_t* block, int first, float (&w)[8]) {
    for (int i = 0; i < 8; i += 4) Block256::quad_numbers(F::quad(block, first / 32, first % 32 + i), w + i);
  }
};

// ---- q2k: w = d * sc * code - dmin * mn, sub-blocks of 16 ---------------------------------------------------------

struct Q2K : Block256<Q2K, BlockQ2K, 2, 0> {
  static constexpr int kGroup = 16;

  struct Row {
    ByteScale scale, offset;
    uint32_t scales[4];
  };
  static ISQ_DEVICE Row open(const uint8_t* chunk, const Shape&) {
    const uint32_t both = word(chunk + offsetof(Block, d));
    Row row = {ByteScale::of(f16_to_f32(both), 0), ByteScale::of(-f16_to_f32(both >> 16), 0), {}};
    for (int i = 0; i < 4; ++i) row.scales[i] = word(chunk + 4 * i);
    return row;
  }
  static ISQ_DEVICE Affine affine(const Row& row, const uint8_t*, int group, const Shape&) {
    const uint32_t four = row.scales[group / 4];
    return {row.scale.times(four & 0x0f0f0f0f, group % 4), row.offset.times(four >> 4 & 0x0f0f0f0f, group % 4)};
  }
  static ISQ_DEVICE uint32_t quad(const uint8_t* block, int slice, int at) {
    return word(block + offsetof(Block, qs) + 32 * (slice / 4) + at) >> (2 * (slice % 4));
  }
  static ISQ_DEVICE void decode(const uint8_t* block, int first, const Shape&, float (&w)[8]) {
    const uint32_t both = word(block + offsetof(Block, d));
    const int integers = block[first / 16];
    const float scale = f16_to_f32(both) * (float)(integers & 15);
    const float offset = f16_to_f32(both >> 16) * (float)(integers >> 4);
    numbers(block, first, w);
    for (int i = 0; i < 8; ++i) w[i] = scale * w[i] - offset;
  }
};

// ---- q3k: w = d * (t - 32) * (code - 4), sub-blocks of 16 ---------------------------------------------------------

struct Q3K : Block256<Q3K, BlockQ3K, 3, 4> {
  static constexpr int kGroup = 16;

  struct Row {
    ByteScale scale;
    uint32_t t[4];
  };
  // t[j] has 6 bits: the low four in a nibble of bytes 0-7, the high two in bits 2 (j / 4) and up of byte 8 + j % 4.
  static ISQ_DEVICE Row open(const uint8_t* chunk, const Shape&) {
    Row row = {ByteScale::of(f16_to_f32(load_u16(chunk + offsetof(Block, d))), 32), {}};
    const uint8_t* const packed = chunk + offsetof(Block, scales);
    const uint32_t high = word(packed + 8);
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = word(packed + 4 * (i % 2)) >> (4 * (i / 2));
      row.t[i] = (low & 0x0f0f0f0f) | (move_bit(high, 2 * i, 4) & 0x30303030);
    }
    return row;
  }
  static ISQ_DEVICE Affine affine(const Row& row, const uint8_t*, int group, const Shape&) {
    return {row.scale.times(row.t[group / 4], group % 4), 0.0f};
  }
  static ISQ_DEVICE uint32_t quad(const uint8_t* block, int slice, int at) {
    const uint32_t low = word(block + offsetof(Block, qs) + 32 * (slice / 4) + at) >> (2 * (slice % 4));
    const uint32_t high = move_bit(word(block + offsetof(Block, hmask) + at), slice, 2);
    return (low & 0x03030303) | (high & 0x04040404);
  }
  static ISQ_DEVICE void decode(const uint8_t* block, int first, const Shape&, float (&w)[8]) {
    const int j = first / 16;
    const uint8_t* const packed = block + offsetof(Block, scales);
    const int t = (packed[j % 8] >> (4 * (j / 8)) & 15) | (packed[8 + j % 4] >> (2 * (j / 4)) & 3) << 4;
    const float scale = f16_to_f32(load_u16(block + offsetof(Block, d))) * (float)(t - 32);
    numbers(block, first, w);
    for (int i = 0; i < 8; ++i) w[i] = scale * w[i];
  }
};

// ---- q4k, q5k: w = d * sc * code - dmin * mn, sub-blocks of 32 ----------------------------------------------------

// The twelve bytes of `scales`, for j < 4: byte j = sc_j | upper two bits of sc_{j+4}, byte j + 4 the same for mn, byte
// j + 8 = low nibbles of sc_{j+4} and mn_{j+4}.
template <class BlockType, int kBits>
struct Pairs256 : Block256<Pairs256<BlockType, kBits>, BlockType, kBits, 0> {
  using Block = BlockType;
  static constexpr int kGroup = 32;

  struct Row {
    ByteScale scale, offset;
    uint32_t sc[2], mn[2];
  };
  static ISQ_DEVICE Row open(const uint8_t* chunk, const Shape&) {
    const uint32_t both = load_u32<4>(chunk), first = load_u32<4>(chunk + 4), second = load_u32<4>(chunk + 8),
                   third = load_u32<4>(chunk + 12);
    return {ByteScale::of(f16_to_f32(both), 0),
            ByteScale::of(-f16_to_f32(both >> 16), 0),
            {first & 0x3f3f3f3f, (third & 0x0f0f0f0f) | (first >> 2 & 0x30303030)},
            {second & 0x3f3f3f3f, (third >> 4 & 0x0f0f0f0f) | (second >> 2 & 0x30303030)}};
  }
  static ISQ_DEVICE Affine affine(const Row& row, const uint8_t*, int group, const Shape&) {
    return {row.scale.times(row.sc[group / 4], group % 4), row.offset.times(row.mn[group / 4], group % 4)};
  }
  static ISQ_DEVICE uint32_t quad(const uint8_t* block, int slice, int at) {
    const uint32_t low = load_u32<4>(block + offsetof(Block, qs) + 32 * (slice / 2) + at) >> (4 * (slice % 2));
    if constexpr (kBits == 4) {
      return low;
    } else {
      const uint32_t high = move_bit(load_u32<4>(block + offsetof(Block, qh) + at), slice, 4);
      return (low & 0x0f0f0f0f) | (high & 0x10101010);
    }
  }
  static ISQ_DEVICE void decode(const uint8_t* block, int first, const Shape&, float (&w)[8]) {
    const int j = first / 32, low = j % 4;
    const int a = block[4 + low], b = block[8 + low], c = block[12 + low];
    const int sc = j < 4 ? a & 63 : (c & 15) | a >> 6 << 4, mn = j < 4 ? b & 63 : c >> 4 | b >> 6 << 4;
    const uint32_t both = load_u32<4>(block);
    const float scale = f16_to_f32(both) * (float)sc, offset = f16_to_f32(both >> 16) * (float)mn;
    Pairs256::numbers(block, first, w);
    for (int i = 0; i < 8; ++i) w[i] = scale * w[i] - offset;
  }
};
using Q4K = Pairs256<BlockQ4K, 4>;
using Q5K = Pairs256<BlockQ5K, 5>;

// ---- q6k: w = d * sc * (code - 32), sub-blocks of 16 --------------------------------------------------------------

struct Q6K : Block256<Q6K, BlockQ6K, 6, 32> {
  static constexpr int kGroup = 16;

  struct Row {
    ByteScale scale;
    uint32_t scales[4];  // plus 128, so that they are unsigned
  };
  static ISQ_DEVICE Row open(const uint8_t* chunk, const Shape&) {
    Row row = {ByteScale::of(f16_to_f32(load_u16(chunk + offsetof(Block, d))), 128), {}};
    for (int i = 0; i < 4; ++i) row.scales[i] = word(chunk + offsetof(Block, scales) + 4 * i) ^ 0x80808080;
    return row;
  }
  static ISQ_DEVICE Affine affine(const Row& row, const uint8_t*, int group, const Shape&) {
    return {row.scale.times(row.scales[group / 4], group % 4), 0.0f};
  }
  static ISQ_DEVICE uint32_t quad(const uint8_t* block, int slice, int at) {
    const uint32_t low = word(block + 64 * (slice / 4) + 32 * (slice % 2) + at) >> (4 * (slice / 2 % 2));
    const uint32_t high = move_bit(word(block + offsetof(Block, qh) + 32 * (slice / 4) + at), 2 * (slice % 4), 4);
    return (low & 0x0f0f0f0f) | (high & 0x30303030);
  }
  static ISQ_DEVICE void decode(const uint8_t* block, int first, const Shape&, float (&w)[8]) {
    const int integer = (int8_t)block[offsetof(Block, scales) + first / 16];
    const float scale = f16_to_f32(load_u16(block + offsetof(Block, d))) * (float)integer;
    numbers(block, first, w);
    for (int i = 0; i < 8; ++i) w[i] = scale * w[i];
  }
};

// ---- q8k: w = d * code, f32 scale ---------------------------------------------------------------------------------

struct Q8K : Block256<Q8K, BlockQ8K, 8, 128> {
  static constexpr int kGroup = 32;

  struct Row {
    float d;
  };
  static ISQ_DEVICE Row open(const uint8_t* chunk, const Shape&) { return {__uint_as_float(word(chunk))}; }
  static ISQ_DEVICE Affine affine(const Row& row, const uint8_t*, int, const Shape&) { return {row.d, 0.0f}; }
  static ISQ_DEVICE uint32_t quad(const uint8_t* block, int slice, int at) {
    return word(block + offsetof(Block, qs) + 32 * slice + at);
  }
  static ISQ_DEVICE void decode(const uint8_t* block, int first, const Shape&, float (&w)[8]) {
    const float d = __uint_as_float(word(block));
    numbers(block, first, w);
    for (int i = 0; i < 8; ++i) w[i] = d * w[i];
  }
};

}  // namespace isqtorch::cuda
