// Which kernel of `linear` runs for how many rows of x: the one list that the operator follows and cpu_info describes.
#pragma once

#include <array>

#include "cpu/kernels.h"

namespace isqtorch {

enum class LinearWay : uint8_t { kRows, kPanels, kDecoded };

struct LinearChoice {
  int64_t first, last;  // rows of x
  LinearWay way;
  const char* kernel;
  const char* why;
};

// The panel kernels of a format at a level, or null.
inline const PanelKernels* panels_of(const KernelTable& table, int format) {
  return table.panels && table.panels[format].name ? &table.panels[format] : nullptr;
}

// By rows of x, without a gap.
inline std::array<LinearChoice, 2> linear_choices(const RowKernels& rows, const PanelKernels* panels) {
  const int64_t up_to = panels ? rows.up_to : kMaxTokens;
  const LinearChoice few = {1, up_to, LinearWay::kRows, rows.name,
                            "each weight is decoded once, in registers, and used for all rows of x at once"};
  if (panels) {
    return {few, LinearChoice{up_to + 1, INT64_MAX, LinearWay::kPanels, panels->name,
                              "panels of weights are decoded into the cache and used for hundreds of rows of x"}};
  }
  return {few, LinearChoice{up_to + 1, INT64_MAX, LinearWay::kDecoded, "decoded, then torch's product",
                            "this level has no matrix product of its own; torch's is faster than its row kernel"}};
}

inline LinearWay linear_way(const RowKernels& rows, const PanelKernels* panels, int64_t rows_of_x) {
  for (const LinearChoice& choice : linear_choices(rows, panels)) {
    if (rows_of_x <= choice.last) return choice.way;
  }
  return LinearWay::kDecoded;
}

}  // namespace isqtorch
