// Units of the formats whose codes are one little-endian bit stream per group, behind a header of two 16-bit numbers:
// affine and HQQ. Sixteen times 32 weights, in order: lane l is the 32 from 32 l on, whatever the group size is. The
// layout (known at run time, so that one kernel serves all group sizes and header types) says where they lie.
#pragma once

#include "cpu/linear/rows.h"

namespace isqtorch::ISQ_ISA {

template <int kBits>
struct StreamUnit {
  static constexpr int kWeights = 512;
  // Sixteen codes are loaded as sixteen bytes (or all 32 as sixteen), of which 2 * kBits are theirs.
  static constexpr int kReadsBeyond = kBits == 3 ? 4 : kBits == 5 || kBits == 6 ? 16 - 2 * kBits : 0;
  static constexpr int kMaxCode = (1 << kBits) - 1, kCenter = 0;
  static constexpr bool kAffine = true;

  static constexpr int weight_at(int v, int j) {
    const int first = 32 * (j / 16 * 4 + v / 2), half = v % 2;
    j %= 16;
    if (kBits == 2) return first + 4 * (j % 8) + 2 * (j / 8) + half;
    if (kBits == 4) return first + 2 * j + half;
    return first + 16 * half + j;
  }

  ISQ_INLINE static void load(const uint8_t* unit, const UnitLayout& layout, Bytes* codes, Floats* scale,
                              Floats* offset) {
    for (int i = 0; i < 4; ++i) load_codes(unit, layout.codes_at + i, codes + 2 * i);
    const Ints head = gather_words(unit, load_ints_16(layout.header_at));
    switch (layout.header) {
      case UnitHeader::kScaleBiasBf16:
        *scale = low_bf16(head);
        *offset = high_bf16(head);
        break;
      case UnitHeader::kScaleBiasF16:
        *scale = low_f16(head);
        *offset = high_f16(head);
        break;
      default:
        *scale = low_f16(head);
        *offset = -(high_f16(head) * *scale);
    }
  }

 private:
  // The codes of the lanes i, 4 + i, 8 + i and 12 + i; at[4 q] is where those of lane 4 q + i begin.
  ISQ_INLINE static void load_codes(const uint8_t* unit, const int32_t* at, Bytes* codes) {
    const uint8_t *a = unit + at[0], *b = unit + at[4], *c = unit + at[8], *d = unit + at[12];
    const auto sixteen = [&](int first) {
      return from_quarters(load_16(a + first), load_16(b + first), load_16(c + first), load_16(d + first));
    };
    if constexpr (kBits == 2) {  // eight bytes with four codes each: the first two of each, then the other two
      const Bytes twice = from_quarters(load_8_twice(a), load_8_twice(b), load_8_twice(c), load_8_twice(d));
      constexpr Quarter kShifts = {0, 0, 0, 0, 0, 0, 0, 0, 4};
      const Bytes all = shift_right_64(twice, four_times(kShifts));
      codes[0] = all & 3;
      codes[1] = shift_right<2>(all) & 3;
    } else if constexpr (kBits == 4) {  // even codes, odd codes
      const Bytes all = sixteen(0);
      codes[0] = all & 15;
      codes[1] = shift_right<4>(all) & 15;
    } else if constexpr (kBits == 8) {
      codes[0] = sixteen(0);
      codes[1] = sixteen(16);
    } else if constexpr (kBits == 3) {
      const Bytes all = sixteen(0);  // 32 codes in twelve bytes
      codes[0] = sixteen_codes<0>(all);
      codes[1] = sixteen_codes<6>(all);
    } else {
      codes[0] = sixteen_codes<0>(sixteen(0));
      codes[1] = sixteen_codes<0>(sixteen(2 * kBits));
    }
  }

  // In every quarter, the sixteen codes whose bits begin at byte kFirst.
  template <int kFirst>
  ISQ_INLINE static Bytes sixteen_codes(Bytes stream) {
#if defined(ISQ_VBMI)
    // Eight codes, `kBits` bytes, to each 64-bit lane; there every byte takes eight bits from its own position on.
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
    // To each 16-bit lane e the two bytes that code 2e (or 2e + 1) lies in; a product moves the code to the upper byte.
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

}  // namespace isqtorch::ISQ_ISA
