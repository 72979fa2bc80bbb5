// The formats with 32 weights in a block. A 4-bit byte j holds weight j in its low nibble and j + 16 in the high one,
// so the four bytes from 4t on are lane t's quads of both halves.
#pragma once

#include <cstddef>

#include "blocks.h"
#include "cuda/formats/format.cuh"

namespace isqtorch::cuda {

// w = d * (code - kFrom), or d * code + m.
template <class BlockType, int kBits, int kFrom, bool kHasOffset = false>
struct Block32 : Codes<kBits, kFrom> {
  using Block = BlockType;
  static constexpr int kBlock = 32, kAlign = kAlignOf<Block>, kGroup = 32, kMaxChunkBytes = 8 * sizeof(Block);
  static constexpr Order kOrder = Order::kQuads;

  struct Row {};
  static ISQ_DEVICE Row open(const uint8_t*, const Shape&) { return {}; }

  template <Element element>
  static ISQ_DEVICE void codes(const uint8_t* chunk, int slice, int t, const Shape&,
                               uint32_t (&pairs)[Block32::template kPieces<element>][4]) {
    const uint8_t* const block = chunk + slice * sizeof(Block);
    for (int half = 0; half < 2; ++half) {
      Block32::template quad_pairs<element>(quad(block, half, 4 * t), 2 * half, pairs);
    }
  }
  static ISQ_DEVICE void floats(const uint8_t* chunk, int slice, int t, const Shape&, float (&to)[8]) {
    const uint8_t* const block = chunk + slice * sizeof(Block);
    for (int half = 0; half < 2; ++half) Block32::quad_floats(quad(block, half, 4 * t), to + 4 * half);
  }
  static ISQ_DEVICE Affine affine(const Row&, const uint8_t* chunk, int group, const Shape&) {
    return numbers(chunk + group * sizeof(Block));
  }
  static ISQ_DEVICE void decode(const uint8_t* block, int first, const Shape&, float (&w)[8]) {
    const auto [d, m] = numbers(block);
    for (int i = 0; i < 8; i += 4) Block32::quad_numbers(quad(block, first / 16, first % 16 + i), w + i);
    for (int i = 0; i < 8; ++i) w[i] = kHasOffset ? w[i] * d + m : w[i] * d;
  }

 private:
  static ISQ_DEVICE Affine numbers(const uint8_t* block) {
    if constexpr (!kHasOffset) return {f16_to_f32(load_u16(block)), 0.0f};
    const uint32_t both = load_u32<4>(block);
    return {f16_to_f32(both), f16_to_f32(both >> 16)};
  }

  // Codes 16 half + at .. + 3; `at` is a multiple of 4.
  static ISQ_DEVICE uint32_t quad(const uint8_t* block, int half, int at) {
    const uint8_t* const qs = block + offsetof(Block, qs);
    if constexpr (kBits == 8) {
      return load_u32<kAlign>(qs + 16 * half + at);
    } else {
      const uint32_t low = load_u32<kAlign>(qs + at) >> (4 * half);
      if constexpr (kBits == 4) return low;
      // Four neighbouring bits become bit 4 of four bytes: the product puts bit i at 7 i + 4 + (0, 7, 14, 21).
      if constexpr (kBits == 5) {
        const uint32_t high = load_u16(block + offsetof(Block, qh) + 2 * half) >> at & 15;
        return (low & 0x0f0f0f0f) | (high * 0x02040810u & 0x10101010u);
      }
    }
  }
};

using Q4_0 = Block32<BlockQ4_0, 4, 8>;
using Q4_1 = Block32<BlockQ4_1, 4, 0, true>;
using Q5_0 = Block32<BlockQ5_0, 5, 16>;
using Q5_1 = Block32<BlockQ5_1, 5, 0, true>;
using Q8_0 = Block32<BlockQ8_0, 8, 128>;
using Q8_1 = Block32<BlockQ8_1, 8, 128>;

}  // namespace isqtorch::cuda
