// ggml's K-quants: 256 weights in a block, in sub-blocks of 16 or 32 with small integer scales. Their layouts are drawn
// in csrc/blocks.h.
#pragma once

#include "metal/formats/format.h"

// Units of formats whose bytes hold weights that are 32 apart: eight bytes of one half of the block, four codes each.
struct Crumbs {
  static constant constexpr const int block = 256, unit = 32, groups = 4, span = 128;

  static int at(int u) { return 128 * (u / 4) + 8 * (u % 4); }
  static constexpr int offset(int i) { return 32 * (i / 8) + i % 8; }
  static int sub_block(int u, int g) { return 8 * (u / 4) + 2 * g + u % 4 / 2; }
};

struct Q2K : Crumbs {
  static constant constexpr const int bytes = 84;

  static constexpr int shift(int i) { return 2 * (i / 8) + 8 * (i % 2); }
  static constexpr float part(int i) { return 1.0f / float(1 << shift(i)); }
  static void codes(const device uchar* b, int u, thread float (&q)[32]) {
    for (int j = 0; j < 4; ++j) {
      const uint v = load_u16(b + 16 + 32 * (u / 4) + 8 * (u % 4) + 2 * j);
      for (int c = 0; c < 8; ++c) {
        const int i = 8 * (c / 2) + 2 * j + c % 2;
        q[i] = float(v & 3u << shift(i));
      }
    }
  }
  static Scale scale(const device uchar* b, int u, int g) {
    const uint both = b[sub_block(u, g)];
    return {load_f16(b + 80) * float(both & 15u), 0.0f, -(load_f16(b + 82) * float(both >> 4))};
  }
};

struct Q3K : Crumbs {
  static constant constexpr const int bytes = 110;

  static constexpr int shift(int i) { return 2 * (i / 8) + 8 * (i % 2); }
  static constexpr float part(int i) { return 1.0f / float(1 << shift(i)); }
  static void codes(const device uchar* b, int u, thread float (&q)[32]) {
    for (int j = 0; j < 4; ++j) {
      const uint v = load_u16(b + 32 + 32 * (u / 4) + 8 * (u % 4) + 2 * j);
      const uint high = uint(load_u16(b + 8 * (u % 4) + 2 * j)) >> (4 * (u / 4));
      for (int c = 0; c < 8; ++c) {
        const int i = 8 * (c / 2) + 2 * j + c % 2;
        q[i] = float((v & 3u << shift(i)) | (high >> (c / 2 + 8 * (c % 2)) & 1u) << (shift(i) + 2));
      }
    }
  }
  static Scale scale(const device uchar* b, int u, int g) {
    const int j = sub_block(u, g);
    const int low = b[96 + j % 8] >> (4 * (j / 8)) & 15, high = b[104 + j % 4] >> (2 * (j / 4)) & 3;
    return {load_f16(b + 108) * float((low | high << 4) - 32), 4.0f, -0.0f};
  }
};

struct Q6K : Crumbs {
  static constant constexpr const int bytes = 210;

  static constexpr float part(int) { return 1.0f; }
  static void codes(const device uchar* b, int u, thread float (&q)[32]) {
    for (int j = 0; j < 4; ++j) {
      const int place = 8 * (u % 4) + 2 * j;
      const uint first = load_u16(b + 64 * (u / 4) + place), second = load_u16(b + 64 * (u / 4) + 32 + place);
      const uint high = load_u16(b + 128 + 32 * (u / 4) + place);
      for (int c = 0; c < 8; ++c) {
        const int run = c / 2, byte = 8 * (c % 2);
        const uint low = (run % 2 ? second : first) >> (byte + 4 * (run / 2)) & 15u;
        q[8 * run + 2 * j + c % 2] = float(low | (high >> (byte + 2 * run) & 3u) << 4);
      }
    }
  }
  static Scale scale(const device uchar* b, int u, int g) {
    const float sc = float(as_type<char>(b[192 + sub_block(u, g)]));
    return {load_f16(b + 208) * sc, 32.0f, -0.0f};
  }
};

// q4k q5k: eight pairs of 6-bit numbers; sub-blocks of 32 share bytes, in the low and the high nibbles.
template <int bits>
struct Pairs {
  static constant constexpr const int block = 256, unit = 32, groups = 2, span = 64;
  static constant constexpr const int nibbles_at = bits == 5 ? 48 : 16, bytes = nibbles_at + 128;

  static int at(int u) { return 64 * (u / 2) + 16 * (u % 2); }
  static constexpr int offset(int i) { return i < 16 ? i : i + 16; }
  static constexpr int shift(int i) { return 8 * (i % 2) + 4 * (i / 16); }
  static constexpr float part(int i) { return 1.0f / float(1 << shift(i)); }

  static void codes(const device uchar* b, int u, thread float (&q)[32]) {
    for (int j = 0; j < 8; ++j) {
      const uint v = load_u16(b + nibbles_at + 16 * u + 2 * j);
      const uint fifths = bits == 5 ? uint(load_u16(b + 16 + 16 * (u % 2) + 2 * j)) >> (2 * (u / 2)) : 0u;
      for (int c = 0; c < 4; ++c) {
        const int i = 2 * j + c % 2 + 16 * (c / 2);
        uint code = v & 15u << shift(i);
        if (bits == 5) code |= (fifths >> (c / 2 + 8 * (c % 2)) & 1u) << (4 + shift(i));
        q[i] = float(code);
      }
    }
  }
  static Scale scale(const device uchar* b, int u, int g) {
    const int j = 2 * (u / 2) + g;
    const device uchar* packed = b + 4;
    uint sc = packed[j] & 63u, mn = packed[j + 4] & 63u;
    if (j >= 4) {
      sc = (packed[j + 4] & 15u) | uint(packed[j - 4] >> 6) << 4;
      mn = uint(packed[j + 4] >> 4) | uint(packed[j] >> 6) << 4;
    }
    return {load_f16(b) * float(sc), 0.0f, -(load_f16(b + 2) * float(mn))};
  }
};
using Q4K = Pairs<4>;
using Q5K = Pairs<5>;

struct Q8K {
  static constant constexpr const int block = 256, bytes = 292, unit = 16, groups = 1, span = 16;

  static int at(int u) { return 16 * u; }
  static constexpr int offset(int i) { return i; }
  static constexpr float part(int) { return 1.0f; }
  static void codes(const device uchar* b, int u, thread float (&q)[16]) { signed_bytes(b + 4 + 16 * u, q); }
  static Scale scale(const device uchar* b, int, int) { return {load_f32(b), 0.0f, -0.0f}; }
};
