// The operator `linear` on CPU tensors: checks, memory, threads, and which kernel multiplies.
#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cpu/ops_products.h"

namespace isqtorch {
namespace {

// Weights decoded for one call of torch's matrix product: they fit into the second-level caches.
constexpr int64_t kPanelWeights = 1 << 21;

// For few rows of x, which are packed once.
void linear_rows(const Product& p) {
  const RowKernels& kernels = *p.linear.rows;
  const Scratch packed_x(slots_for(p.m) * kernels.packed_bytes(p.k));
  pack_rows(kernels, p.k, p.m, packed_x.bytes(), [&](int64_t i, float* x) { p.load(i, 1, x); });
  parallel_tiles(p.row_tiles(), kRowsTile * p.k, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) multiply_row_tile(p, packed_x.bytes(), tile);
  });
}

// For some rows of x.
void linear_tiles(const Product& p) {
  const TileKernels& kernels = *p.linear.tiles;
  const bool many = p.m > kPairedTokens;
  const int64_t groups = (p.m + kTileTokens - 1) / kTileTokens, group_bytes = kernels.packed_bytes(p.k);
  const Scratch packed_x(groups * group_bytes);
  parallel_tiles(groups, kTileTokens * p.k, [&](int64_t begin, int64_t end) {
    const Scratch x(kTileTokens * p.k * sizeof(float));
    for (int64_t g = begin; g < end; ++g) {
      const int64_t first = g * kTileTokens, count = std::min<int64_t>(kTileTokens, p.m - first);
      pack_tile_group(p, many, first, count, x, packed_x.bytes() + g * group_bytes);
    }
  });
  parallel_tiles(p.row_tiles(), kRowsTile * p.k, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) multiply_tile(p, tile, 0, p.m, packed_x.bytes());
  });
}

// For many rows of x, of which the caches hold a portion at a time.
void linear_panels(const Product& p) {
  const PanelKernels& kernels = *p.linear.panels;
  const int64_t group = kernels.token_block, group_bytes = kernels.packed_bytes(p.k);
  const int64_t portion = std::min(round_up(kPortion, group), p.m), rows = rows_of_panel(p, 1);
  const Scratch packed_x(round_up(portion, group) / group * group_bytes);
  for (int64_t first = 0; first < p.m; first += portion) {
    const int64_t count = std::min(portion, p.m - first);
    parallel_tiles((count + group - 1) / group, group * p.k, [&](int64_t begin, int64_t end) {
      const Scratch x(group * p.k * sizeof(float));
      for (int64_t g = begin; g < end; ++g) {
        pack_token_group(p, first + g * group, std::min(group, count - g * group), x,
                         packed_x.bytes() + g * group_bytes);
      }
    });
    parallel_tiles((p.n + rows - 1) / rows, rows * p.k * count / kMaxTokens, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        multiply_panel(p, tile * rows, rows, first, count, packed_x.bytes());
      }
    });
  }
}

// For levels that have no panel kernels for a format: decodes a panel of weight rows, multiplies it by torch's matrix
// product, and goes on to the next panel. f16 is computed as f32, because few processors multiply f16 matrices fast.
void linear_decoded(const Product& p, const PackedMatrix& packed, const Tensor& dense_x) {
  const Dtype dtype = p.dtype == Dtype::kF16 ? Dtype::kF32 : p.dtype;
  const ScalarType scalar = dtype == Dtype::kF32 ? ScalarType::Float : ScalarType::BFloat16;
  const Tensor x = p.dtype == Dtype::kF16 ? torch::stable::to(dense_x, scalar) : dense_x;
  const int64_t panel_rows = std::min(p.n, std::max<int64_t>(64, kPanelWeights / p.k));
  Tensor panel = empty({panel_rows, p.k}, scalar);
  uint8_t* panel_bytes = static_cast<uint8_t*>(panel.mutable_data_ptr());
  for (int64_t first = 0; first < p.n; first += panel_rows) {
    const int64_t rows = std::min(panel_rows, p.n - first);
    parallel_rows(rows, p.k, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        packed.decode_row(first + i, dtype, panel_bytes + i * p.k * item_bytes(dtype));
    });
    Tensor cut = torch::stable::narrow(panel, 0, 0, rows);
    const Tensor y = dense(torch::stable::matmul(x, torch::stable::transpose(cut, 0, 1)));  // [m, rows]
    const uint8_t* from = static_cast<const uint8_t*>(y.const_data_ptr());
    parallel_rows(p.m, rows, [&](int64_t begin, int64_t end) {
      alignas(64) float values[kChunk];
      for (int64_t m = begin; m < end; ++m) {
        for (int64_t i = 0; i < rows; i += kChunk) {
          const int64_t count = std::min(kChunk, rows - i);
          packed.kernels->formats.load(from + (m * rows + i) * item_bytes(dtype), dtype, count, values);
          p.store(m, first + i, count, values);
        }
      }
    });
  }
}

Tensor linear(const Tensor& x, const Tensor& weight, Text format_name, std::optional<Tensor> bias) {
  const PackedMatrix packed("linear", weight, format_name, true);
  Product p(packed, checked_dtype("linear", "x", x.scalar_type()));
  const std::vector<int64_t> shape = checked_linear(x, packed, format_name);
  const std::vector<float> bias_values = loaded_bias("linear", packed, bias, {p.n});
  p.bias = bias ? bias_values.data() : nullptr;
  p.m = x.numel() / p.k;
  Tensor y = empty(shape, x.scalar_type());
  if (p.m == 0 || p.n == 0) return y;
  const Tensor dense_x = torch::stable::view(dense(x), {p.m, p.k});
  p.x = static_cast<const uint8_t*>(dense_x.const_data_ptr());
  p.y = static_cast<uint8_t*>(y.mutable_data_ptr());
  switch (linear_way(packed.linear, p.m)) {
    case LinearWay::kRows:
      linear_rows(p);
      break;
    case LinearWay::kTiles:
      linear_tiles(p);
      break;
    case LinearWay::kPanels:
      linear_panels(p);
      break;
    case LinearWay::kDecoded:
      linear_decoded(p, packed, dense_x);
      break;
  }
  return y;
}

}  // namespace
}  // namespace isqtorch

STABLE_TORCH_LIBRARY_IMPL(isqtorch, CPU, m) {
  m.impl("linear", TORCH_BOX(&isqtorch::linear));
  m.impl("linear_frozen", TORCH_BOX(&isqtorch::linear));
}
