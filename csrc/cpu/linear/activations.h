// Activations as integers with one step per 32: of 8 bits, or of 15 bits for formats with 8-bit codes, where 8 would
// cause more error than the weights.
//
// An activation q of 15 bits takes two bytes, so a vector of 64 codes is multiplied by two vectors of 64 bytes. What
// these hold depends on the instructions of the level:
//
//   terms   q = 128 * high + low; one vector has the high terms, the other the low ones. Each has a dot product of
//   bytes words   one vector has the activations 0, 2, 4, .. as 16-bit numbers, the other 1, 3, 5, ... The codes are
//   spread to
//           16 bits likewise. On levels without dot products of bytes this takes no more instructions than those of 8
//           bits
#pragma once

#include "cpu/linear/dots.h"

namespace isqtorch::ISQ_ISA {

template <class Unit>
constexpr int kActivationBytes = Unit::kMaxCode > 127 ? 2 : 1;

#if defined(__x86_64__) && !defined(ISQ_VNNI)
constexpr bool kWideWords = true;
#else
constexpr bool kWideWords = false;
#endif
constexpr int kTermBits = 7;
constexpr int kLargestWide = 127 << kTermBits;

// Whether the dot products of a unit take code - 128.
template <class Unit>
constexpr bool kSignedCodes = Unit::kMaxCode > 127 && !kUnsignedDots && !(kWideWords && kActivationBytes<Unit> == 2);

// 32 activations as q * step, q from -kLargest to kLargest. With a NaN or an infinity, the step is NaN, and so are all
// results.
template <int kLargest, class Integer>
ISQ_INLINE float quantize_activations(const float* x, Integer* q) {
  uint32_t largest = 0;
  for (int i = 0; i < 32; ++i) {
    const uint32_t magnitude = float_bits(x[i]) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  const float amax = bits_float(largest);
  const float inverse = amax >= FLT_MIN * 2 * (kLargest + 1) ? kLargest / amax : 0.0f;  // smaller ones count as zero
  const bool finite = largest < 0x7f800000;
  for (int i = 0; i < 32; ++i) {
    const float scaled = finite ? x[i] * inverse : 0.0f;
    q[i] = (Integer)((int32_t)(float_bits(scaled + 12582912.0f) & 0x7fffff) - 0x400000);  // half to even
  }
  return finite ? amax / kLargest : ISQ_NAN;
}

// The two bytes of the activations of a unit, for the dot products with codes in the same order.
template <int kCount>
ISQ_INLINE void store_wide(const int16_t* q, uint8_t* first, uint8_t* second) {
  if constexpr (kWideWords) {
    int16_t even[kCount / 2], odd[kCount / 2];
    for (int i = 0; i < kCount / 2; ++i) even[i] = q[2 * i];
    for (int i = 0; i < kCount / 2; ++i) odd[i] = q[2 * i + 1];
    std::memcpy(first, even, kCount);
    std::memcpy(second, odd, kCount);
  } else {
    for (int i = 0; i < kCount; ++i) {
      const int high = (q[i] + (1 << (kTermBits - 1))) >> kTermBits;  // -127 .. 127
      first[i] = (uint8_t)high;
      second[i] = (uint8_t)(q[i] - (high << kTermBits));  // -64 .. 63
    }
  }
}

#if defined(__x86_64__)
// Per lane, the sum of two products of 16-bit numbers.
ISQ_INLINE NativeI32 multiply_words(NativeU16 a, NativeU16 b) {
#if ISQ_VECTOR_FLOATS == 16
  return (NativeI32)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif ISQ_VECTOR_FLOATS == 8
  return (NativeI32)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  return (NativeI32)_mm_madd_epi16((__m128i)a, (__m128i)b);
#endif
}
#endif

// Per lane, the sum of the products of four codes of 8 bits with activations of 15 bits, over kDots vectors.
template <int kDots>
ISQ_INLINE Ints wide_dots(const Bytes* u, const Bytes* first, const Bytes* second) {
  Ints sums;
  if constexpr (kWideWords) {
#if defined(__x86_64__)
    for (int p = 0; p < kParts; ++p) {
      NativeI32 sum{};
      for (int d = 0; d < kDots; ++d) {
        const NativeU16 codes = (NativeU16)u[d].part[p];
        sum += multiply_words(codes & (uint16_t)255, (NativeU16)first[d].part[p]);
        sum += multiply_words(codes >> 8, (NativeU16)second[d].part[p]);
      }
      sums.part[p] = sum;
    }
#endif
  } else {
    sums = shift_left(dot_products<kDots, 255>(u, first), kTermBits);
    for (int d = 0; d < kDots; ++d) sums = add_dot_products<1, 255>(sums, u + d, second + d);
  }
  return sums;
}

}  // namespace isqtorch::ISQ_ISA
