// AFQ and HQQ: a group of 32, 64 or 128 weights is a block of two 16-bit numbers and a little-endian stream of codes.
#pragma once

#include "metal/formats/format.h"

enum class Header { scale_bias_bf16, scale_bias_f16, scale_zero_f16 };  // AFQ, AFQ with f16 scales, HQQ

template <int bits, int group, Header header>
struct Stream {
  static constant constexpr const int block = group, bytes = 4 + group * bits / 8, unit = 16, groups = 1, span = 16;
  // Codes are masked out of words of at most 24 bits. These hold whole codes, and at any position a code is exact as a
  // float.
  static constant constexpr const int per_word = bits <= 3 ? 8 : bits == 8 ? 2 : 4;

  static int at(int u) { return 16 * u; }
  static constexpr int offset(int i) { return i; }
  static constexpr float part(int i) { return 1.0f / float(1 << bits * (i % per_word)); }

  static void codes(const device uchar* b, int u, thread float (&q)[16]) {
    uint v[bits + 1];
    for (int j = 0; j < bits; ++j) v[j] = load_u16(b + 4 + 2 * (bits * u + j));
    v[bits] = 0;
    for (int i = 0; i < 16; ++i) {
      const int bit = i / per_word * per_word * bits;  // where its word begins
      const uint word = (v[bit / 16] | v[bit / 16 + 1] << 16) >> (bit % 16);
      q[i] = float(word & ((1u << bits) - 1u) << bits * (i % per_word));
    }
  }
  static Scale scale(const device uchar* b, int, int) {
    if (header == Header::scale_bias_bf16) return {load_bf16(b), 0.0f, load_bf16(b + 2)};
    if (header == Header::scale_bias_f16) return {load_f16(b), 0.0f, load_f16(b + 2)};
    return {load_f16(b), load_f16(b + 2), -0.0f};
  }
};
