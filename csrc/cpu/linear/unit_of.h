// Which unit of weights, in which layout, belongs to which format: units_*.h say it, each for its own. Fp8 has none:
// its codes are floats.
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
