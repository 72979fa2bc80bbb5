// Everything that is compiled once per ISA level, in namespace isqtorch::ISQ_ISA. No include guard in spirit: each file
// under isa/ is one translation unit with one region.
#pragma once

#include "cpu/isa/prelude.h"

#include "cpu/convert.h"
#include "cpu/dot.h"
#include "cpu/formats/list.h"

namespace isqtorch::ISQ_ISA {

template <class... Format>
struct Kernels {
  static constexpr int kCount = sizeof...(Format);
  static const FormatKernels* all() {
    static const FormatKernels formats[] = {KernelsOf<Format>::get()...};
    return formats;
  }
};

template <class... Format>
Kernels<Format...> kernels_for(Formats<Format...>);

const KernelTable& kernel_table() {
  using All = decltype(kernels_for(AllFormats{}));
  static const KernelTable table = {ISQ_ISA_NAME, All::all(), All::kCount, dot_rows, load_floats, store_floats};
  return table;
}

}  // namespace isqtorch::ISQ_ISA
