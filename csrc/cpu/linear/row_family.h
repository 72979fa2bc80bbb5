// The kernels for a few rows of x as one family: int8 dot products for every format that has units, floats for fp8.
#pragma once

#include "cpu/linear/fp8_rows.h"
#include "cpu/linear/rows.h"

namespace isqtorch::ISQ_ISA {

struct RowFamily {
  template <class Unit>
  static RowKernels get(const UnitLayout& layout) {
    return {"int8 dot products",
            kMaxTokens,
            layout,
            packed_activation_bytes<Unit>,
            pack_activations<Unit>,
            {multiply_rows<Unit, 1>, multiply_rows<Unit, 2>, multiply_rows<Unit, 4>, multiply_rows<Unit, 8>}};
  }
  static RowKernels fp8() {
    return {Fp8Step::kName,
            kMaxTokens / 2,
            {},
            packed_fp8_activation_bytes,
            pack_fp8_activations,
            {multiply_fp8_rows<1>, multiply_fp8_rows<2>, multiply_fp8_rows<4>, multiply_fp8_rows<8>}};
  }
};

}  // namespace isqtorch::ISQ_ISA
