// Transposes between memory, where the numbers of a block follow one another, and vectors with one block per lane.
#pragma once

#include <utility>

#include "cpu/lanes.h"

namespace isqtorch::ISQ_ISA {

// a0 b0 a1 b1 ..., from the lower (half 0) or the upper halves of a and b.
template <int half, class V, int... i>
ISQ_INLINE V interleave(V a, V b, std::integer_sequence<int, i...>) {
  return ISQ_SHUFFLE(a, b, (half * kWidth / 2 + i / 2 + i % 2 * kWidth)...);
}

// Element l of vector i becomes element i of vector l: interleaving the first half of the vectors with the second half,
// log2(kWidth) times. Without loops, so that the vectors stay in registers.
template <int kTimes, class V, int... i>
ISQ_INLINE void interleave_halves(V* v, std::integer_sequence<int, i...> half) {
  if constexpr (kTimes > 1) {
    constexpr std::make_integer_sequence<int, kWidth> kIndex{};
    V turned[kWidth];
    ((turned[2 * i] = interleave<0>(v[i], v[i + kWidth / 2], kIndex)), ...);
    ((turned[2 * i + 1] = interleave<1>(v[i], v[i + kWidth / 2], kIndex)), ...);
    interleave_halves<kTimes / 2>(turned, half);
    ((v[i] = turned[i]), ...);
    ((v[i + kWidth / 2] = turned[i + kWidth / 2]), ...);
  }
}
template <class V>
ISQ_INLINE void transpose(V* v) {
  interleave_halves<kWidth>(v, std::make_integer_sequence<int, kWidth / 2>{});
}

// Writes bytes 0 .. kCount - 1 of every lane's block: byte(j) gives byte j of all lanes, as integers 0 .. 255. `to` is
// the place of byte 0 in lane 0's block. Blocks are `stride` bytes apart.
template <int kCount, class Byte>
ISQ_INLINE void store_bytes(void* to, int stride, const Byte& byte) {
  static_assert(kCount % 4 == 0);
  constexpr int kWords = kCount / 4, kRun = kWords < kWidth ? kWords : kWidth;
  static_assert(kWords % kRun == 0);
  uint8_t* const first = static_cast<uint8_t*>(to);
  for (int run = 0; run < kWords; run += kRun) {
    LaneInts words[kWidth] = {};
    for (int i = 0; i < kRun; ++i) {
      const int j = 4 * (run + i);
      words[i] = byte(j) | byte(j + 1) << 8 | byte(j + 2) << 16 | byte(j + 3) << 24;
    }
    transpose(words);
    for (int l = 0; l < kWidth; ++l) std::memcpy(first + l * stride + 4 * run, &words[l], 4 * kRun);
  }
}

}  // namespace isqtorch::ISQ_ISA
