// The kernels of `linear`, compiled once per level, in namespace isqtorch::ISQ_ISA. No include guard in spirit, as in
// formats_region.h.
#pragma once

#include "cpu/prelude.h"

#include "cpu/linear/int8_panels.h"
#include "cpu/linear/row_family.h"
#include "cpu/linear/units.h"

namespace isqtorch::ISQ_ISA {

const RowKernels* row_kernels() { return kernels_for<RowFamily>(AllFormats{}); }
// Dot products of bf16 add nothing to those of int8: there the panels are avx512vnni's.
#if (ISQ_VECTOR_FLOATS > 4 || defined(__aarch64__)) && !defined(ISQ_BF16)
const PanelKernels* panel_kernels() { return kernels_for<Int8Panels>(AllFormats{}); }
#endif

}  // namespace isqtorch::ISQ_ISA
