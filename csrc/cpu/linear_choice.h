// Which kernel of `linear` runs for how many rows of x. The operator follows this list, and cpu_info shows it.
#pragma once

#include <array>

#include "cpu/kernels.h"

namespace isqtorch {

enum class LinearWay : uint8_t { kRows, kTiles, kPanels, kDecoded };

struct LinearChoice {
  int64_t first, last;  // rows of x
  LinearWay way;
  const char* kernel;
  const char* why;
};

// The kernels of a format at a level; tiles and panels may be null.
struct LinearKernels {
  const RowKernels* rows;
  const TileKernels* tiles;
  const PanelKernels* panels;
};

inline LinearKernels linear_kernels(const KernelTable& table, int format) {
  return {&table.rows[format], table.tiles && table.tiles[format].name ? &table.tiles[format] : nullptr,
          table.panels && table.panels[format].name ? &table.panels[format] : nullptr};
}

// Ranges of rows of x, in order and without gaps.
struct LinearChoices {
  std::array<LinearChoice, 3> all;
  int count = 0;

  const LinearChoice* begin() const { return all.data(); }
  const LinearChoice* end() const { return all.data() + count; }
};

inline LinearChoices linear_choices(const LinearKernels& kernels) {
  const auto& [rows, tiles, panels] = kernels;
  LinearChoices choices;
  const auto add = [&](int64_t last, LinearWay way, const char* kernel, const char* why) {
    const int i = choices.count++;
    choices.all[i] = {i ? choices.all[i - 1].last + 1 : 1, last, way, kernel, why};
  };
  add(tiles    ? tiles->from - 1
      : panels ? rows->up_to
               : kMaxTokens,
      LinearWay::kRows, rows->name, "each weight is decoded once, in registers, and used for all rows of x at once");
  if (tiles) {
    add(tiles->up_to, LinearWay::kTiles, tiles->name,
        "codes of sixteen rows of weights are decoded into the first-level cache and used for all rows of x at once");
  }
  if (panels) {
    add(INT64_MAX, LinearWay::kPanels, panels->name,
        "panels of weights are decoded into the cache and used for hundreds of rows of x");
  } else {
    add(INT64_MAX, LinearWay::kDecoded, "decoded, then torch's product",
        "this level has no matrix product of its own; torch's is faster than its row kernel");
  }
  return choices;
}

inline LinearWay linear_way(const LinearKernels& kernels, int64_t rows_of_x) {
  for (const LinearChoice& choice : linear_choices(kernels)) {
    if (rows_of_x <= choice.last) return choice.way;
  }
  return LinearWay::kDecoded;
}

}  // namespace isqtorch
