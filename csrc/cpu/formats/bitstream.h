// Codes of 2 to 8 bits as one little-endian bit stream: code k is in bits [k * bits, (k + 1) * bits). Eight codes fill
// exactly `bits` bytes, so they are handled eight at a time. AFQ and HQQ blocks use this.
#pragma once

#include "cpu/convert.h"

namespace isqtorch::ISQ_ISA {

typedef int32_t I8 ISQ_VECTOR(32);
typedef float F8 ISQ_VECTOR(32);

// The first n bytes as a number. Loaded in parts: after a copy of n bytes into a wider zero, the next load would stall.
template <int n>
ISQ_INLINE uint64_t load_little_endian(const uint8_t* bytes) {
  if constexpr (n > 4) {
    return load_little_endian<4>(bytes) | load_little_endian<n - 4>(bytes + 4) << 32;
  } else if constexpr (n == 4) {
    uint32_t word;
    std::memcpy(&word, bytes, 4);
    return word;
  } else if constexpr (n > 1) {
    return load_u16(bytes) | load_little_endian<n - 2>(bytes + 2) << 16;
  } else if constexpr (n == 1) {
    return bytes[0];
  } else {
    return 0;
  }
}

// Eight codes: each lane takes the 32-bit word with its code and shifts the code down.
template <int kBits>
ISQ_INLINE F8 eight_codes(const uint8_t* bytes) {
  const uint64_t eight = load_little_endian<kBits>(bytes);
  constexpr int kPerWord = kBits <= 4 ? 8 : 4;
  const I8 low = (int32_t)(uint32_t)eight + I8{}, high = (int32_t)(uint32_t)(eight >> (4 * kBits)) + I8{};
  const I8 word = kPerWord == 8 ? low : I8{-1, -1, -1, -1} ? low : high;
  constexpr auto kShift = [](int lane) { return lane % kPerWord * kBits; };
  const I8 shift = {kShift(0), kShift(1), kShift(2), kShift(3), kShift(4), kShift(5), kShift(6), kShift(7)};
  return ISQ_CONVERT(word >> shift & ((1 << kBits) - 1), F8);
}

// w [count] = apply(codes [count])
template <int kBits, class Apply>
ISQ_INLINE void load_stream(const uint8_t* bytes, int count, float* w, const Apply& apply) {
  for (int i = 0; i < count; i += 8) {
    const F8 eight = apply(eight_codes<kBits>(bytes + i / 8 * kBits));
    std::memcpy(w + i, &eight, sizeof eight);
  }
}

template <int kBits>
ISQ_INLINE void store_stream(const LaneInts* codes, int lane, int count, uint8_t* bytes) {
  for (int i = 0; i < count; i += 8) {
    uint64_t eight = 0;
    for (int k = 0; k < 8; ++k) eight |= (uint64_t)(uint32_t)codes[i + k][lane] << (k * kBits);
    std::memcpy(bytes + i / 8 * kBits, &eight, kBits);
  }
}

}  // namespace isqtorch::ISQ_ISA
