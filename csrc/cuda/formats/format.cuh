// What the kernels know of a format. Each format has one struct (ggml32.cuh, kquants.cuh, codebook.cuh, stream.cuh,
// fp8.cuh), and
// only that knows the format's bytes.
//
// A struct offers three views. `decode` gives exact weights, equal to the reference in every bit: for dequantize,
// embedding, and whatever needs floats. `codes` and `affine` give a product its operands without computing any weight:
// integer codes as bf16 or f16 numbers, which a matrix unit multiplies with the activations, and the numbers that scale
// the sum afterwards:
//
//   sum of w x  =  scale * sum of (zero + code) x  +  (offset - zero * scale) * sum of x     over a group of weights
//
// `floats` and `affine` give weights to within an f32 rounding, w = scale * (zero + code) + (offset - zero * scale),
// for a product with so many tokens that unpacking weights costs less than scaling sums.
//
// A product takes a row in chunks of 256 weights. Every block size divides 256, so a chunk consists of whole blocks
// (the last chunk of a row may have fewer). The bytes of a chunk are copied to shared memory unchanged and unpacked
// from there: the blocks of most formats are aligned to two bytes only, but this way rows are read in whole, aligned
// pieces. A chunk is eight slices of 32 weights; a slice is two matrix steps of 16.
#pragma once

#include "cuda/gpu.h"
#include "cuda/launch.h"

namespace isqtorch::cuda {

using namespace isqtorch::gpu;

constexpr int kChunk = 256, kSlice = 32;

// The order of the terms of a dot product is free, so each lane takes weights that lie together in memory, in the order
// in which they unpack. x is read in the same order. This says which eight weights of a slice lane t of a quad (t =
// lane % 4) has, as four pairs; pairs 0 and 1 belong to the first step, 2 and 3 to the second.
enum class Order : int {
  kQuads,  // pairs of 4t + {(0, 2), (1, 3)}, then of 16 + 4t + {(0, 2), (1, 3)}: a step is 16 weights in a row
  kOcts,   // pairs of 8t + {(0, 4), (1, 5), (2, 6), (3, 7)}
};

// The numbers of a group: w = scale * code + offset.
struct Affine {
  float scale, offset;
};

// The members of a format's struct. A family may have one struct; what its formats differ in is in the Shape
// (launch.h).
//
//   using Block                        its bytes, or uint8_t where Shape has the size
//   static constexpr int kBlock        weights in a block; 0 where Shape says so
//   static constexpr int kAlign        of every block's address: 1, 2 or 4
//   static constexpr int kGroup        16 or 32: weights that share scale and offset (32 also where more do)
//   static constexpr Order kOrder      kQuads if kGroup is 16
//   static constexpr int kMaxChunkBytes
//   kPieces<element>                   1, or 2 where a code needs two numbers that add up to zero + code (see Codes)
//   kZero<element>                     what the pieces of a code add to it
//   kSums<element>                     whether the sum of x is needed (false: zero and offset are always 0)
//
//   struct Row                         what a lane keeps in registers of one row's chunk for affine
//   static Row open(const uint8_t* chunk, const Shape&)
//   static void codes<element>(const uint8_t* chunk, int slice, int t, const Shape&,
//                              uint32_t (&pairs)[kPieces][4])     two numbers each, the first in the low half
//   kFloatZero                         what a float adds to its code
//   static void floats(const uint8_t* chunk, int slice, int t, const Shape&, float (&numbers)[8])
//                                      zero + code of a lane's weights in their order, not in pairs
//   static Affine affine(const Row&, const uint8_t* chunk, int group, const Shape&)   in any rounding
//
//   static void decode(const uint8_t* block, int first, const Shape&, float (&w)[8])
//                                      weights first .. first + 7 (a multiple of 8) of a block, each rounding as in the
//                                      reference; the compiler contracts nothing (-fmad=false)
//
// `chunk` and `block` align to kAlign and lie in shared or in global memory. `slice` and `group` are constants once the
// loop around the call is unrolled.

// ---- bytes ----------------------------------------------------------------------------------------------------------

ISQ_DEVICE uint32_t load_u16(const uint8_t* p) { return *reinterpret_cast<const uint16_t*>(p); }

// Four bytes whose address aligns to kAlign.
template <int kAlign>
ISQ_DEVICE uint32_t load_u32(const uint8_t* p) {
  if constexpr (kAlign >= 4) return *reinterpret_cast<const uint32_t*>(p);
  if constexpr (kAlign == 1) return p[0] | p[1] << 8 | p[2] << 16 | (uint32_t)p[3] << 24;
  return load_u16(p) | load_u16(p + 2) << 16;
}

template <class Block>
constexpr int kAlignOf = sizeof(Block) % 2   ? 1
                         : sizeof(Block) % 4 ? 2
                                             : 4;

// Shifts bit `from` to bit `to`. If `from` is a constant, so is the shift.
ISQ_DEVICE uint32_t move_bit(uint32_t word, int from, int to) {
  return from < to ? word << (to - from) : word >> (from - to);
}

// 32768 + byte i of a word, as a float, in one instruction; a conversion would wait for a slow unit. With an 11-bit d
// and a bias b of few bits, fmaf(d, biased_byte, -(32768 + b) * d) is d * (byte - b), rounded once.
ISQ_DEVICE float biased_byte(uint32_t word, int i) {
  return __uint_as_float(permute(word, 0x47000000u, 0x7604u | i << 4));
}
constexpr float kByteBias = 32768.0f;

// 128 + byte i of a word, where the byte is below 128.
ISQ_DEVICE float biased_small_byte(uint32_t word, int i) {
  return __uint_as_float(permute(word, 0x43000000u, 0x7044u | i << 8));
}
constexpr float kSmallByteBias = 128.0f;

// ---- codes as 16-bit floats -----------------------------------------------------------------------------------------

// A float whose unit in the last place is 1. In its low bits fits an integer below 128 (bf16) or 1024 (f16).
template <Element element>
constexpr uint32_t kMagic = element == Element::kBf16 ? 0x43004300u : 0x64006400u;
template <Element element>
constexpr float kMagicZero = element == Element::kBf16 ? 128.0f : 1024.0f;

// The pair (zero + low code, zero + high code). `mask` selects the bits of the codes, in both halves alike.
template <Element element>
ISQ_DEVICE uint32_t magic_pair(uint32_t bits, uint32_t mask) {
  return lop3<0xea>(bits, mask, kMagic<element>);  // (bits & mask) | magic
}

// The codes of a format: kBits each, unsigned in memory, with the value code - kFrom; kBits = 8 and kFrom = 128 means
// signed bytes.
//
// bf16 has eight significant bits, too few for 128 + an 8-bit code. Such a code is the sum of two pieces, one for each
// nibble: 128 + low, and 256 + 16 high, where one unit in the last place is 2.
template <int kBits, int kFrom>
struct Codes {
  static_assert(kBits < 8 || kFrom == 0 || kFrom == 128);
  template <Element element>
  static constexpr int kPieces = kBits == 8 && element == Element::kBf16 ? 2 : 1;
  template <Element element>
  static constexpr float kZero = kMagicZero<element> + (kPieces<element> == 2 ? 256 : 0) + kFrom;
  template <Element element>
  static constexpr bool kSums = true;
  static constexpr uint32_t kHalves = ((1u << kBits) - 1) * 0x00010001u, kBytes = ((1u << kBits) - 1) * 0x01010101u;
  // The sign bits of bytes. Flipping them makes the bytes unsigned.
  static constexpr uint32_t kSigns = kFrom == 128 ? 0x80808080u : 0;

  // The pairs of a quad: four codes in the low bits of four bytes. The bits above the codes are ignored.
  template <Element element>
  static ISQ_DEVICE void quad_pairs(uint32_t quad, int first, uint32_t (&pairs)[kPieces<element>][4]) {
    if constexpr (kBits < 8) {
      pairs[0][first] = magic_pair<element>(quad, kHalves);
      pairs[0][first + 1] = magic_pair<element>(quad >> 8, kHalves);
    } else if constexpr (element == Element::kF16) {
      pairs[0][first] = permute(quad ^ kSigns, kMagic<element>, 0x5250);
      pairs[0][first + 1] = permute(quad ^ kSigns, kMagic<element>, 0x5351);
    } else {
      pairs[0][first] = magic_pair<element>(quad, 0x000f000f);
      pairs[0][first + 1] = magic_pair<element>(quad >> 8, 0x000f000f);
      constexpr uint32_t kHigh = 0x43804380u ^ (kSigns >> 1 & 0x00400040u);  // 256, and the sign to flip
      pairs[1][first] = lop3<0x6a>(quad >> 1, 0x00780078, kHigh);            // (bits & mask) ^ magic
      pairs[1][first + 1] = lop3<0x6a>(quad >> 9, 0x00780078, kHigh);
    }
  }

  // The same as floats, in the order of the bytes.
  static constexpr float kFloatZero = (kBits == 8 ? kByteBias : kSmallByteBias) + kFrom;
  static ISQ_DEVICE float byte_float(uint32_t word, int i) {
    return kBits == 8 ? biased_byte(word, i) : biased_small_byte(word, i);
  }
  static ISQ_DEVICE void quad_floats(uint32_t quad, float* floats) {
    quad = (quad & kBytes) ^ kSigns;
    for (int i = 0; i < 4; ++i) floats[i] = byte_float(quad, i);
  }

  // The numbers code - kFrom of a quad.
  static ISQ_DEVICE void quad_numbers(uint32_t quad, float* numbers) {
    quad = (quad & kBytes) ^ kSigns;
    for (int i = 0; i < 4; ++i) numbers[i] = biased_byte(quad, i) - (kByteBias + kFrom);
  }
};

}  // namespace isqtorch::cuda
