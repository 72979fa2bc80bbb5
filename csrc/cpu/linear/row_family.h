// The kernels for few rows of x as one family: int8 dot products for every format that has units, floats for fp8.
#pragma once

#include "cpu/linear/fp8_rows.h"
#include "cpu/linear/rows.h"

namespace isqtorch::ISQ_ISA {

#if ISQ_VECTOR_FLOATS > 4 || defined(__aarch64__)
template <class Unit, int kTokens>
constexpr auto rows_kernel = multiply_rows<Unit, kTokens>;
#else
// One row of x at a time: without vector instructions, sharing decoded weights gains nothing, and kernels for several
// rows took longest of all to compile.
template <class Unit, int kTokens>
void rows_kernel(const RowsJob& job) {
  for (int t = 0; t < kTokens; ++t) {
    RowsJob one = job;
    one.x = static_cast<const uint8_t*>(job.x) + t * packed_activation_bytes<Unit>(job.k);
    one.y = job.y + t * job.ldy;
    multiply_rows<Unit, 1>(one);
  }
}
#endif

// Eight rows of x in two bytes do not fit into the first-level cache, so four are multiplied at a time.
template <class Unit>
void multiply_twice_four(const RowsJob& job) {
  rows_kernel<Unit, 4>(job);
  RowsJob rest = job;
  rest.x = static_cast<const uint8_t*>(job.x) + 4 * packed_activation_bytes<Unit>(job.k);
  rest.y = job.y + 4 * job.ldy;
  rows_kernel<Unit, 4>(rest);
}

template <class Unit>
constexpr auto eight_rows_kernel() {
  if constexpr (kActivationBytes<Unit> == 2) {
    return multiply_twice_four<Unit>;
  } else {
    return rows_kernel<Unit, 8>;
  }
}

struct RowFamily {
  template <class Unit>
  static RowKernels get(const UnitLayout& layout) {
    return {kActivationBytes<Unit> == 1 ? "int8 dot products" : "int8 dot products, x in 15 bits",
            kMaxTokens,
            layout,
            packed_activation_bytes<Unit>,
            pack_activations<Unit>,
            {rows_kernel<Unit, 1>, rows_kernel<Unit, 2>, rows_kernel<Unit, 4>, eight_rows_kernel<Unit>()}};
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
