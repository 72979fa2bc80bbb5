// Decoders and quantizers, compiled once per level that makes a difference to them, in namespace isqtorch::ISQ_ISA. No
// include guard in spirit: each file under isa/ is one translation unit with one region.
#pragma once

#include "cpu/prelude.h"

#include "cpu/formats/list.h"

namespace isqtorch::ISQ_ISA {

template <class... Format>
FormatTable format_table_of(Formats<Format...>) {
  static const FormatKernels formats[] = {KernelsOf<Format>::get()...};
  return {formats, sizeof...(Format), load_floats, store_floats, add_squares};
}

FormatTable format_table() { return format_table_of(AllFormats{}); }

}  // namespace isqtorch::ISQ_ISA
