// How the codes of a unit become the left operand of int8_tiles.h, one group after the other.
//
// In a decoder's vectors (see rows.h) the quarters are in the order of lanes, which makes sums within a register cheap.
// The general struct here reorders them for any format. Formats that are faster to decode in order have
// specializations.
#pragma once

#include "cpu/linear/rows.h"
#include "cpu/linear/units_blocks32.h"
#include "cpu/linear/units_codebook.h"
#include "cpu/linear/units_kquants.h"

namespace isqtorch::ISQ_ISA {

// Codes of formats without offsets are signed: u - kCenter. (Decoders of signed bytes have flipped the same bit; the
// compiler removes both.)
template <class Unit>
ISQ_INLINE __m512i signed_codes(__m512i codes) {
  if constexpr (Unit::kAffine) return codes;
  if constexpr (Unit::kCenter == 128) return _mm512_xor_si512(codes, _mm512_set1_epi8((char)0x80));
  return _mm512_sub_epi8(codes, _mm512_set1_epi8((char)Unit::kCenter));
}

// For any unit. Position 4i + q is the group of lane 4q + i.
template <class Unit>
struct TileCodes {
  static constexpr int lane_at(int position) { return position % 4 * 4 + position / 4; }

  // `codes` come from Unit::load. A specialization that ignores them costs nothing: the compiler removes the load.
  ISQ_INLINE static void store(const uint8_t*, const Bytes* codes, __m512i* to) {
    using Facts = UnitFacts<Unit>;
    if constexpr (Facts::kDots == 1) {
      for (int v = 0; v < 4; ++v) _mm512_store_si512(to + v, signed_codes<Unit>((__m512i)codes[v].part[0]));
    } else {
      static_assert(Facts::kDots == 2);
      const __m512i kLow = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
      const __m512i kHigh = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
      for (int i = 0; i < 4; ++i) {  // a group is a quarter of two vectors
        const __m512i a = signed_codes<Unit>((__m512i)codes[2 * i].part[0]);
        const __m512i b = signed_codes<Unit>((__m512i)codes[2 * i + 1].part[0]);
        _mm512_store_si512(to + 2 * i, _mm512_permutex2var_epi64(a, kLow, b));
        _mm512_store_si512(to + 2 * i + 1, _mm512_permutex2var_epi64(a, kHigh, b));
      }
    }
  }
};

// Twice sixteen bytes of nibbles: the low ones at a, the high ones at a, the low ones at b, the high ones at b.
ISQ_INLINE __m512i nibbles_of_two(const uint8_t* a, const uint8_t* b) {
  const __m512i shifts = _mm512_maskz_set1_epi16(0xff00ff00, 4);
  const __m128i first = _mm_loadu_si128((const __m128i*)a), second = _mm_loadu_si128((const __m128i*)b);
  const __m512i both = _mm512_mask_broadcast_i32x4(_mm512_broadcast_i32x4(first), 0xff00, second);
  return _mm512_and_si512(_mm512_srlv_epi16(both, shifts), _mm512_set1_epi8(15));
}

// q4_0 q4_1 q5_0 q5_1: two blocks fill a vector.
template <class Block, int kBits, bool kHasMin>
struct TileCodes<NibbleUnit<Block, kBits, kHasMin>> {
  static constexpr int lane_at(int position) { return position; }

  ISQ_INLINE static void store(const uint8_t* unit, const Bytes*, __m512i* to) {
    for (int i = 0; i < 8; ++i) {
      const uint8_t *a = unit + 2 * i * sizeof(Block), *b = a + sizeof(Block);
      __m512i codes = nibbles_of_two(a + offsetof(Block, qs), b + offsetof(Block, qs));
      if constexpr (kBits == 5) {
        const uint64_t fifth = load_u32(a + offsetof(Block, qh)) | (uint64_t)load_u32(b + offsetof(Block, qh)) << 32;
        codes = _mm512_mask_add_epi8(codes, fifth, codes, _mm512_set1_epi8(16));
      }
      _mm512_store_si512(to + i, signed_codes<NibbleUnit<Block, kBits, kHasMin>>(codes));
    }
  }
};

// The levels themselves, for numbers of levels.
template <class Levels>
ISQ_INLINE __m512i signed_levels(__m512i numbers) {
  const __m512i table = _mm512_broadcast_i32x4((__m128i)(Levels::kTable - (uint8_t)Levels::kCenter));
  return _mm512_shuffle_epi8(table, numbers);
}

// iq4_nl mxfp4
template <class Block, class Levels>
struct TileCodes<LevelUnit<Block, Levels>> {
  static constexpr int lane_at(int position) { return position; }

  ISQ_INLINE static void store(const uint8_t* unit, const Bytes*, __m512i* to) {
    for (int i = 0; i < 8; ++i) {
      const uint8_t* qs = unit + 2 * i * sizeof(Block) + offsetof(Block, qs);
      _mm512_store_si512(to + i, signed_levels<Levels>(nibbles_of_two(qs, qs + sizeof(Block))));
    }
  }
};

// iq4_xs: position 8s + 4h + q is group 4h + q of super-block s.
template <>
struct TileCodes<Iq4XsUnit> {
  static constexpr int lane_at(int position) { return position % 4 * 4 + position / 4; }

  ISQ_INLINE static void store(const uint8_t* unit, const Bytes*, __m512i* to) {
    for (int i = 0; i < 8; ++i) {
      const uint8_t* qs = unit + i / 4 * sizeof(BlockIq4Xs) + offsetof(BlockIq4Xs, qs) + i % 4 * 32;
      _mm512_store_si512(to + i, signed_levels<Iq4Levels>(nibbles_of_two(qs, qs + 16)));
    }
  }
};

// q4k q5k: 64 bytes of super-block s hold groups 4h and 4h + 2 in their low nibbles, 4h + 1 and 4h + 3 in the high
// ones.
template <class Block, int kBits>
struct TileCodes<PairsUnit<Block, kBits>> {
  // Position 8s + 4h + 2 nibble + j is group 4h + 2j + nibble, which is in quarter 2h + j.
  static constexpr int lane_at(int position) {
    const int s = position / 8, h = position / 4 % 2, nibble = position / 2 % 2, j = position % 2;
    return 4 * (2 * h + j) + 2 * s + nibble;
  }

  ISQ_INLINE static void store(const uint8_t* unit, const Bytes*, __m512i* to) {
    for (int s = 0; s < 2; ++s, unit += sizeof(Block)) {
      __m512i qh = _mm512_setzero_si512();
      if constexpr (kBits == 5) qh = (__m512i)load_32_twice(unit + offsetof(Block, qh)).part[0];
      for (int h = 0; h < 2; ++h) {
        const __m512i both = _mm512_loadu_si512(unit + offsetof(Block, qs) + 64 * h);
        for (int nibble = 0; nibble < 2; ++nibble) {
          __m512i codes = _mm512_and_si512(nibble ? _mm512_srli_epi16(both, 4) : both, _mm512_set1_epi8(15));
          if constexpr (kBits == 5) {  // bit g of a byte of qh is for group g
            const int group = 4 * h + nibble;
            const __m512i bit = _mm512_mask_set1_epi8(_mm512_set1_epi8((char)(1 << group)), 0xffffffff00000000,
                                                      (char)(1 << (group + 2)));
            codes = _mm512_mask_add_epi8(codes, _mm512_test_epi8_mask(qh, bit), codes, _mm512_set1_epi8(16));
          }
          _mm512_store_si512(to++, codes);
        }
      }
    }
  }
};

}  // namespace isqtorch::ISQ_ISA
