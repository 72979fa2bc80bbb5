// The formats whose codes are numbers of levels in a table: iq4_nl, iq4_xs, mxfp4. In every sixteen bytes, byte j holds
// the code of weight j in its low nibble and that of weight j + 16 in the high one.
#pragma once

#include "metal/formats/format.h"

constant constexpr const float kIq4Levels[16] = {-127.0f, -104.0f, -83.0f, -65.0f, -49.0f, -35.0f, -22.0f, -10.0f,
                                                 1.0f,    13.0f,   25.0f,  38.0f,  53.0f,  69.0f,  89.0f,  113.0f};
constant constexpr const float kE2m1Levels[16] = {0.0f, 1.0f,  2.0f,  3.0f,  4.0f,  6.0f,  8.0f,  12.0f,
                                                  0.0f, -1.0f, -2.0f, -3.0f, -4.0f, -6.0f, -8.0f, -12.0f};

// Two units in a block: eight bytes are eight weights of either half.
struct Levels32 {
  static constant constexpr const int block = 32, unit = 16, groups = 1, span = 32;

  static int at(int u) { return 8 * u; }
  static constexpr int offset(int i) { return i < 8 ? i : i + 8; }
  static constexpr float part(int) { return 1.0f; }
};

// d, then nibbles.
struct IQ4_NL : Levels32 {
  static constant constexpr const int bytes = 18;

  static void codes(const device uchar* b, int u, thread float (&q)[16]) {
    for (int j = 0; j < 4; ++j) {
      const uint v = load_u16(b + 2 + 8 * u + 2 * j);
      for (int c = 0; c < 4; ++c) q[2 * j + c % 2 + 8 * (c / 2)] = kIq4Levels[v >> (8 * (c % 2) + 4 * (c / 2)) & 15u];
    }
  }
  static Scale scale(const device uchar* b, int, int) { return {load_f16(b), 0.0f, -0.0f}; }
};

// An exponent, then nibbles. Blocks begin at odd addresses, too, so only single bytes are read.
struct MXFP4 : Levels32 {
  static constant constexpr const int bytes = 17;

  static void codes(const device uchar* b, int u, thread float (&q)[16]) {
    for (int j = 0; j < 8; ++j) {
      const uint v = b[1 + 8 * u + j];
      q[j] = kE2m1Levels[v & 15u];
      q[j + 8] = kE2m1Levels[v >> 4];
    }
  }
  // 2^(e - 128); the two smallest are subnormal.
  static float power(uint e) { return as_type<float>(e > 1u ? (e - 1u) << 23 : 0x200000u << e); }
  static Scale scale(const device uchar* b, int, int) { return {power(b[0]), 0.0f, -0.0f}; }
};

// d, eight high pairs of bits and eight low nibbles of the scales, then nibbles. A unit is a sub-block of 32.
struct IQ4_XS {
  static constant constexpr const int block = 256, bytes = 136, unit = 32, groups = 1, span = 32;

  static int at(int u) { return 32 * u; }
  static constexpr int offset(int i) { return i; }
  static constexpr float part(int) { return 1.0f; }

  static void codes(const device uchar* b, int u, thread float (&q)[32]) {
    for (int j = 0; j < 8; ++j) {
      const uint v = load_u16(b + 8 + 16 * u + 2 * j);
      for (int c = 0; c < 4; ++c) q[2 * j + c % 2 + 16 * (c / 2)] = kIq4Levels[v >> (8 * (c % 2) + 4 * (c / 2)) & 15u];
    }
  }
  static Scale scale(const device uchar* b, int u, int) {
    const int low = b[4 + u / 2] >> (4 * (u % 2)) & 15, high = b[2 + u / 4] >> (2 * (u % 4)) & 3;
    return {load_f16(b) * float((low | high << 4) - 32), 0.0f, -0.0f};
  }
};
