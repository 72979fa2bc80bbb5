// ggml's K-quants have 256 weights in a block, which is cut into sub-blocks of 16 or 32 with small integer scales of
// their own; one or two numbers per block scale these in turn. Here is what their quantizers share.
#pragma once

#include "cpu/formats/ggml.h"

namespace isqtorch::ISQ_ISA {

// How many sub-blocks a search takes side by side when it works on vectors T.
template <class T>
constexpr int kSide = sizeof(T) / sizeof(LaneFloats);

// sum of x^2 over the block, in index order, times factor / 256
ISQ_INLINE LaneFloats block_mean_square(const LaneFloats* x, float factor) {
  LaneFloats sum = splat<LaneFloats>(0.0f);
  for (int i = 0; i < 256; ++i) sum += x[i] * x[i];
  return factor * sum / 256.0f;
}

// The sum of each sub-block's weights.
template <int kCount>
ISQ_INLINE void sub_block_sums(const LaneFloats* w, LaneFloats* sums) {
  for (int j = 0; j < 256 / kCount; ++j) {
    sums[j] = splat<LaneFloats>(0.0f);
    for (int i = 0; i < kCount; ++i) sums[j] += w[kCount * j + i];
  }
}

// The searches chose levels for exact scales. This chooses them again for the stored scale d and offset m; where the
// stored scale is 0 the levels of the search remain. No |x| exceeds `largest`.
//
// The formula divides, which takes longer than all the rest. Multiplying by 1 / d gives nearly the same quotient: in or
// near the range of codes the two differ by less than 1e-5, so both round to the same integer unless the quotient is
// close to the middle between two integers. In that case, and where a quotient may be so large that nearest_int wraps
// around, this divides.
template <int kCount>
ISQ_INLINE void codes_for_stored_scale(const LaneFloats* x, LaneFloats largest, LaneFloats d, LaneFloats m, int low,
                                       int high, int shift, const LaneFloats* levels, LaneInts* codes) {
  const LaneInts keep = d == 0.0f;
  const LaneFloats inverse = select(keep, 0.0f, 1.0f / d);
  LaneInts sure = (largest + abs(m)) * abs(inverse) < 0x1p20f;
  for (int i = 0; i < kCount; ++i) {
    const LaneFloats quotient = (x[i] + m) * inverse, nearest = nearest_small(quotient);
    sure &= abs(quotient - nearest) < 0.49998f;
    codes[i] = truncate(select(keep, levels[i], clamp(nearest, (float)low, (float)high) + (float)shift));
  }
  if (!any(~sure)) return;
  for (int i = 0; i < kCount; ++i) {
    codes[i] = select(keep, truncate(levels[i]), clamp(nearest_int((x[i] + m) / d), low, high) + shift);
  }
}

// 2-bit codes, four to a byte: q2k q3k.
template <class Block>
ISQ_INLINE void store_crumbs(const LaneInts* codes, Block* out) {
  store_bytes<64>(out->qs, sizeof(Block), [&](int j) {
    const LaneInts* at = codes + 128 * (j / 32) + j % 32;
    return (at[0] & 3) | (at[32] & 3) << 2 | (at[64] & 3) << 4 | (at[96] & 3) << 6;
  });
}

// One bit of every code: bit e / 32 of byte e % 32.
ISQ_INLINE void store_bit_plane(const LaneInts* codes, int bit, void* plane, int stride) {
  store_bytes<32>(plane, stride, [&](int j) {
    LaneInts byte = splat<LaneInts>(0);
    for (int c = 0; c < 8; ++c) byte |= (codes[32 * c + j] >> bit & 1) << c;
    return byte;
  });
}

}  // namespace isqtorch::ISQ_ISA
