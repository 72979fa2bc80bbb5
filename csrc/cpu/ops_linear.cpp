// The operator `linear` on CPU tensors: checks, memory, threads, and which kernel multiplies.
#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cpu/ops_tensors.h"

namespace isqtorch {
namespace {

constexpr int64_t kPanelWeights =
    1 << 21;  // decoded for one of torch's matrix products: the second-level caches hold it

struct LinearArguments {
  Tensor x;  // contiguous [m, k]
  Dtype dtype;
  int64_t m, n, k;
  std::vector<float> bias;  // [n], or empty
  uint8_t* y;               // [m, n] of dtype

  const uint8_t* row_of_x(int64_t row) const {
    return static_cast<const uint8_t*>(x.const_data_ptr()) + row * k * item_bytes(dtype);
  }
};

// Writes values [begin, begin + count) of row m, adding the bias.
void store_outputs(const LinearArguments& a, const KernelTable& kernels, int64_t m, int64_t begin, int64_t count,
                   float* values) {
  if (!a.bias.empty()) {
    for (int64_t i = 0; i < count; ++i) values[i] += a.bias[begin + i];
  }
  kernels.formats.store(values, count, a.dtype, a.y + (m * a.n + begin) * item_bytes(a.dtype));
}

// Few rows of x: they are packed once, in the order of the format's code vectors, and every weight is decoded once, in
// registers, and used for all of them.
void linear_rows(const LinearArguments& a, const PackedMatrix& packed) {
  constexpr int64_t kTile = 32;  // outputs computed, converted and stored at a time
  const RowKernels& kernels = *packed.linear.rows;
  const int step = a.m > 4 ? 3 : a.m > 2 ? 2 : a.m > 1 ? 1 : 0;  // kernels exist for 2^step rows; rows of zeros fill up
  const int64_t tokens = 1 << step, row_bytes = kernels.packed_bytes(a.k);
  const Scratch packed_x(tokens * row_bytes), x(a.k * sizeof(float));
  for (int64_t m = 0; m < a.m; ++m) {
    packed.kernels->formats.load(a.row_of_x(m), a.dtype, a.k, x.floats());
    kernels.pack(x.floats(), a.k, packed_x.bytes() + m * row_bytes);
  }
  std::memset(packed_x.bytes() + a.m * row_bytes, 0, (tokens - a.m) * row_bytes);
  const int64_t tiles = (a.n + kTile - 1) / kTile;
  parallel_tiles(tiles, kTile * a.k, [&](int64_t tile_begin, int64_t tile_end) {
    alignas(64) float y[kMaxTokens * kTile];
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      const int64_t first = tile * kTile, count = std::min(kTile, a.n - first);
      RowsJob job;
      job.w = packed.bytes + first * packed.row_bytes;
      job.row_bytes = packed.row_bytes;
      job.rows = count;
      job.k = a.k;
      job.w_ends = first + count == a.n;
      job.x = packed_x.bytes();
      job.y = y;
      job.ldy = kTile;
      job.layout = kernels.layout;
      kernels.multiply[step](job);
      for (int64_t m = 0; m < a.m; ++m) store_outputs(a, *packed.kernels, m, first, count, y + m * kTile);
    }
  });
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

using PackTokens = void (*)(const float* x, int tokens, int64_t k, void* packed);

// Packs `count` rows of x from row `first` on, in groups of `group` rows.
void pack_tokens(const LinearArguments& a, const PackedMatrix& packed, PackTokens pack, int64_t group,
                 int64_t group_bytes, int64_t first, int64_t count, uint8_t* out) {
  parallel_tiles((count + group - 1) / group, group * a.k, [&](int64_t begin, int64_t end) {
    const Scratch x(group * a.k * sizeof(float));
    for (int64_t g = begin; g < end; ++g) {
      const int64_t rows = std::min(group, count - g * group);
      packed.kernels->formats.load(a.row_of_x(first + g * group), a.dtype, rows * a.k, x.floats());
      pack(x.floats(), static_cast<int>(rows), a.k, out + g * group_bytes);
    }
  });
}

// A handful of rows of x: sixteen weight rows at a time are decoded, a unit of each, and multiplied.
void linear_tiles(const LinearArguments& a, const PackedMatrix& packed) {
  constexpr int64_t kRows = 2 * kTileTokens;  // outputs computed, converted and stored at a time
  const TileKernels& kernels = *packed.linear.tiles;
  const int many = a.m > kPairedTokens;
  const int64_t groups = (a.m + kTileTokens - 1) / kTileTokens, group_bytes = kernels.packed_bytes(a.k);
  const Scratch x(groups * group_bytes);
  pack_tokens(a, packed, kernels.pack[many], kTileTokens, group_bytes, 0, a.m, x.bytes());
  parallel_tiles((a.n + kRows - 1) / kRows, kRows * a.k, [&](int64_t begin, int64_t end) {
    alignas(64) float y[kMaxTileTokens * kRows];
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kRows, count = std::min(kRows, a.n - first);
      kernels.multiply[many]({packed.bytes + first * packed.row_bytes, packed.row_bytes, count, a.k,
                              first + count == a.n, x.bytes(), a.m, y, kRows, kernels.layout});
      for (int64_t m = 0; m < a.m; ++m) store_outputs(a, *packed.kernels, m, first, count, y + m * kRows);
    }
  });
}

// y of some rows of x, which are packed: panel by panel weights are decoded, a stretch of k at a time so that panel, x
// and sums stay in the second-level cache, and multiplied.
void multiply_panels(const LinearArguments& a, const PackedMatrix& packed, int64_t first_token, int64_t tokens,
                     const uint8_t* x) {
  constexpr int64_t kStretch = 1024;
  const PanelKernels& kernels = *packed.linear.panels;
  const int64_t fair = a.n / (2 * torch::stable::get_num_threads());  // rows, if every thread gets two panels
  const int64_t rows = std::clamp<int64_t>(round_up(fair, kernels.row_block), kernels.row_block, kernels.panel_rows);
  const int64_t floats = rows * round_up(tokens, kernels.token_block);
  parallel_tiles((a.n + rows - 1) / rows, rows * a.k * tokens / kMaxTokens, [&](int64_t begin, int64_t end) {
    thread_local Scratch panel, sums, y;
    panel.grow(kernels.panel_bytes(rows, std::min(kStretch, round_up(a.k, kPanelStep))));
    sums.grow(floats * sizeof(float));
    y.grow(floats * sizeof(float));
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * rows, count = std::min(rows, a.n - first);
      const int64_t padded = round_up(count, kernels.row_block);
      const uint8_t* w = packed.bytes + first * packed.row_bytes;
      for (int64_t k = 0; k < a.k; k += kStretch) {
        const int64_t k_end = std::min(k + kStretch, a.k);
        kernels.decode(
            {w, packed.row_bytes, count, a.k, first + count == a.n, k, k_end, panel.bytes(), kernels.layout});
        kernels.multiply({panel.bytes(), padded, a.k, k, k_end, x, tokens, sums.floats(), k == 0});
      }
      kernels.unpack(sums.floats(), padded, tokens, y.floats(), padded);
      for (int64_t t = 0; t < tokens; ++t) {
        store_outputs(a, *packed.kernels, first_token + t, first, count, y.floats() + t * padded);
      }
    }
  });
}

// Many rows of x, as many at a time as the caches hold.
void linear_panels(const LinearArguments& a, const PackedMatrix& packed) {
  const PanelKernels& kernels = *packed.linear.panels;
  const int64_t portion = std::min(round_up(512, kernels.token_block), a.m);
  const Scratch x(round_up(portion, kernels.token_block) / kernels.token_block * kernels.packed_bytes(a.k));
  for (int64_t first = 0; first < a.m; first += portion) {
    const int64_t count = std::min(portion, a.m - first);
    pack_tokens(a, packed, kernels.pack, kernels.token_block, kernels.packed_bytes(a.k), first, count, x.bytes());
    multiply_panels(a, packed, first, count, x.bytes());
  }
}

// Where a level has no product of its own for a format: decode a panel of weight rows, multiply with torch's own matrix
// product, next panel. f16 goes through f32, because few processors multiply f16 matrices at speed.
void linear_decoded(const LinearArguments& a, const PackedMatrix& packed) {
  const Dtype dtype = a.dtype == Dtype::kF16 ? Dtype::kF32 : a.dtype;
  const ScalarType scalar = dtype == Dtype::kF32 ? ScalarType::Float : ScalarType::BFloat16;
  const Tensor x = a.dtype == Dtype::kF16 ? torch::stable::to(a.x, scalar) : a.x;
  const int64_t panel_rows = std::min(a.n, std::max<int64_t>(64, kPanelWeights / a.k));
  Tensor panel = empty({panel_rows, a.k}, scalar);
  uint8_t* panel_bytes = static_cast<uint8_t*>(panel.mutable_data_ptr());
  for (int64_t first = 0; first < a.n; first += panel_rows) {
    const int64_t rows = std::min(panel_rows, a.n - first);
    parallel_rows(rows, a.k, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        packed.decode_row(first + i, dtype, panel_bytes + i * a.k * item_bytes(dtype));
    });
    Tensor cut = torch::stable::narrow(panel, 0, 0, rows);
    const Tensor y = dense(torch::stable::matmul(x, torch::stable::transpose(cut, 0, 1)));  // [m, rows]
    const uint8_t* from = static_cast<const uint8_t*>(y.const_data_ptr());
    parallel_rows(a.m, rows, [&](int64_t begin, int64_t end) {
      alignas(64) float values[kChunk];
      for (int64_t m = begin; m < end; ++m) {
        for (int64_t i = 0; i < rows; i += kChunk) {
          const int64_t count = std::min(kChunk, rows - i);
          packed.kernels->formats.load(from + (m * rows + i) * item_bytes(dtype), dtype, count, values);
          store_outputs(a, *packed.kernels, m, first + i, count, values);
        }
      }
    });
  }
}

Tensor linear(const Tensor& x, const Tensor& weight, std::string format_name, std::optional<Tensor> bias) {
  const PackedMatrix packed("linear", weight, format_name, true);
  LinearArguments a;
  a.dtype = checked_dtype("linear", "x", x.scalar_type());
  a.n = packed.rows;
  a.k = packed.k;
  std::vector<int64_t> shape = shape_of(x);
  check(!shape.empty() && shape.back() == a.k, "linear: the last dimension of x must be ", a.k,
        ", the in_features of this ", format_name, " weight, got shape ", shape_text(shape), ".");
  if (bias) {
    check(bias->dim() == 1 && bias->size(0) == a.n, "linear: bias must have shape [", a.n, "], got ",
          shape_text(shape_of(*bias)), ".");
    const Dtype bias_dtype = checked_dtype("linear", "bias", bias->scalar_type());
    a.bias.resize(a.n);
    packed.kernels->formats.load(dense(*bias).const_data_ptr(), bias_dtype, a.n, a.bias.data());
  }
  a.m = x.numel() / a.k;
  shape.back() = a.n;
  Tensor y = empty(shape, x.scalar_type());
  if (a.m == 0 || a.n == 0) return y;
  a.x = torch::stable::view(dense(x), {a.m, a.k});
  a.y = static_cast<uint8_t*>(y.mutable_data_ptr());
  switch (linear_way(packed.linear, a.m)) {
    case LinearWay::kRows:
      linear_rows(a, packed);
      break;
    case LinearWay::kTiles:
      linear_tiles(a, packed);
      break;
    case LinearWay::kPanels:
      linear_panels(a, packed);
      break;
    case LinearWay::kDecoded:
      linear_decoded(a, packed);
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
