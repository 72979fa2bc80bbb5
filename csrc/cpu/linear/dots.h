// Dot products of bytes, four products to a lane, and sums over lanes.
#pragma once

#include "cpu/linear/simd.h"

namespace isqtorch::ISQ_ISA {

// Whether the dot product takes unsigned bytes up to 255. Otherwise codes of the full range are signed: code - 128.
#if defined(ISQ_VNNI) || defined(ISQ_I8MM)
constexpr bool kUnsignedDots = true;
#else
constexpr bool kUnsignedDots = false;
#endif

#if ISQ_VECTOR_FLOATS >= 8 && !defined(ISQ_VNNI)
// Sums of two neighbouring products as 16-bit numbers: at most 2 * 127 * 127.
ISQ_INLINE NativeU16 pair_sums(NativeU8 u, NativeU8 a, bool full) {
#if ISQ_VECTOR_FLOATS == 16
  if (!full) return (NativeU16)_mm512_maddubs_epi16((__m512i)u, (__m512i)a);
  const __m512i code = (__m512i)(u ^ 0x80);  // |code| * sign(code) * a: the negated a where the code is negative
  const __m512i flipped =
      _mm512_mask_sub_epi8((__m512i)a, _mm512_movepi8_mask(code), _mm512_setzero_si512(), (__m512i)a);
  return (NativeU16)_mm512_maddubs_epi16(_mm512_abs_epi8(code), flipped);
#else
  if (!full) return (NativeU16)_mm256_maddubs_epi16((__m256i)u, (__m256i)a);
  const __m256i code = (__m256i)(u ^ 0x80);
  return (NativeU16)_mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8((__m256i)a, code));
#endif
}
ISQ_INLINE NativeI32 add_pairs(NativeU16 sums) {
#if ISQ_VECTOR_FLOATS == 16
  return (NativeI32)_mm512_madd_epi16((__m512i)sums, _mm512_set1_epi16(1));
#else
  return (NativeI32)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1));
#endif
}
#endif

#if defined(ISQ_DOTPROD)
ISQ_INLINE int32x4_t add_dots(int32x4_t acc, NativeU8 u, NativeU8 a, [[maybe_unused]] bool full) {
#if defined(ISQ_I8MM)
  return vusdotq_s32(acc, (uint8x16_t)u, (int8x16_t)a);
#else
  return vdotq_s32(acc, (int8x16_t)(full ? u ^ 0x80 : u), (int8x16_t)a);
#endif
}

// acc[t] += dot products of word kWord of a[t] with one word of each of sixteen rows.
template <int kWord, int kTokens, int kMaxCode>
ISQ_INLINE void add_dots_of_word(Ints* acc, const uint8_t* codes, const Quarter* a) {
  for (int p = 0; p < kParts; ++p) {
    const Quarter u = load_16(codes + 16 * p) ^ (uint8_t)(kMaxCode > 127 && !kUnsignedDots ? 0x80 : 0);
    for (int t = 0; t < kTokens; ++t) {
#if defined(ISQ_I8MM)
      acc[t].part[p] = (NativeI32)vusdotq_laneq_s32((int32x4_t)acc[t].part[p], (uint8x16_t)u, (int8x16_t)a[t], kWord);
#else
      acc[t].part[p] = (NativeI32)vdotq_laneq_s32((int32x4_t)acc[t].part[p], (int8x16_t)u, (int8x16_t)a[t], kWord);
#endif
    }
  }
}
#endif

// Per lane, the sum of its four products u * a, over kDots pairs of vectors. Codes of the full range 0 .. 255 enter as
// u - 128 unless kUnsignedDots.
template <int kDots, int kMaxCode>
ISQ_INLINE Ints dot_products(const Bytes* u, const Bytes* a) {
  [[maybe_unused]] constexpr bool kFull = kMaxCode > 127;
  Ints r;
  for (int p = 0; p < kParts; ++p) {
#if ISQ_VECTOR_FLOATS == 16 && defined(ISQ_VNNI)
    __m512i s = _mm512_setzero_si512();
    for (int d = 0; d < kDots; ++d) s = _mm512_dpbusd_epi32(s, (__m512i)u[d].part[p], (__m512i)a[d].part[p]);
    r.part[p] = (NativeI32)s;
#elif ISQ_VECTOR_FLOATS == 8 && defined(ISQ_VNNI)
    __m256i s = _mm256_setzero_si256();
    for (int d = 0; d < kDots; ++d) s = _mm256_dpbusd_avx_epi32(s, (__m256i)u[d].part[p], (__m256i)a[d].part[p]);
    r.part[p] = (NativeI32)s;
#elif ISQ_VECTOR_FLOATS >= 8
    if constexpr (kDots * kMaxCode <= 129) {  // kDots * 2 * kMaxCode * 127 still fits 16 bits
      NativeU16 s = pair_sums(u[0].part[p], a[0].part[p], kFull);
      for (int d = 1; d < kDots; ++d) s += pair_sums(u[d].part[p], a[d].part[p], kFull);
      r.part[p] = add_pairs(s);
    } else {
      r.part[p] = add_pairs(pair_sums(u[0].part[p], a[0].part[p], kFull));
      for (int d = 1; d < kDots; ++d) r.part[p] += add_pairs(pair_sums(u[d].part[p], a[d].part[p], kFull));
    }
#elif defined(ISQ_DOTPROD)
    int32x4_t s = vdupq_n_s32(0);
    for (int d = 0; d < kDots; ++d) s = add_dots(s, u[d].part[p], a[d].part[p], kFull);
    r.part[p] = (NativeI32)s;
#elif defined(__aarch64__)
    constexpr int kLargest = kDots * (kFull ? 128 : kMaxCode) * 127;
    static_assert(kLargest < 32768);
    int16x8_t low = {}, high = {};
    for (int d = 0; d < kDots; ++d) {
      const int8x16_t code = (int8x16_t)(kFull ? u[d].part[p] ^ 0x80 : u[d].part[p]), x = (int8x16_t)a[d].part[p];
      low = d ? vmlal_s8(low, vget_low_s8(code), vget_low_s8(x)) : vmull_s8(vget_low_s8(code), vget_low_s8(x));
      high = d ? vmlal_high_s8(high, code, x) : vmull_high_s8(code, x);
    }
    if constexpr (2 * kLargest < 32768) {
      r.part[p] = (NativeI32)vpaddlq_s16(vpaddq_s16(low, high));
    } else {
      r.part[p] = (NativeI32)vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
    }
#else
    for (int l = 0; l < 4; ++l) {
      int s = 0;
      for (int d = 0; d < kDots; ++d) {
        for (int j = 4 * l; j < 4 * l + 4; ++j) {
          const int code = u[d].part[p][j] - (kFull ? 128 : 0);
          s += code * (int8_t)a[d].part[p][j];
        }
      }
      r.part[p][l] = s;
    }
#endif
  }
  return r;
}

// acc + dot_products(u, a). kDots must not exceed kDotsTogether: as many vectors as levels that add pairs of products
// in 16 bits can add without overflow.
#if ISQ_VECTOR_FLOATS == 4
template <int kMaxCode>
constexpr int kDotsTogether = 2;  // products are added one by one: 2 * 128 * 127 fits
#else
template <int kMaxCode>
constexpr int kDotsTogether = kUnsignedDots   ? 1
                              : kMaxCode > 64 ? 1
                              : kMaxCode > 32 ? 2
                                              : 4;
#endif

template <int kDots, int kMaxCode>
ISQ_INLINE Ints add_dot_products(Ints acc, const Bytes* u, const Bytes* a) {
#if defined(ISQ_VNNI) && ISQ_VECTOR_FLOATS == 16
  static_assert(kDots == 1);
  return {{(NativeI32)_mm512_dpbusd_epi32((__m512i)acc.part[0], (__m512i)u[0].part[0], (__m512i)a[0].part[0])}};
#elif defined(ISQ_VNNI) && ISQ_VECTOR_FLOATS == 8
  static_assert(kDots == 1);
  for (int p = 0; p < 2; ++p) {
    acc.part[p] =
        (NativeI32)_mm256_dpbusd_avx_epi32((__m256i)acc.part[p], (__m256i)u[0].part[p], (__m256i)a[0].part[p]);
  }
  return acc;
#else
  const Ints more = dot_products<kDots, kMaxCode>(u, a);
  for (int p = 0; p < kParts; ++p) acc.part[p] += more.part[p];
  return acc;
#endif
}

// Lane 4q + i: the sum over quarter q of t[i], where no lane exceeds kLargest.
template <int kLargest>
ISQ_INLINE Ints sum_quarters(const Ints* t) {
  Ints r;
  for (int p = 0; p < kParts; ++p) {
#if ISQ_VECTOR_FLOATS == 16
    const __m512i a = (__m512i)t[0].part[p], b = (__m512i)t[1].part[p], c = (__m512i)t[2].part[p],
                  d = (__m512i)t[3].part[p];
    // Each of the three steps takes two instructions where 16 bits hold the numbers, and three otherwise.
    const __m512i one = _mm512_set1_epi16(1);
    __m512i ab, cd;  // lanes a a b b, or a b a b
    if constexpr (kLargest < 32768) {
      ab = _mm512_madd_epi16(_mm512_packs_epi32(a, b), one);
      cd = _mm512_madd_epi16(_mm512_packs_epi32(c, d), one);
    } else {
      ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
      cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    }
    if constexpr (2 * kLargest < 32768) {
      r.part[p] = (NativeI32)_mm512_madd_epi16(_mm512_packs_epi32(ab, cd), one);
    } else if constexpr (kLargest < 32768) {
      const __m512 x = (__m512)ab, y = (__m512)cd;
      r.part[p] =
          (NativeI32)_mm512_add_epi32((__m512i)_mm512_shuffle_ps(x, y, 0x88), (__m512i)_mm512_shuffle_ps(x, y, 0xdd));
    } else {
      r.part[p] = (NativeI32)_mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    }
#elif ISQ_VECTOR_FLOATS == 8
    const __m256i ab = _mm256_hadd_epi32((__m256i)t[0].part[p], (__m256i)t[1].part[p]);
    const __m256i cd = _mm256_hadd_epi32((__m256i)t[2].part[p], (__m256i)t[3].part[p]);
    r.part[p] = (NativeI32)_mm256_hadd_epi32(ab, cd);
#elif defined(__aarch64__)
    const int32x4_t ab = vpaddq_s32((int32x4_t)t[0].part[p], (int32x4_t)t[1].part[p]);
    const int32x4_t cd = vpaddq_s32((int32x4_t)t[2].part[p], (int32x4_t)t[3].part[p]);
    r.part[p] = (NativeI32)vpaddq_s32(ab, cd);
#else
    for (int i = 0; i < 4; ++i) {
      const NativeI32 v = t[i].part[p];
      r.part[p][i] = v[0] + v[1] + v[2] + v[3];
    }
#endif
  }
  return r;
}

}  // namespace isqtorch::ISQ_ISA
