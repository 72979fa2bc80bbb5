// FP8: 128 weights with an f32 scale, as e4m3 numbers.
#pragma once

#include "metal/formats/format.h"

struct Fp8 {
  static constant constexpr const int block = 128, bytes = 132, unit = 16, groups = 1, span = 16;

  static int at(int u) { return 16 * u; }
  static constexpr int offset(int i) { return i; }
  static constexpr float part(int) { return 1.0f; }

  // Sign, four bits of exponent with bias 7, three bits of mantissa. Subnormal numbers are computed from integers,
  // because a GPU may treat subnormal floats as zero.
  static float e4m3(uint byte) {
    const uint magnitude = byte & 127u;
    const float normal = as_type<float>((magnitude << 20) + (120u << 23));
    const float value = magnitude < 8u ? float(magnitude) * 0x1p-9f : magnitude == 127u ? NAN : normal;
    return byte & 128u ? -value : value;
  }
  static void codes(const device uchar* b, int u, thread float (&q)[16]) {
    for (int j = 0; j < 8; ++j) {
      const uint v = load_u16(b + 4 + 16 * u + 2 * j);
      q[2 * j] = e4m3(v & 255u);
      q[2 * j + 1] = e4m3(v >> 8);
    }
  }
  static Scale scale(const device uchar* b, int, int) { return {load_f32(b), 0.0f, -0.0f}; }
};
