// Codes of any width from 2 to 8 bits as one little-endian bit stream: code k lies in bits [k * bits, (k + 1) * bits). Eight
// codes fill `bits` bytes exactly, so they are handled eight at a time. Affine and HQQ blocks share this.
#pragma once

#include "cpu/convert.h"

namespace isqtorch::ISQ_ISA {

template <int kBits>
ISQ_INLINE void load_stream(const uint8_t* bytes, int count, float* codes) {
  constexpr uint64_t kMask = (1u << kBits) - 1;
  for (int i = 0; i < count; i += 8) {
    uint64_t eight = 0;
    std::memcpy(&eight, bytes + i / 8 * kBits, kBits);
    for (int k = 0; k < 8; ++k) codes[i + k] = (float)(eight >> (k * kBits) & kMask);
  }
}

template <int kBits>
ISQ_INLINE void store_stream(const I* codes, int lane, int count, uint8_t* bytes) {
  for (int i = 0; i < count; i += 8) {
    uint64_t eight = 0;
    for (int k = 0; k < 8; ++k) eight |= (uint64_t)(uint32_t)codes[i + k][lane] << (k * kBits);
    std::memcpy(bytes + i / 8 * kBits, &eight, kBits);
  }
}

}  // namespace isqtorch::ISQ_ISA
