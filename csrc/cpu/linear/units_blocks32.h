// Units of ggml's 32-weight formats: sixteen blocks, lane l = block l.
#pragma once

#include "cpu/linear/unit_of.h"

namespace isqtorch::ISQ_ISA {

// Sixteen bytes at `offset` of the blocks i, 4 + i, 8 + i and 12 + i.
template <int kBlockBytes>
ISQ_INLINE Bytes quarters_of_blocks(const uint8_t* unit, int i, int offset) {
  const uint8_t* first = unit + i * kBlockBytes + offset;
  return from_quarters(load_16(first), load_16(first + 4 * kBlockBytes), load_16(first + 8 * kBlockBytes),
                       load_16(first + 12 * kBlockBytes));
}

// q4_0 q4_1 q5_0 q5_1: low nibbles are weights 0-15 of a block, high nibbles 16-31; the fifth bit comes from qh.
template <class Block, int kBits, bool kHasMin>
struct NibbleUnit {
  static constexpr int kWeights = 512, kBytes = 16 * sizeof(Block), kReadsBeyond = 0;
  static constexpr int kMaxCode = (1 << kBits) - 1, kCenter = kHasMin ? 0 : 1 << (kBits - 1);
  static constexpr bool kAffine = kHasMin;

  static constexpr int weight_at(int v, int j) { return 32 * (j / 16 * 4 + v / 2) + 16 * (v % 2) + j % 16; }

  ISQ_INLINE static void load(const uint8_t* unit, const UnitLayout&, Bytes* codes, Floats* scale, Floats* offset) {
    constexpr int kStride = sizeof(Block);
    for (int i = 0; i < 4; ++i) {
      const Bytes qs = quarters_of_blocks<kStride>(unit, i, offsetof(Block, qs));
      codes[2 * i] = bit_field<0, 4>(qs);
      codes[2 * i + 1] = bit_field<4, 4>(qs);
      if constexpr (kBits == 5) {
        const uint8_t *low[4], *high[4];  // fifth bits of the weights 0-15 and 16-31 of four blocks
        for (int q = 0; q < 4; ++q) {
          low[q] = unit + (4 * q + i) * kStride + offsetof(Block, qh);
          high[q] = low[q] + 2;
        }
        codes[2 * i] = add_where(codes[2 * i], low, 16);
        codes[2 * i + 1] = add_where(codes[2 * i + 1], high, 16);
      }
    }
    const Ints head = block_heads<kStride, kHasMin ? 4 : 2>(unit);
    *scale = low_f16(head);
    if constexpr (kHasMin) *offset = high_f16(head);
  }
};

// q8_0 q8_1: signed bytes.
template <class Block>
struct ByteUnit {
  static constexpr int kWeights = 512, kBytes = 16 * sizeof(Block), kReadsBeyond = 0;
  static constexpr int kMaxCode = 255, kCenter = 128;
  static constexpr bool kAffine = false;

  static constexpr int weight_at(int v, int j) { return 32 * (j / 16 * 4 + v / 2) + 16 * (v % 2) + j % 16; }

  ISQ_INLINE static void load(const uint8_t* unit, const UnitLayout&, Bytes* codes, Floats* scale, Floats*) {
    constexpr int kStride = sizeof(Block);
    for (int v = 0; v < 8; ++v) {
      codes[v] = quarters_of_blocks<kStride>(unit, v / 2, offsetof(Block, qs) + 16 * (v % 2)) ^ 0x80;
    }
    *scale = low_f16(block_heads<kStride, 2>(unit));
  }
};

template <>
struct UnitOf<Q4_0> : FixedUnit<NibbleUnit<BlockQ4_0, 4, false>> {};
template <>
struct UnitOf<Q4_1> : FixedUnit<NibbleUnit<BlockQ4_1, 4, true>> {};
template <>
struct UnitOf<Q5_0> : FixedUnit<NibbleUnit<BlockQ5_0, 5, false>> {};
template <>
struct UnitOf<Q5_1> : FixedUnit<NibbleUnit<BlockQ5_1, 5, true>> {};
template <>
struct UnitOf<Q8_0> : FixedUnit<ByteUnit<BlockQ8_0>> {};
template <>
struct UnitOf<Q8_1> : FixedUnit<ByteUnit<BlockQ8_1>> {};

}  // namespace isqtorch::ISQ_ISA
