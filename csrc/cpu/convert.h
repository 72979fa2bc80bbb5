// Conversions between f32 and the 16-bit floats: to nearest even, subnormal numbers kept. They do not depend on the
// thread's flush-to-zero mode, because every intermediate value is a normal number. The compiler vectorizes these plain
// loops.
#pragma once

#include "cpu/lanes.h"

namespace isqtorch::ISQ_ISA {

ISQ_INLINE uint32_t float_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}
ISQ_INLINE float bits_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

ISQ_INLINE float f16_to_f32(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13;
  // Infinity and NaN get the exponent 255.
  const uint32_t normal = rest + (112u << 23) + (rest >= (31u << 23) ? 112u << 23 : 0);
  const float subnormal = bits_float(rest + (113u << 23)) - bits_float(113u << 23);  // (1 + m) 2^-14 - 2^-14
  return bits_float((rest < (1u << 23) ? float_bits(subnormal) : normal) | sign);
}

ISQ_INLINE uint16_t f32_to_f16(float f) {
  const uint32_t bits = float_bits(f), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  const uint32_t odd = magnitude >> 13 & 1;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + odd) >> 13;  // a carry into infinity is correct
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);  // the ulp of 0.5 is 2^-24
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  return (uint16_t)((magnitude >= (143u << 23) ? special : finite) | sign);
}

ISQ_INLINE float bf16_to_f32(uint16_t h) { return bits_float((uint32_t)h << 16); }
ISQ_INLINE uint16_t f32_to_bf16(float f) {
  const uint32_t bits = float_bits(f);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

ISQ_INLINE float load_f32(const uint8_t* p) {
  float f;
  std::memcpy(&f, p, 4);
  return f;
}
ISQ_INLINE uint16_t load_u16(const uint8_t* p) {
  uint16_t h;
  std::memcpy(&h, p, 2);
  return h;
}
ISQ_INLINE uint32_t load_u32(const uint8_t* p) {
  uint32_t v;
  std::memcpy(&v, p, 4);
  return v;
}
ISQ_INLINE uint64_t load_u64(const uint8_t* p) {
  uint64_t v;
  std::memcpy(&v, p, 8);
  return v;
}

// Per lane: the 16-bit pattern, and the value it stands for.
struct Halves {
  uint16_t bits[kWidth];
  LaneFloats value;
  LaneInts overflow;  // infinite, or NaN from a search whose sums overflowed
};

ISQ_INLINE Halves to_f16(LaneFloats f) {
  Halves h;
  for (int l = 0; l < kWidth; ++l) {
    h.bits[l] = f32_to_f16(f[l]);
    h.value[l] = f16_to_f32(h.bits[l]);
  }
  h.overflow = ~(abs(h.value) <= FLT_MAX);
  return h;
}
ISQ_INLINE Halves to_bf16(LaneFloats f) {
  Halves h;
  for (int l = 0; l < kWidth; ++l) {
    h.bits[l] = f32_to_bf16(f[l]);
    h.value[l] = bf16_to_f32(h.bits[l]);
  }
  h.overflow = ~(abs(h.value) <= FLT_MAX);
  return h;
}

void load_floats(const void* from, Dtype dtype, int64_t count, float* to) {
  const uint8_t* bytes = static_cast<const uint8_t*>(from);
  switch (dtype) {
    case Dtype::kF32:
      std::memcpy(to, from, 4 * count);
      break;
    case Dtype::kF16:
      for (int64_t i = 0; i < count; ++i) to[i] = f16_to_f32(load_u16(bytes + 2 * i));
      break;
    case Dtype::kBf16:
      for (int64_t i = 0; i < count; ++i) to[i] = bf16_to_f32(load_u16(bytes + 2 * i));
      break;
  }
}

void store_floats(const float* from, int64_t count, Dtype dtype, void* to) {
  uint16_t* halves = static_cast<uint16_t*>(to);
  switch (dtype) {
    case Dtype::kF32:
      std::memcpy(to, from, 4 * count);
      break;
    case Dtype::kF16:
      for (int64_t i = 0; i < count; ++i) halves[i] = f32_to_f16(from[i]);
      break;
    case Dtype::kBf16:
      for (int64_t i = 0; i < count; ++i) halves[i] = f32_to_bf16(from[i]);
      break;
  }
}

// Per column, the sum of v * v over the rows. Four rows at a time, so that the sums are read and written once for four.
template <class At>
ISQ_INLINE void add_squares_of(const uint8_t* from, int64_t stride, int64_t rows, int64_t count, float* sums, At at) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    const uint8_t* p = from + row * stride;
    for (int64_t i = 0; i < count; ++i) {
      const float a = at(p, i), b = at(p + stride, i), c = at(p + 2 * stride, i), d = at(p + 3 * stride, i);
      sums[i] += (a * a + b * b) + (c * c + d * d);
    }
  }
  for (; row < rows; ++row) {
    const uint8_t* p = from + row * stride;
    for (int64_t i = 0; i < count; ++i) sums[i] += at(p, i) * at(p, i);
  }
}

void add_squares(const void* from, Dtype dtype, int64_t stride, int64_t rows, int64_t count, float* sums) {
  const uint8_t* p = static_cast<const uint8_t*>(from);
  switch (dtype) {
    case Dtype::kF32:
      add_squares_of(p, stride, rows, count, sums, [](const uint8_t* q, int64_t i) { return load_f32(q + 4 * i); });
      break;
    case Dtype::kF16:
      add_squares_of(p, stride, rows, count, sums,
                     [](const uint8_t* q, int64_t i) { return f16_to_f32(load_u16(q + 2 * i)); });
      break;
    case Dtype::kBf16:
      add_squares_of(p, stride, rows, count, sums,
                     [](const uint8_t* q, int64_t i) { return bf16_to_f32(load_u16(q + 2 * i)); });
      break;
  }
}

}  // namespace isqtorch::ISQ_ISA
