// What the quantizers of the 256-weight formats share. A thread has a sub-block of 16 or 32 weights, a team of threads
// the block. The steps are those of cpu/formats/kquants_*.h.
#pragma once

#include "cuda/formats/kquants.cuh"
#include "cuda/kernels/quantize/blocks32.cuh"

namespace isqtorch::cuda {

// Every member's value, in the order of the members.
template <int kSize, class T>
ISQ_DEVICE void gather(const Team& team, T mine, T (&all)[kSize]) {
  ISQ_GPU_UNROLL for (int j = 0; j < kSize; ++j) all[j] = team.from(mine.v, j);
}

// This member's value among those of all.
template <int kTeam>
ISQ_DEVICE LaneInts own(const Team& team, const LaneInts (&all)[kTeam]) {
  LaneInts mine = all[0];
  ISQ_GPU_UNROLL for (int j = 1; j < kTeam; ++j) {
    if (team.member == j) mine = all[j];
  }
  return mine;
}

// The codes for the stored scale d and offset m. If the scale is 0, the levels of the search remain.
template <int kOwn>
ISQ_DEVICE void codes_for_stored_scale(const LaneFloats (&x)[kOwn], LaneFloats largest, LaneFloats d, LaneFloats m,
                                       int low, int high, int shift, const LaneFloats (&levels)[kOwn],
                                       LaneInts (&codes)[kOwn]) {
  if (any(d == 0.0f)) {
    ISQ_GPU_UNROLL for (int i = 0; i < kOwn; ++i) codes[i] = truncate(levels[i]);
  } else {
    for_quotients(x, largest, m, d, [&](int i, LaneFloats q) { codes[i] = clamp(nearest_int(q), low, high) + shift; });
  }
}

// Writes a thread's codes to those of its block, which the whole team can read afterwards.
template <int kOwn>
ISQ_DEVICE void share_codes(const BlockScope& scope, const LaneInts (&codes)[kOwn]) {
  ISQ_GPU_UNROLL for (int i = 0; i < kOwn; i += 4) {
    scope.codes[(scope.team.member * kOwn + i) / 4] = four_bytes(codes[i], codes[i + 1], codes[i + 2], codes[i + 3]);
  }
  __syncwarp();
}

// Writes kWords words to the block; word(j) computes word j. Each member writes some.
template <class Q, int kWords, class Word>
ISQ_DEVICE void store_words(const BlockScope& scope, uint8_t* to, const Word& word) {
  constexpr int kTeam = Q::kBlock / Q::kOwn;
  ISQ_GPU_UNROLL for (int j = 0; j < kWords; j += kTeam) {
    const int at = j + scope.team.member;
    if (kWords % kTeam == 0 || at < kWords) store_u32<kAlignOf<typename Q::Block>>(to + 4 * at, word(at));
  }
}

// Writes kParts parts of a block, which lie together. Byte j of part h takes kWidthOfCode bits, from bit kBit on, of
// the codes of weights 32 * kRuns * h + j, + 32, + 64, ..., the first in the low bits.
template <class Q, int kParts, int kRuns, int kBit, int kWidthOfCode>
ISQ_DEVICE void store_runs(const BlockScope& scope, uint8_t* to) {
  constexpr uint32_t kMask = ((1u << kWidthOfCode) - 1) * 0x01010101u;
  store_words<Q, 8 * kParts>(scope, to, [&](int j) {
    const uint32_t* const at = scope.codes + 8 * kRuns * (j / 8) + j % 8;
    uint32_t word = 0;
    ISQ_GPU_UNROLL for (int run = 0; run < kRuns; ++run) word |= (at[8 * run] >> kBit & kMask) << (run * kWidthOfCode);
    return word;
  });
}

}  // namespace isqtorch::cuda
