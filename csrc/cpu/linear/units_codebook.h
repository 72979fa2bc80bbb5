// Units of the formats whose codes are numbers of levels in a table: iq4_nl, iq4_xs, mxfp4. One shuffle turns sixteen
// codes or more into levels, and from there on they are like the codes of other formats.
#pragma once

#include "cpu/linear/units_blocks32.h"
#include "cpu/linear/units_kquants.h"

namespace isqtorch::ISQ_ISA {

typedef int8_t SignedQuarter ISQ_VECTOR(16);

// Tables of levels plus kCenter, because codes are unsigned.
struct Iq4Levels {
  static constexpr int kCenter = 128, kMaxCode = 255;
  static constexpr Quarter kTable = (Quarter)SignedQuarter{ISQ_IQ4_LEVELS} + (uint8_t)kCenter;
};
struct E2m1Levels {
  static constexpr int kCenter = 12, kMaxCode = 24;
  static constexpr Quarter kTable = (Quarter)SignedQuarter{ISQ_E2M1_LEVELS} + (uint8_t)kCenter;
};

// iq4_nl, mxfp4: sixteen blocks, lane l = block l.
template <class Block, class LevelsType>
struct LevelUnit {
  using Levels = LevelsType;
  static constexpr int kWeights = 512, kBytes = 16 * sizeof(Block), kReadsBeyond = 0;
  static constexpr int kMaxCode = Levels::kMaxCode, kCenter = Levels::kCenter;
  static constexpr bool kAffine = false;

  static constexpr int weight_at(int v, int j) { return 32 * (j / 16 * 4 + v / 2) + 16 * (v % 2) + j % 16; }

  ISQ_INLINE static void load(const uint8_t* unit, const UnitLayout&, Bytes* codes, Floats* scale, Floats*) {
    for (int i = 0; i < 4; ++i) {
      const Bytes qs = quarters_of_blocks<sizeof(Block)>(unit, i, offsetof(Block, qs));
      codes[2 * i] = look_up(Levels::kTable, bit_field<0, 4>(qs));
      codes[2 * i + 1] = look_up(Levels::kTable, bit_field<4, 4>(qs));
    }
    const Ints head = block_heads<sizeof(Block), std::is_same_v<Block, BlockMxfp4> ? 1 : 2>(unit);
    if constexpr (std::is_same_v<Block, BlockMxfp4>) {
      *scale = half_power_of_two(head & 255);
    } else {
      *scale = low_f16(head);
    }
  }

 private:
  // 2^(e - 128). The smallest power, of e = 0, becomes 0: x has no numbers so large that its products matter.
  ISQ_INLINE static Floats half_power_of_two(Ints e) {
    Floats f;
    for (int p = 0; p < kParts; ++p) f.part[p] = (NativeF32)(e.part[p] << 23) * 0.5f;
    return f;
  }
};

// iq4_xs: two super-blocks s with eight groups g. Quarter q of 64 bytes h is group 4h + q, so lane 4q + i is group 4 (i
// % 2) + q of super-block i / 2.
struct Iq4XsUnit {
  using Block = BlockIq4Xs;
  using Levels = Iq4Levels;
  static constexpr int kWeights = 512, kBytes = 2 * sizeof(Block), kReadsBeyond = 0;
  static constexpr int kMaxCode = Levels::kMaxCode, kCenter = Levels::kCenter;
  static constexpr bool kAffine = false;

  static constexpr int weight_at(int v, int j) { return 128 * (v / 2) + 32 * (j / 16) + 16 * (v % 2) + j % 16; }

  ISQ_INLINE static void load(const uint8_t* unit, const UnitLayout&, Bytes* codes, Floats* scale, Floats*) {
    for (int i = 0; i < 4; ++i) {
      const Bytes qs = load_64(unit + i / 2 * sizeof(Block) + offsetof(Block, qs) + i % 2 * 64);
      codes[2 * i] = look_up(Levels::kTable, bit_field<0, 4>(qs));
      codes[2 * i + 1] = look_up(Levels::kTable, bit_field<4, 4>(qs));
    }
    // Byte 8s + 4 (g % 2) + g / 2 of `scales` belongs to group g of super-block s.
    constexpr Quarter kOfLane = {0, 2, 8, 10, 4, 6, 12, 14, 1, 3, 9, 11, 5, 7, 13, 15};
    const Quarter scales = quarter_of(scales_of(unit), scales_of(unit + sizeof(Block)));
    const FourFloats d = four_f16(load_u16(unit) | (uint64_t)load_u16(unit + sizeof(Block)) << 16);
    *scale = signed_bytes_to_floats(shuffle(scales, kOfLane) - 32) * repeat_4<0, 0, 1, 1>(d);
  }

 private:
  // The scales of a super-block plus 32, those of even groups in the lower four bytes.
  ISQ_INLINE static uint64_t scales_of(const uint8_t* block) {
    const uint64_t low = load_u32(block + offsetof(Block, scales_l));
    uint64_t high = load_u16(block + offsetof(Block, scales_h));
    high = (high | high << 8) & 0x00ff00ff;
    high = (high | high << 4) & 0x0f0f0f0f;  // a byte for two groups
    const uint64_t even = (low & 0x0f0f0f0f) | (high << 4 & 0x30303030);
    const uint64_t odd = (low >> 4 & 0x0f0f0f0f) | (high << 2 & 0x30303030);
    return even | odd << 32;
  }
};

template <>
struct UnitOf<Iq4Nl> : FixedUnit<LevelUnit<BlockIq4Nl, Iq4Levels>> {};
template <>
struct UnitOf<Mxfp4> : FixedUnit<LevelUnit<BlockMxfp4, E2m1Levels>> {};
template <>
struct UnitOf<Iq4Xs> : FixedUnit<Iq4XsUnit> {};

}  // namespace isqtorch::ISQ_ISA
