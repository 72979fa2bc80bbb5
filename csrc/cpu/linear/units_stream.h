// Units of AFQ and HQQ, whose codes are one little-endian bit stream per group behind a header of two 16-bit numbers. A
// unit is sixteen times 32 weights, for any group size: lane 4q + i has the 32 weights number 4i + q. The layout says
// where they lie; it is known at run time, so that one kernel serves all group sizes and header types.
#pragma once

#include "cpu/linear/unit_of.h"

namespace isqtorch::ISQ_ISA {

template <int kBits, UnitHeader kHeader>
struct StreamUnitWith;

template <int kBits>
struct StreamUnit {
  static constexpr int kWeights = 512, kBytes = 0;
  static constexpr int kReadsBeyond = kBits == 3 || kBits == 5 || kBits == 6 ? 4 : 0;  // loads read sixteen bytes
  static constexpr int kWordsTogether = kBits == 2 ? 2 : 4;  // words of codes in a quarter; if 2, they are there twice
  static constexpr int kMaxCode = (1 << kBits) - 1, kCenter = 0;
  static constexpr bool kAffine = true;

  static constexpr int group_of_lane(int lane) { return lane % 4 * 4 + lane / 4; }
  static constexpr int weight_at(int v, int j) {
    const int first = 32 * (v / 2 * 4 + j / 16), half = v % 2;
    j %= 16;
    if (kBits == 2) return first + 4 * (j % 8) + 2 * (j / 8) + half;
    if (kBits == 4) return first + 2 * j + half;
    return first + 16 * half + j;
  }

  ISQ_INLINE static void load(const uint8_t* unit, const UnitLayout& layout, Bytes* codes, Floats* scale,
                              Floats* offset) {
    switch (layout.header) {
      case UnitHeader::kScaleBiasBf16:
        return load_with<UnitHeader::kScaleBiasBf16>(unit, layout, codes, scale, offset);
      case UnitHeader::kScaleBiasF16:
        return load_with<UnitHeader::kScaleBiasF16>(unit, layout, codes, scale, offset);
      default:
        return load_with<UnitHeader::kScaleZeroF16>(unit, layout, codes, scale, offset);
    }
  }

  template <UnitHeader kHeader>
  using With = StreamUnitWith<kBits, kHeader>;

  template <UnitHeader kHeader>
  ISQ_INLINE static void load_with(const uint8_t* unit, const UnitLayout& layout, Bytes* codes, Floats* scale,
                                   Floats* offset) {
    for (int i = 0; i < 4; ++i) load_codes(unit, layout, i, codes + 2 * i);
    const Ints head = headers(unit, layout);
    if constexpr (kHeader == UnitHeader::kScaleBiasBf16) {
      *scale = low_bf16(head);
      *offset = high_bf16(head);
    } else {
      *scale = low_f16(head);
      *offset = kHeader == UnitHeader::kScaleBiasF16 ? high_f16(head) : -(high_f16(head) * *scale);
    }
  }

 private:
  // The headers of all lanes. Lane 4q + i has the 32 weights number 4i + q, so few headers are in many lanes.
  ISQ_INLINE static Ints headers(const uint8_t* unit, const UnitLayout& layout) {
    const int32_t* at = layout.header_at;
#if ISQ_VECTOR_FLOATS == 16
    if (at[4] == at[0]) {  // groups of 64 or more
      const Quarter first = four_words(unit, at);
      if (at[8] == at[0]) return words_of(four_times(first));
      const Quarter third = four_words(unit, at + 8);
      return words_of(from_quarters(first, first, third, third));
    }
#endif
    return gather_words(unit, load_ints_16(at));
  }

  // The words with the codes of the lanes i, 4 + i, 8 + i and 12 + i, from byte kFirst on.
  template <int kFirst>
  ISQ_INLINE static Bytes stream(const uint8_t* unit, const UnitLayout& layout, int i) {
    static_assert(kFirst % 4 == 0);
    const int32_t* at = layout.codes_at + i;
#if ISQ_VECTOR_FLOATS == 16
    // All four lie within 64 or 128 bytes. The window of the last run must not go beyond the unit, so it begins
    // earlier.
    constexpr int kWindow = kBits <= 3 ? 64 : 128;
    const int over = at[0] + kFirst + kWindow - layout.unit_bytes, back = i == 3 && over > 0 ? over : 0;
    const uint8_t* from = unit + at[0] + kFirst - back;
    __m512i words = _mm512_loadu_si512(layout.words_at);
    if (i == 3) words = _mm512_add_epi32(words, _mm512_set1_epi32(back / 4));
    const __m512i near = _mm512_loadu_si512(from);
    if constexpr (kWindow == 64) return {{(NativeU8)_mm512_permutexvar_epi32(words, near)}};
    return {{(NativeU8)_mm512_permutex2var_epi32(near, words, _mm512_loadu_si512(from + 64))}};
#else
    const auto quarter = [&](int q) {
      const uint8_t* from = unit + at[4 * q] + kFirst;
      return kWordsTogether == 2 ? load_8_twice(from) : load_16(from);
    };
    return from_quarters(quarter(0), quarter(1), quarter(2), quarter(3));
#endif
  }

  // The codes of the same lanes.
  ISQ_INLINE static void load_codes(const uint8_t* unit, const UnitLayout& layout, int i, Bytes* codes) {
    const Bytes begin = stream<0>(unit, layout, i);
    if constexpr (kBits == 2) {  // four codes to a byte: the first two, then the other two
#if defined(ISQ_GFNI)
      codes[0] = pick_bits<picks(0, 1, -1, -1, -1, -1, -1, -1), picks(4, 5, -1, -1, -1, -1, -1, -1)>(begin);
      codes[1] = pick_bits<picks(2, 3, -1, -1, -1, -1, -1, -1), picks(6, 7, -1, -1, -1, -1, -1, -1)>(begin);
#else
      constexpr Quarter kShifts = {0, 0, 0, 0, 0, 0, 0, 0, 4};
      const Bytes all = shift_right_64(begin, four_times(kShifts));
      codes[0] = all & 3;
      codes[1] = shift_right<2>(all) & 3;
#endif
    } else if constexpr (kBits == 4) {  // even codes, odd codes
      codes[0] = bit_field<0, 4>(begin);
      codes[1] = bit_field<4, 4>(begin);
    } else if constexpr (kBits == 8) {
      codes[0] = begin;
      codes[1] = stream<16>(unit, layout, i);
    } else if constexpr (kBits == 3) {  // 32 codes in twelve bytes
      codes[0] = sixteen_codes<0>(begin);
      codes[1] = sixteen_codes<6>(begin);
    } else {
      codes[0] = sixteen_codes<0>(begin);
      codes[1] = sixteen_codes<2 * kBits % 4>(stream<2 * kBits / 4 * 4>(unit, layout, i));
    }
  }

  // In every quarter, the sixteen codes whose bits begin at byte kFirst.
  template <int kFirst>
  ISQ_INLINE static Bytes sixteen_codes(Bytes stream) {
#if defined(ISQ_VBMI)
    // Each 64-bit lane gets `kBits` bytes with eight codes; each of its bytes then takes eight bits from its own
    // position on.
    constexpr Quarter kBytes = {kFirst + 0,         kFirst + 1,         kFirst + 2,         kFirst + 3,
                                kFirst + 4,         kFirst + 5,         kFirst + 6,         kFirst + 7,
                                kFirst + kBits,     kFirst + kBits + 1, kFirst + kBits + 2, kFirst + kBits + 3,
                                kFirst + kBits + 4, kFirst + kBits + 5, kFirst + kBits + 6, kFirst + kBits + 7};
    constexpr Quarter kFrom = {0, kBits, 2 * kBits, 3 * kBits, 4 * kBits, 5 * kBits, 6 * kBits, 7 * kBits,
                               0, kBits, 2 * kBits, 3 * kBits, 4 * kBits, 5 * kBits, 6 * kBits, 7 * kBits};
    const __m512i lanes = (__m512i)shuffle(stream, kBytes & 15).part[0];
    const Bytes codes = {{(NativeU8)_mm512_multishift_epi64_epi8((__m512i)four_times(kFrom).part[0], lanes)}};
    return codes & kMaxCode;
#else
    // Each 16-bit lane e gets the two bytes with code 2e (or 2e + 1); a product moves the code to the upper byte.
    constexpr auto kBytes = [](int odd) {
      Quarter index{};
      for (int j = 0; j < 16; ++j) index[j] = (uint8_t)((kFirst + (j / 2 * 2 + odd) * kBits / 8 + j % 2) & 15);
      return index;
    };
    constexpr auto kFactors = [](int odd) {
      Quarter factor{};
      for (int j = 0; j < 16; j += 2) {
        const int power = 8 - (j + odd) * kBits % 8;
        factor[j] = (uint8_t)(power < 8 ? 1 << power : 0);
        factor[j + 1] = power == 8;
      }
      return factor;
    };
    const Bytes even = multiply_16(shuffle(stream, kBytes(0)), four_times(kFactors(0)));
    const Bytes odd = multiply_16(shuffle(stream, kBytes(1)), four_times(kFactors(1)));
    Bytes codes;
    for (int p = 0; p < kParts; ++p) {
      codes.part[p] = (NativeU8)((NativeU16)even.part[p] >> 8 | ((NativeU16)odd.part[p] & (uint16_t)0xff00));
    }
    return codes & kMaxCode;
#endif
  }
};

// The same for a header that is known at compile time.
template <int kBits, UnitHeader kHeader>
struct StreamUnitWith : StreamUnit<kBits> {
  ISQ_INLINE static void load(const uint8_t* unit, const UnitLayout& layout, Bytes* codes, Floats* scale,
                              Floats* offset) {
    StreamUnit<kBits>::template load_with<kHeader>(unit, layout, codes, scale, offset);
  }
};

template <int kBits, int kGroup, UnitHeader kHeader>
struct StreamOf {
  using Unit = StreamUnit<kBits>;
  static constexpr int kHeaderBytes = 4, kBlockBytes = kHeaderBytes + kGroup * kBits / 8;
  static_assert(512 / kGroup * kBlockBytes <= kMaxUnitBytes);
  static UnitLayout layout() {
    UnitLayout layout = {512 / kGroup * kBlockBytes, kHeader, {}, {}, {}};
    for (int l = 0; l < 16; ++l) {
      const int first = 32 * Unit::group_of_lane(l);
      layout.header_at[l] = first / kGroup * kBlockBytes;
      layout.codes_at[l] = layout.header_at[l] + kHeaderBytes + first % kGroup * kBits / 8;
    }
    for (int w = 0; w < 16; ++w) {
      layout.words_at[w] = (layout.codes_at[w / 4 * 4] - layout.codes_at[0]) / 4 + w % Unit::kWordsTogether;
    }
    return layout;
  }
};

template <int kBits, int kGroup, Dtype kScale>
struct UnitOf<Afq<kBits, kGroup, kScale>>
    : StreamOf<kBits, kGroup, kScale == Dtype::kF16 ? UnitHeader::kScaleBiasF16 : UnitHeader::kScaleBiasBf16> {};
template <int kBits, int kGroup>
struct UnitOf<Hqq<kBits, kGroup>> : StreamOf<kBits, kGroup, UnitHeader::kScaleZeroF16> {};

}  // namespace isqtorch::ISQ_ISA
