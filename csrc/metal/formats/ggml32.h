// The formats with 32 weights in a block: two units. Byte j of 4-bit codes holds weight j in its low nibble and j + 16
// in the high one, so eight bytes are eight weights of either half.
#pragma once

#include "metal/formats/format.h"

// q4_0 q4_1 q5_0 q5_1: d, then m for `offsets`, then a word of fifth bits for 5 bits, then nibbles.
template <int bits, bool offsets>
struct Nibbles {
  static constant constexpr const int block = 32, unit = 16, groups = 1, span = 32;
  static constant constexpr const int fifths_at = offsets ? 4 : 2, nibbles_at = fifths_at + (bits == 5 ? 4 : 0);
  static constant constexpr const int bytes = nibbles_at + 16;

  static int at(int u) { return 8 * u; }
  static constexpr int offset(int i) { return i < 8 ? i : i + 8; }
  static constexpr int shift(int i) { return 8 * (i % 2) + 4 * (i / 8); }
  static constexpr float part(int i) { return 1.0f / float(1 << shift(i)); }

  static void codes(const device uchar* b, int u, thread float (&q)[16]) {
    uint fifths = 0;
    if (bits == 5) {
      const uint low = load_u16(b + fifths_at), high = load_u16(b + fifths_at + 2);
      fifths = (low >> (8 * u) & 255u) | (high >> (8 * u) & 255u) << 8;
    }
    for (int j = 0; j < 4; ++j) {
      const uint v = load_u16(b + nibbles_at + 8 * u + 2 * j);
      for (int c = 0; c < 4; ++c) {
        const int i = 2 * j + c % 2 + 8 * (c / 2);
        uint code = v & 15u << shift(i);
        if (bits == 5) code |= (fifths >> i & 1u) << (4 + shift(i));
        q[i] = float(code);
      }
    }
  }
  static Scale scale(const device uchar* b, int, int) {
    if (offsets) return {load_f16(b), 0.0f, load_f16(b + 2)};
    return {load_f16(b), bits == 5 ? 16.0f : 8.0f, -0.0f};
  }
};

// q8_0 q8_1: d, then d * sum(codes) for `sums`, then signed bytes.
template <bool sums>
struct Bytes {
  static constant constexpr const int block = 32, bytes = sums ? 36 : 34, unit = 16, groups = 1, span = 16;

  static int at(int u) { return 16 * u; }
  static constexpr int offset(int i) { return i; }
  static constexpr float part(int) { return 1.0f; }
  static void codes(const device uchar* b, int u, thread float (&q)[16]) { signed_bytes(b + bytes - 32 + 16 * u, q); }
  static Scale scale(const device uchar* b, int, int) { return {load_f16(b), 0.0f, -0.0f}; }
};

using Q4_0 = Nibbles<4, false>;
using Q4_1 = Nibbles<4, true>;
using Q5_0 = Nibbles<5, false>;
using Q5_1 = Nibbles<5, true>;
using Q8_0 = Bytes<false>;
using Q8_1 = Bytes<true>;
