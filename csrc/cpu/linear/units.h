// Which unit of weights, in which layout, belongs to which format. Fp8 has none: its codes are floats.
#pragma once

#include "cpu/formats/list.h"
#include "cpu/linear/units_blocks32.h"
#include "cpu/linear/units_kquants.h"
#include "cpu/linear/units_stream.h"

namespace isqtorch::ISQ_ISA {

template <class UnitType>
struct FixedUnit {
  using Unit = UnitType;
  static_assert(Unit::kBytes <= kMaxUnitBytes);
  static UnitLayout layout() { return {Unit::kBytes, UnitHeader::kScaleBiasBf16, {}, {}, {}}; }
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

template <class Format>
struct UnitOf;
template <>
struct UnitOf<Q4_0> : FixedUnit<NibbleUnit<BlockQ4_0, 4, false>> {};
template <>
struct UnitOf<Q4_1> : FixedUnit<NibbleUnit<BlockQ4_1, 4, true>> {};
template <>
struct UnitOf<Q5_0> : FixedUnit<NibbleUnit<BlockQ5_0, 5, false>> {};
template <>
struct UnitOf<Q5_1> : FixedUnit<NibbleUnit<BlockQ5_1, 5, true>> {};
template <>
struct UnitOf<Q8_0> : FixedUnit<ByteUnit<BlockQ8_0>> {};
template <>
struct UnitOf<Q8_1> : FixedUnit<ByteUnit<BlockQ8_1>> {};
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
template <int kBits, int kGroup, Dtype kScale>
struct UnitOf<Affine<kBits, kGroup, kScale>>
    : StreamOf<kBits, kGroup, kScale == Dtype::kF16 ? UnitHeader::kScaleBiasF16 : UnitHeader::kScaleBiasBf16> {};
template <int kBits, int kGroup>
struct UnitOf<Hqq<kBits, kGroup>> : StreamOf<kBits, kGroup, UnitHeader::kScaleZeroF16> {};

// The kernels that a family, with members get<Unit>(layout) and fp8(), has for a format.
template <class Family, class Format>
auto kernels_of() {
  if constexpr (std::is_same_v<Format, Fp8>) {
    return Family::fp8();
  } else {
    return Family::template get<typename UnitOf<Format>::Unit>(UnitOf<Format>::layout());
  }
}

template <class Family, class... Format>
auto kernels_for(Formats<Format...>) {
  static const decltype(Family::fp8()) kernels[] = {kernels_of<Family, Format>()...};
  return &kernels[0];
}

}  // namespace isqtorch::ISQ_ISA
