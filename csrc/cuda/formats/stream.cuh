// AFQ and HQQ: groups of 32, 64 or 128 codes of any width as one little-endian bit stream, behind two 16-bit numbers:
//
//   AFQ: w = scale * code + bias, bf16 or f16          HQQ: w = (code - zero) * scale, f16
//
// Eight codes fill kBits bytes. So lane t's eight weights of a slice are the bytes kBits t .. kBits (t + 1) - 1 of its
// kBits words, which lie in one word or in two neighbouring words.
#pragma once

#include "cuda/formats/format.cuh"

namespace isqtorch::cuda {

template <int kBits>
struct BitStream : Codes<kBits, 0> {
  using Block = uint8_t;
  static constexpr int kBlock = 0, kAlign = 4, kGroup = 32, kMaxChunkBytes = 8 * (4 + 4 * kBits);
  static constexpr Order kOrder = kBits == 8 ? Order::kQuads : Order::kOcts;
  static constexpr bool kMayBeHqq = kBits == 4 || kBits == 8;
  static constexpr int block_bytes(int block) { return 4 + block * kBits / 8; }

  struct Row {};
  static ISQ_DEVICE Row open(const uint8_t*, const Shape&) { return {}; }

  template <Element element>
  static ISQ_DEVICE void codes(const uint8_t* chunk, int slice, int t, const Shape& shape,
                               uint32_t (&pairs)[BitStream::template kPieces<element>][4]) {
    const uint8_t* const stream = chunk + 4 * kBits * slice + 4 * (block_of(slice, shape) + 1);
    if constexpr (kBits == 8) {
      for (int half = 0; half < 2; ++half) {
        BitStream::template quad_pairs<element>(load_u32<4>(stream + 16 * half + 4 * t), 2 * half, pairs);
      }
    } else {
      uint32_t spread[4];
      spread_oct(stream, t, spread);
      for (int i = 0; i < 4; ++i) pairs[0][i] = magic_pair<element>(spread[i], BitStream::kHalves);
    }
  }
  static ISQ_DEVICE void floats(const uint8_t* chunk, int slice, int t, const Shape& shape, float (&to)[8]) {
    const uint8_t* const stream = chunk + 4 * kBits * slice + 4 * (block_of(slice, shape) + 1);
    if constexpr (kBits == 8) {
      for (int half = 0; half < 2; ++half) {
        BitStream::quad_floats(load_u32<4>(stream + 16 * half + 4 * t), to + 4 * half);
      }
    } else if constexpr (kBits == 4) {
      const uint32_t x = load_u32<4>(stream + 4 * t), even = x & 0x0f0f0f0f, odd = x >> 4 & 0x0f0f0f0f;
      for (int i = 0; i < 8; ++i) to[i] = BitStream::byte_float(i % 2 ? odd : even, i / 2);
    } else {
      uint32_t spread[4];
      spread_oct(stream, t, spread);
      for (int i = 0; i < 8; ++i) to[i] = BitStream::byte_float(spread[i % 4] & BitStream::kHalves, i / 4 * 2);
    }
  }
  static ISQ_DEVICE Affine affine(const Row&, const uint8_t* chunk, int group, const Shape& shape) {
    const Affine stored = numbers(chunk + block_of(group, shape) * shape.block_bytes, shape.header);
    return {stored.scale, is_hqq(shape) ? -stored.offset * stored.scale : stored.offset};
  }
  static ISQ_DEVICE void decode(const uint8_t* block, int first, const Shape& shape, float (&w)[8]) {
    const Affine stored = numbers(block, shape.header);
    const uint8_t* const stream = block + 4 + first / 32 * 4 * kBits;
    if constexpr (kBits == 8) {
      for (int i = 0; i < 8; i += 4) BitStream::quad_numbers(load_u32<4>(stream + first % 32 + i), w + i);
    } else {
      uint32_t spread[4];
      spread_oct(stream, first % 32 / 8, spread);
      for (int i = 0; i < 8; ++i) {
        w[i] = biased_byte(spread[i % 4] & BitStream::kHalves, i / 4 * 2) - kByteBias;
      }
    }
    for (int i = 0; i < 8; ++i) {
      w[i] = is_hqq(shape) ? (w[i] - stored.offset) * stored.scale : stored.scale * w[i] + stored.offset;
    }
  }

 private:
  static ISQ_DEVICE bool is_hqq(const Shape& shape) { return kMayBeHqq && shape.header == Header::kScaleZeroF16; }

  // The block of a chunk that a slice belongs to. Blocks have 32 << log weights.
  static ISQ_DEVICE int block_of(int slice, const Shape& shape) { return slice >> (shape.block >> 6); }

  // The scale, and the bias or zero point.
  static ISQ_DEVICE Affine numbers(const uint8_t* block, Header header) {
    const uint32_t both = load_u32<4>(block);
    if (header == Header::kScaleBiasBf16) return {__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000)};
    return {f16_to_f32(both), f16_to_f32(both >> 16)};
  }

  // Eight codes as four words: code i in the low bits of word i, code i + 4 in the low bits of its upper half. Other
  // bits are undefined.
  static ISQ_DEVICE void spread_oct(const uint8_t* stream, int t, uint32_t (&spread)[4]) {
    if constexpr (kBits == 2) {
      const uint32_t x = permute(load_u16(stream + 2 * t), 0, 0x4140);
      for (int i = 0; i < 4; ++i) spread[i] = x >> (2 * i);
    } else if constexpr (kBits == 4) {
      const uint32_t x = load_u32<4>(stream + 4 * t);
      for (int i = 0; i < 4; ++i) spread[i] = x >> (4 * i);
    } else {
      // The words with the first and the last byte (never beyond the block), and where the first byte is in its word.
      const uint32_t a = load_u32<4>(stream + kBits * t / 4 * 4),
                     b = load_u32<4>(stream + (kBits * t + kBits - 1) / 4 * 4);
      const int byte = kBits * t % 4;
      if constexpr (kBits == 3) {
        // Code i at bit 3 i: codes 0 .. 3 from bit 0, 4 .. 7 from bit 12. Then the two groups in one half each.
        const uint32_t v = permute(a, b, 0x3210 + 0x1111 * byte);
        const uint32_t x = lop3<0xca>(0x0000ffff, v, v << 4);
        for (int i = 0; i < 4; ++i) spread[i] = x >> (3 * i);
      } else if constexpr (kBits == 5) {
        const uint32_t low = permute(a, b, 0x3210 + 0x1111 * byte);                     // code i at 5 i
        const uint32_t high = permute(a, b, 0x0432 + 0x0111 * byte) >> 4;               // code 4 + i at 5 i
        const uint32_t x = permute(low, high, 0x5410), y = permute(low, high, 0x6521);  // bits 0-15 and 8-23 of each
        for (int i = 0; i < 3; ++i) spread[i] = x >> (5 * i);
        spread[3] = y >> 7;
      } else if constexpr (kBits == 6) {
        // Codes 0 .. 3 are in bytes 0 .. 2, codes 4 .. 7 in bytes 3 .. 5. x gets the lower two bytes of each, y the
        // upper two.
        const uint32_t x = permute(a, b, byte ? 0x6532 : 0x4310), y = permute(a, b, byte ? 0x7643 : 0x5421);
        for (int i = 0; i < 2; ++i) spread[i] = x >> (6 * i);
        for (int i = 2; i < 4; ++i) spread[i] = y >> (6 * i - 8);
      }
    }
  }
};

// The formats of both families as types; list.cuh says what they stand for.
template <int kBits, int kGroup, Header kHeader>
struct StreamFormat;
template <int kBits, int kGroup, Dtype kScale>
using Afq = StreamFormat<kBits, kGroup, kScale == Dtype::kF16 ? Header::kScaleBiasF16 : Header::kScaleBiasBf16>;
template <int kBits, int kGroup>
using Hqq = StreamFormat<kBits, kGroup, Header::kScaleZeroF16>;

}  // namespace isqtorch::cuda
