// The kernels of `linear`, compiled once per level, in namespace isqtorch::ISQ_ISA. No include guard in spirit, as in
// formats_region.h.
#pragma once

#include "cpu/isa/prelude.h"

#include "cpu/linear/table.h"

namespace isqtorch::ISQ_ISA {

const RowKernels* row_kernels() { return all_row_kernels(AllFormats{}); }

}  // namespace isqtorch::ISQ_ISA
