// The kernels for few rows of x as one family: int8 dot products for every format that has units, floats for fp8.
#pragma once

#include "cpu/linear/fp8_rows.h"
#include "cpu/linear/rows.h"

namespace isqtorch::ISQ_ISA {

#if ISQ_VECTOR_FLOATS > 4 || defined(__aarch64__)
template <class Unit, int kTokens>
constexpr auto rows_kernel = multiply_rows<Unit, kTokens>;
template <class Unit>
constexpr auto place_row = place_activations<Unit>;
#else
// One row of x at a time: without vector instructions, sharing decoded weights gains nothing, and kernels for several
// rows took longest of all to compile. So packed rows stay one after the other.
template <class Unit, int kTokens>
void rows_kernel(const RowsJob& job) {
  for (int t = 0; t < kTokens; ++t) {
    RowsJob one = job;
    one.x = static_cast<const uint8_t*>(job.x) + t * packed_activation_bytes<Unit>(job.k);
    one.y = job.y + t * job.ldy;
    multiply_rows<Unit, 1>(one);
  }
}
template <class Unit>
void place_row(const void* row, int64_t k, int, int token, void* together) {
  const int64_t bytes = packed_activation_bytes<Unit>(k);
  std::memcpy(static_cast<uint8_t*>(together) + token * bytes, row, bytes);
}
#endif

struct RowFamily {
  template <class Unit>
  static RowKernels get(const UnitLayout& layout) {
    return {kActivationBytes<Unit> == 1 ? "int8 dot products" : "int8 dot products, x in 15 bits",
            kMaxTokens,
            layout,
            packed_activation_bytes<Unit>,
            pack_activations<Unit>,
            place_row<Unit>,
            {rows_kernel<Unit, 1>, rows_kernel<Unit, 2>, rows_kernel<Unit, 3>, rows_kernel<Unit, 4>,
             rows_kernel<Unit, 6>, rows_kernel<Unit, 8>}};
  }
  static RowKernels fp8() {
    return {Fp8Step::kName,
            kMaxTokens / 2,
            {},
            packed_fp8_activation_bytes,
            pack_fp8_activations,
            place_fp8_activations,
            {multiply_fp8_rows<1>, multiply_fp8_rows<2>, multiply_fp8_rows<3>, multiply_fp8_rows<4>,
             multiply_fp8_rows<6>, multiply_fp8_rows<8>}};
  }
};

}  // namespace isqtorch::ISQ_ISA
