// The formats with 32 weights in a block. A 4-bit byte j holds weight j in its low nibble and j + 16 in the high one, so
// the four bytes from 4t on are lane t's quads of both halves.
#pragma once

#include "blocks.h"
#include "cuda/formats/format.cuh"

namespace isqtorch::cuda {

struct Q4_0 {
  using Block = BlockQ4_0;
  static constexpr int kBlock = 32, kAlign = 2, kGroup = 32, kMaxChunkBytes = 8 * sizeof(Block);
  static constexpr Order kOrder = Order::kQuads;
  template <Element element>
  static constexpr int kPieces = 1;
  template <Element element>
  static constexpr float kZero = kMagicZero<element>;
  template <Element element>
  static constexpr bool kSums = true;

  struct Row {};
  static ISQ_DEVICE Row open(const uint8_t*, const Shape&) { return {}; }

  template <Element element>
  static ISQ_DEVICE void codes(const Row&, const uint8_t* chunk, int slice, int t, const Shape&,
                               uint32_t (&pairs)[1][4]) {
    const uint32_t bytes = load_u32<kAlign>(chunk + slice * sizeof(Block) + 2 + 4 * t);
    for (int i = 0; i < 4; ++i) {  // low nibbles of bytes 0 and 2, of 1 and 3, then the high ones
      pairs[0][i] = magic_pair<element>(bytes >> (8 * (i % 2) + 4 * (i / 2)), 0x000f000f);
    }
  }
  static ISQ_DEVICE Affine affine(const Row&, const uint8_t* chunk, int group, const Shape&) {
    const float d = f16_to_f32(load_u16(chunk + group * sizeof(Block)));
    return {d, -8.0f * d};
  }
  static ISQ_DEVICE void decode(const uint8_t* block, int first, const Shape&, float (&w)[8]) {
    const float d = f16_to_f32(load_u16(block));
    for (int i = 0; i < 8; ++i) {
      const int e = first + i, byte = block[2 + e % 16];
      w[i] = (float)((e < 16 ? byte & 15 : byte >> 4) - 8) * d;
    }
  }
};

}  // namespace isqtorch::cuda
