// Which kernels of cpu/linear serve which format.
#pragma once

#include "cpu/formats/list.h"
#include "cpu/linear/fp8_rows.h"
#include "cpu/linear/units_blocks32.h"
#include "cpu/linear/units_kquants.h"
#include "cpu/linear/units_stream.h"

namespace isqtorch::ISQ_ISA {

template <class Unit>
RowKernels row_kernels(const UnitLayout& layout) {
  static_assert(Unit::kWeights == 512 || Unit::kWeights == 256);
  return {"int8 dot products",
          layout,
          packed_activation_bytes<Unit>,
          pack_activations<Unit>,
          {multiply_rows<Unit, 1>, multiply_rows<Unit, 2>, multiply_rows<Unit, 4>, multiply_rows<Unit, 8>}};
}

// Formats with units of their own.
template <class Unit>
struct FixedUnit {
  static_assert(Unit::kBytes <= kMaxUnitBytes);
  static RowKernels get() { return row_kernels<Unit>({Unit::kBytes, UnitHeader::kScaleBiasBf16, {}, {}}); }
};

template <int kBits, int kGroup, UnitHeader kHeader>
struct StreamOf {
  static constexpr int kHeaderBytes = 4, kBlockBytes = kHeaderBytes + kGroup * kBits / 8;
  static_assert(512 / kGroup * kBlockBytes <= kMaxUnitBytes);
  static RowKernels get() {
    UnitLayout layout = {512 / kGroup * kBlockBytes, kHeader, {}, {}};
    for (int l = 0; l < 16; ++l) {
      layout.header_at[l] = 32 * l / kGroup * kBlockBytes;
      layout.codes_at[l] = layout.header_at[l] + kHeaderBytes + 32 * l % kGroup * kBits / 8;
    }
    return row_kernels<StreamUnit<kBits>>(layout);
  }
};

template <class Format>
struct RowKernelsOf;
template <>
struct RowKernelsOf<Q4_0> : FixedUnit<NibbleUnit<BlockQ4_0, 4, false>> {};
template <>
struct RowKernelsOf<Q4_1> : FixedUnit<NibbleUnit<BlockQ4_1, 4, true>> {};
template <>
struct RowKernelsOf<Q5_0> : FixedUnit<NibbleUnit<BlockQ5_0, 5, false>> {};
template <>
struct RowKernelsOf<Q5_1> : FixedUnit<NibbleUnit<BlockQ5_1, 5, true>> {};
template <>
struct RowKernelsOf<Q8_0> : FixedUnit<ByteUnit<BlockQ8_0>> {};
template <>
struct RowKernelsOf<Q8_1> : FixedUnit<ByteUnit<BlockQ8_1>> {};
template <>
struct RowKernelsOf<Q2K> : FixedUnit<Q2KUnit> {};
template <>
struct RowKernelsOf<Q3K> : FixedUnit<Q3KUnit> {};
template <>
struct RowKernelsOf<Q4K> : FixedUnit<PairsUnit<BlockQ4K, 4>> {};
template <>
struct RowKernelsOf<Q5K> : FixedUnit<PairsUnit<BlockQ5K, 5>> {};
template <>
struct RowKernelsOf<Q6K> : FixedUnit<Q6KUnit> {};
template <>
struct RowKernelsOf<Q8K> : FixedUnit<Q8KUnit> {};
template <int kBits, int kGroup, Dtype kScale>
struct RowKernelsOf<Affine<kBits, kGroup, kScale>>
    : StreamOf<kBits, kGroup, kScale == Dtype::kF16 ? UnitHeader::kScaleBiasF16 : UnitHeader::kScaleBiasBf16> {};
template <int kBits, int kGroup>
struct RowKernelsOf<Hqq<kBits, kGroup>> : StreamOf<kBits, kGroup, UnitHeader::kScaleZeroF16> {};
template <>
struct RowKernelsOf<Fp8> {
  static RowKernels get() {
    return {Fp8Step::kName,
            {},
            packed_fp8_activation_bytes,
            pack_fp8_activations,
            {multiply_fp8_rows<1>, multiply_fp8_rows<2>, multiply_fp8_rows<4>, multiply_fp8_rows<8>}};
  }
};

template <class... Format>
const RowKernels* all_row_kernels(Formats<Format...>) {
  static const RowKernels kernels[] = {RowKernelsOf<Format>::get()...};
  return kernels;
}

}  // namespace isqtorch::ISQ_ISA
