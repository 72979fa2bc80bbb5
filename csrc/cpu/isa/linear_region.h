// The kernels of `linear` in namespace isqtorch::ISQ_ISA. Included once per isa/*.cpp, as formats_region.h.
#pragma once

#include "cpu/prelude.h"

#include "cpu/linear/int8_panels.h"
#include "cpu/linear/row_family.h"
#include "cpu/linear/units.h"

namespace isqtorch::ISQ_ISA {

const RowKernels* row_kernels() { return kernels_for<RowFamily>(AllFormats{}); }
// Dot products of bf16 are no faster here than those of int8, so avx512bf16 uses the panels of avx512vnni.
#if (ISQ_VECTOR_FLOATS > 4 || defined(__aarch64__)) && !defined(ISQ_BF16)
const PanelKernels* panel_kernels() { return kernels_for<Int8Panels>(AllFormats{}); }
#endif

}  // namespace isqtorch::ISQ_ISA
