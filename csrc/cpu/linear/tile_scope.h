// The configuration of the tile registers, which belongs to a thread and lasts for one product.
#pragma once

#include "cpu/linear/simd.h"

namespace isqtorch::ISQ_ISA {

struct TileShape {
  uint8_t rows;
  uint16_t row_bytes;
};

class TileScope {
 public:
  explicit TileScope(const TileShape (&shapes)[8]) {
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    static_assert(sizeof config == 64);
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = shapes[i].row_bytes;
      config.rows[i] = shapes[i].rows;
    }
    // GCC 12 does not know that the instruction reads the whole struct, so this tells it that memory is read.
    ISQ_IN_MEMORY(&config);
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

}  // namespace isqtorch::ISQ_ISA
