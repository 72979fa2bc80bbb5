// Units of ggml's 256-weight formats: one super-block with 16 groups of 16, or two with 8 groups of 32 each.
#pragma once

#include "cpu/linear/unit_of.h"

namespace isqtorch::ISQ_ISA {

// Flips the sign of dmin in pairs of f16 (d, dmin), as a little-endian word: minima are subtracted.
constexpr uint64_t kNegateMins = 0x8000000080000000u;

ISQ_INLINE Quarter quarter_of(uint64_t low, uint64_t high) {
  typedef uint64_t Two ISQ_VECTOR(16);
  return (Quarter)Two{low, high};
}
constexpr uint64_t each_byte(uint8_t v) { return v * 0x0101010101010101u; }

// q2k q3k: quarter q of the bits 2i, 2i + 1 of qs is the group 8 (q / 2) + 2i + q % 2.
constexpr int crumb_group(int lane) { return lane / 8 * 8 + lane % 4 * 2 + lane / 4 % 2; }
// Gives every lane the byte of its group, one of sixteen.
constexpr Spread kCrumbScales = [] {
  Spread index{};
  for (int j = 0; j < 64; ++j) index.from[j] = j % 4 ? 0x80 : (uint8_t)crumb_group(j / 4);
  return index;
}();
ISQ_INLINE void load_crumbs(Bytes all, Bytes* codes) {
  codes[0] = bit_field<0, 2>(all);
  codes[1] = bit_field<2, 2>(all);
  codes[2] = bit_field<4, 2>(all);
  codes[3] = bit_field<6, 2>(all);
}

struct Q2KUnit {
  static constexpr int kWeights = 256, kBytes = sizeof(BlockQ2K), kReadsBeyond = 0;
  static constexpr int kMaxCode = 3, kCenter = 0;
  static constexpr bool kAffine = true;

  static constexpr int weight_at(int v, int j) { return 16 * crumb_group(j / 16 * 4 + v) + j % 16; }

  ISQ_INLINE static void load(const uint8_t* unit, const UnitLayout&, Bytes* codes, Floats* scale, Floats* offset) {
    load_crumbs(load_64(unit + offsetof(BlockQ2K, qs)), codes);
    const Ints scales = words_of(spread(load_16(unit + offsetof(BlockQ2K, scales)), kCrumbScales));
    static_assert(offsetof(BlockQ2K, dmin) == sizeof(BlockQ2K) - 2 && offsetof(BlockQ2K, d) == sizeof(BlockQ2K) - 4);
    constexpr FourFloats kSigns = {1, 1, 1, -1};
    const Factors d(load_four_f16(unit + sizeof(BlockQ2K) - 8) * kSigns);
    *scale = to_floats(scales & 15) * d.at[2];
    *offset = to_floats(shift_right(scales, 4)) * d.at[3];
  }
};

struct Q3KUnit {
  static constexpr int kWeights = 256, kBytes = sizeof(BlockQ3K), kReadsBeyond = 0;
  static constexpr int kMaxCode = 7, kCenter = 4;
  static constexpr bool kAffine = false;

  static constexpr int weight_at(int v, int j) { return Q2KUnit::weight_at(v, j); }

  ISQ_INLINE static void load(const uint8_t* unit, const UnitLayout&, Bytes* codes, Floats* scale, Floats*) {
    const Bytes all = load_64(unit + offsetof(BlockQ3K, qs));
    // Bit i of a byte of hmask is for the first 128 weights, bit 4 + i for the others. Shifted left by 4 in the first
    // half of the vector, both are in the upper nibble.
    constexpr Quarter kBy16 = {16, 0, 16, 0, 16, 0, 16, 0, 16, 0, 16, 0, 16, 0, 16, 0};
    constexpr Quarter kBy1 = {1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0};
    const Bytes mask = multiply_16(load_32_twice(unit), from_quarters(kBy16, kBy16, kBy1, kBy1));
#if defined(ISQ_GFNI)
    const Bytes low = select_bits(15, all, mask), high = select_bits(15, shift_right<4>(mask), all);
    codes[0] = pick_bits<picks(0, 1, 4, -1, -1, -1, -1, -1)>(low);
    codes[1] = pick_bits<picks(2, 3, 5, -1, -1, -1, -1, -1)>(low);
    codes[2] = pick_bits<picks(4, 5, 2, -1, -1, -1, -1, -1)>(high);
    codes[3] = pick_bits<picks(6, 7, 3, -1, -1, -1, -1, -1)>(high);
#else
    load_crumbs(all, codes);
    codes[0] = codes[0] | (shift_right<2>(mask) & 4);
    codes[1] = codes[1] | (shift_right<3>(mask) & 4);
    codes[2] = codes[2] | (shift_right<4>(mask) & 4);
    codes[3] = codes[3] | (shift_right<5>(mask) & 4);
#endif
    const uint8_t* scales = unit + offsetof(BlockQ3K, scales);
    static_assert(offsetof(BlockQ3K, d) == sizeof(BlockQ3K) - 2);
    const Factors d(load_four_f16(unit + sizeof(BlockQ3K) - 8));
    *scale = to_floats(scales_of_lanes(scales)) * d.at[3];
  }

 private:
  // A scale is a 6-bit number minus 32. Group g has its low four bits in a nibble of byte g % 8 (low or high, by g /
  // 8), and its high two bits in bits 2 * (g / 4) and up of byte 8 + g % 4.
  ISQ_INLINE static Ints scales_of_lanes(const uint8_t* scales) {
#if defined(ISQ_VBMI)
    constexpr Spread kFrom = [] {
      Spread index{};
      for (int j = 0; j < 64; ++j) {
        const int group = crumb_group(j / 4), at = j % 4 == 0 ? group % 8 : 8 + group % 4;
        index.from[j] = j % 4 < 2 ? (uint8_t)(at + 2) : 0x80;
      }
      return index;
    }();
    constexpr Spread kFirstBit = [] {  // relative to eight bytes
      Spread bit{};
      for (int j = 0; j < 64; ++j) {
        const int group = crumb_group(j / 4);
        bit.from[j] = (uint8_t)(j % 8 * 8 + (j % 4 == 0 ? group / 8 * 4 : j % 4 == 1 ? group / 4 * 2 : 0));
      }
      return bit;
    }();
    // A load at `scales` would read beyond the block.
    const __m512i bytes = (__m512i)spread(load_16(scales - 2), kFrom).part[0];
    const __m512i fields = _mm512_multishift_epi64_epi8(_mm512_loadu_si512(kFirstBit.from), bytes);
    const __m512i clean = _mm512_and_si512(fields, _mm512_set1_epi32(0x030f));
    return {{(NativeI32)_mm512_dpbusd_epi32(_mm512_set1_epi32(-32), clean, _mm512_set1_epi32(0x1001))}};
#else
    const uint64_t nibbles = load_u64(scales), top = load_u32(scales + 8);
    const uint64_t low = (nibbles & each_byte(15)) | ((top | top >> 2 << 32) & each_byte(3)) << 4;
    const uint64_t high = (nibbles >> 4 & each_byte(15)) | ((top >> 4 | top >> 6 << 32) & each_byte(3)) << 4;
    return words_of(spread(quarter_of(low, high), kCrumbScales)) - all_lanes(32);
#endif
  }
};

// q4k q5k: two super-blocks s. The 32 bytes of chunk c hold groups 2c (low nibbles) and 2c + 1. Quarter q is chunk q,
// so lane 4q + i is group 2q + i % 2 of super-block i / 2.
template <class Block, int kBits>
struct PairsUnit {
  static constexpr int kWeights = 512, kBytes = 2 * sizeof(Block), kReadsBeyond = 0;
  static constexpr int kMaxCode = (1 << kBits) - 1, kCenter = 0;
  static constexpr bool kAffine = true;

  static constexpr int weight_at(int v, int j) {
    const int i = v / 2, half = v % 2;
    return 256 * (i / 2) + 64 * (j / 16) + 32 * (i % 2) + 16 * half + j % 16;
  }

  ISQ_INLINE static void load(const uint8_t* unit, const UnitLayout&, Bytes* codes, Floats* scale, Floats* offset) {
    Quarter ls[2], lm[2];
    for (int s = 0; s < 2; ++s) {
      const uint8_t* block = unit + s * sizeof(Block);
      const uint8_t* qs = block + offsetof(Block, qs);
      Bytes half[2];
      split_quarters(load_64(qs), load_64(qs + 64), &half[0], &half[1]);
      for (int h = 0; h < 2; ++h) {
        codes[4 * s + h] = bit_field<0, 4>(half[h]);
        codes[4 * s + 2 + h] = bit_field<4, 4>(half[h]);
        if constexpr (kBits == 5) {
          // Bit g of a byte of qh is for group g. Quarter q needs bits 2q and 2q + 1, moved up to 6 and 7.
          const Bytes qh = multiply_16(four_times(load_16(block + offsetof(Block, qh) + 16 * h)), factors());
          codes[4 * s + h] = codes[4 * s + h] | (shift_right<2>(qh) & 16);
          codes[4 * s + 2 + h] = codes[4 * s + 2 + h] | (shift_right<3>(qh) & 16);
        }
      }
      load_pairs(block + offsetof(Block, scales), &ls[s], &lm[s]);
    }
    static_assert(offsetof(Block, d) == 0 && offsetof(Block, dmin) == 2);
    const uint64_t pairs = load_u32(unit) | (uint64_t)load_u32(unit + sizeof(Block)) << 32;
    const FourFloats d = four_f16(pairs ^ kNegateMins);  // d, -dmin of both blocks
    *scale = bytes_to_floats(interleave_pairs(ls[0], ls[1])) * repeat_4<0, 0, 2, 2>(d);
    *offset = bytes_to_floats(interleave_pairs(lm[0], lm[1])) * repeat_4<1, 1, 3, 3>(d);
  }

 private:
  ISQ_INLINE static Bytes factors() {
    constexpr auto kAll = [](uint8_t factor) {
      return Quarter{factor, 0, factor, 0, factor, 0, factor, 0, factor, 0, factor, 0, factor, 0, factor, 0};
    };
    return from_quarters(kAll(64), kAll(16), kAll(4), kAll(1));
  }
  // See unpack_pairs in cpu/formats/kquants_affine.h; here the eight numbers become the low eight bytes.
  ISQ_INLINE static void load_pairs(const uint8_t* packed, Quarter* ls, Quarter* lm) {
    const uint64_t a = load_u32(packed), b = load_u32(packed + 4), c = load_u32(packed + 8);
    const uint64_t scales = (a & 0x3f3f3f3f) | ((c & 0x0f0f0f0f) | (a >> 2 & 0x30303030)) << 32;
    const uint64_t mins = (b & 0x3f3f3f3f) | ((c >> 4 & 0x0f0f0f0f) | (b >> 2 & 0x30303030)) << 32;
    *ls = quarter_of(scales, 0);
    *lm = quarter_of(mins, 0);
  }
  // a0 a1 b0 b1 a2 a3 b2 b3 ...
  ISQ_INLINE static Quarter interleave_pairs(Quarter a, Quarter b) {
#if defined(__x86_64__)
    return (Quarter)_mm_unpacklo_epi16((__m128i)a, (__m128i)b);
#else
    return ISQ_SHUFFLE(a, b, 0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23);
#endif
  }
};

// q6k: vector i is the weights 64i .. 64i + 63 in order, so lane 4q + i is group 4i + q.
struct Q6KUnit {
  static constexpr int kWeights = 256, kBytes = sizeof(BlockQ6K), kReadsBeyond = 0;
  static constexpr int kMaxCode = 63, kCenter = 32;
  static constexpr bool kAffine = false;

  static constexpr int weight_at(int v, int j) { return 64 * v + j; }

  ISQ_INLINE static void load(const uint8_t* unit, const UnitLayout&, Bytes* codes, Floats* scale, Floats*) {
    constexpr Quarter kBy4 = {4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0};
    constexpr Quarter kBy1 = {1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0};
    for (int h = 0; h < 2; ++h) {
      const Bytes low = load_64(unit + offsetof(BlockQ6K, ql) + 64 * h);
      // Bits 0-1 and 4-5 are for the first 32 weights of vectors 2h and 2h + 1, the others for the second 32. Shifted
      // left by 2 in the first half, all of them are in bits 2-3 and 6-7.
      const Bytes qh = load_32_twice(unit + offsetof(BlockQ6K, qh) + 32 * h);
      const Bytes high = multiply_16(qh, from_quarters(kBy4, kBy4, kBy1, kBy1));
      codes[2 * h] = (low & 15) | (shift_left<2>(high) & 0x30);
      codes[2 * h + 1] = (shift_right<4>(low) & 15) | (shift_right<2>(high) & 0x30);
    }
    constexpr Quarter kTransposed = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    static_assert(offsetof(BlockQ6K, d) == sizeof(BlockQ6K) - 2);
    const Factors d(load_four_f16(unit + sizeof(BlockQ6K) - 8));
    const Quarter scales = shuffle(load_16(unit + offsetof(BlockQ6K, scales)), kTransposed);
    *scale = signed_bytes_to_floats(scales) * d.at[3];
  }
};

// q8k: two super-blocks of signed bytes; lane 4q + i is the group 4i + q of 32 weights.
struct Q8KUnit {
  static constexpr int kWeights = 512, kBytes = 2 * sizeof(BlockQ8K), kReadsBeyond = 0;
  static constexpr int kMaxCode = 255, kCenter = 128;
  static constexpr bool kAffine = false;

  static constexpr int weight_at(int v, int j) { return 128 * (v / 2) + 32 * (j / 16) + 16 * (v % 2) + j % 16; }

  ISQ_INLINE static void load(const uint8_t* unit, const UnitLayout&, Bytes* codes, Floats* scale, Floats*) {
    for (int i = 0; i < 4; ++i) {
      const uint8_t* qs = unit + i / 2 * sizeof(BlockQ8K) + offsetof(BlockQ8K, qs) + i % 2 * 128;
      Bytes half[2];
      split_quarters(load_64(qs), load_64(qs + 64), &half[0], &half[1]);
      for (int h = 0; h < 2; ++h) codes[2 * i + h] = half[h] ^ 0x80;
    }
    const FourFloats d = {load_f32(unit), load_f32(unit + sizeof(BlockQ8K))};
    *scale = repeat_4<0, 0, 1, 1>(d);
  }
};

// Formats whose codes times the integer scales of their groups of 16 still fit into bytes. Such products are summed
// over all groups with one scale, that of the block; only the step of x changes, every 32 weights.
template <class Unit>
struct Folding {
  static constexpr bool kFits = false;
};
#if defined(ISQ_VNNI) || defined(ISQ_DOTPROD)
template <>
struct Folding<Q2KUnit> {
  static constexpr bool kFits = true;
  static constexpr int kBlockScale = offsetof(BlockQ2K, d);
  static constexpr int kMaxCode = 3 * 15, kCenter = 0;
};
template <>
struct Folding<Q3KUnit> {
  static constexpr bool kFits = true;
  static constexpr int kBlockScale = offsetof(BlockQ3K, d);
  static constexpr int kMaxCode = 255, kCenter = 127;  // -4 .. 3 times -32 .. 31 is -124 .. 128
};
#endif

template <>
struct UnitOf<Q2K> : FixedUnit<Q2KUnit> {};
template <>
struct UnitOf<Q3K> : FixedUnit<Q3KUnit> {};
template <>
struct UnitOf<Q4K> : FixedUnit<PairsUnit<BlockQ4K, 4>> {};
template <>
struct UnitOf<Q5K> : FixedUnit<PairsUnit<BlockQ5K, 5>> {};
template <>
struct UnitOf<Q6K> : FixedUnit<Q6KUnit> {};
template <>
struct UnitOf<Q8K> : FixedUnit<Q8KUnit> {};

}  // namespace isqtorch::ISQ_ISA
