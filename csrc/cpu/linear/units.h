// Instantiates the kernels of a family for every format, with the unit of weights of that format.
#pragma once

#include "cpu/linear/units_blocks32.h"
#include "cpu/linear/units_codebook.h"
#include "cpu/linear/units_kquants.h"
#include "cpu/linear/units_stream.h"

namespace isqtorch::ISQ_ISA {

// A family's kernels for one format. A family has members get<Unit>(layout) and fp8().
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
