// Maps a format to its unit of weights and the layout of that. Each units_*.h specializes this for its formats. Fp8 has
// no unit: its codes are floats.
#pragma once

#include "cpu/formats/list.h"
#include "cpu/linear/rows.h"

namespace isqtorch::ISQ_ISA {

template <class Format>
struct UnitOf;

template <class UnitType>
struct FixedUnit {
  using Unit = UnitType;
  static_assert(Unit::kBytes <= kMaxUnitBytes);
  static UnitLayout layout() { return {Unit::kBytes, UnitHeader::kScaleBiasBf16, {}, {}, {}}; }
};

}  // namespace isqtorch::ISQ_ISA
