// The parts of `linear` and `experts_linear`: gathered rows of x times one matrix, scattered into rows of y. The
// functions compute one tile of the result. Their callers own the threads and the packed activations and decide the
// order of tiles.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/ops_tensors.h"

namespace isqtorch {

constexpr int64_t kRowsTile = 32;  // outputs that a row or tile kernel computes, converts and stores at a time
constexpr int64_t kPortion = 512;  // rows of x for each use of a panel, as many as the caches hold
// Columns decoded at a time, so that panel, x and sums fit into the second-level cache.
constexpr int64_t kStretch = 1024;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// y[y_rows[i]] = w x[x_rows[i]] + bias, for i < m.
struct Product {
  const KernelTable* kernels;
  LinearKernels linear;
  const uint8_t* w;  // packed [n, k]
  int64_t row_bytes, n, k, m;
  int64_t ldy = 0;                                     // values from a row of y to the next; 0: n
  bool w_ends = true;                                  // memory may end with w
  const float* bias;                                   // [n], or null
  Dtype dtype;                                         // of x and y
  const uint8_t* x;                                    // contiguous [.., k]
  uint8_t* y;                                          // [.., n]
  const int64_t *x_rows = nullptr, *y_rows = nullptr;  // null: i itself

  // Leaves x, y and m for the caller.
  Product(const PackedMatrix& packed, Dtype dtype)
      : kernels(packed.kernels),
        linear(packed.linear),
        w(packed.bytes),
        row_bytes(packed.row_bytes),
        n(packed.rows),
        k(packed.k),
        m(0),
        bias(nullptr),
        dtype(dtype),
        x(nullptr),
        y(nullptr) {}

  // Rows [i, i + count) of x as f32.
  void load(int64_t i, int64_t count, float* to) const {
    const int64_t bytes = k * item_bytes(dtype);
    if (!x_rows) return kernels->formats.load(x + i * bytes, dtype, count * k, to);
    for (int64_t j = 0; j < count; ++j) kernels->formats.load(x + x_rows[i + j] * bytes, dtype, k, to + j * k);
  }

  // Writes values [begin, begin + count) of row i of y, adding the bias.
  void store(int64_t i, int64_t begin, int64_t count, float* values) const {
    if (bias) {
      for (int64_t j = 0; j < count; ++j) values[j] += bias[begin + j];
    }
    kernels->formats.store(values, count, dtype,
                           y + ((y_rows ? y_rows[i] : i) * (ldy ? ldy : n) + begin) * item_bytes(dtype));
  }

  int64_t row_tiles() const { return (n + kRowsTile - 1) / kRowsTile; }
};

// The row kernel for so many rows of x. Rows of zeros fill up to its own number.
inline int step_for(int64_t rows) {
  int step = 0;
  while (kRowSlots[step] < rows) ++step;
  return step;
}
inline int64_t slots_for(int64_t rows) { return kRowSlots[step_for(rows)]; }

// Packs rows of x for the row kernels. `together` has room for slots_for(rows) packed rows; load(i, floats) provides
// row i. Slots without a row are filled with zeros.
template <class Load>
void pack_rows(const RowKernels& kernels, int64_t k, int64_t rows, uint8_t* together, const Load& load) {
  const int64_t slots = slots_for(rows), bytes = kernels.packed_bytes(k);
  const Scratch x(k * sizeof(float)), packed(slots > 1 ? bytes : 0);
  if (rows < slots) std::memset(together, 0, slots * bytes);
  for (int64_t i = 0; i < rows; ++i) {
    load(i, x.floats());
    kernels.pack(x.floats(), k, slots > 1 ? packed.bytes() : together);
    if (slots > 1) kernels.place(packed.bytes(), k, static_cast<int>(slots), static_cast<int>(i), together);
  }
}

// Multiplies up to eight rows of x, packed in the order of the format's code vectors. Each weight is decoded once, in
// registers, and used for all of them. `packed_x` holds slots_for(p.m) rows.
inline void multiply_row_tile(const Product& p, const uint8_t* packed_x, int64_t tile) {
  alignas(64) float y[kMaxTokens * kRowsTile];
  const int64_t first = tile * kRowsTile, count = std::min(kRowsTile, p.n - first);
  RowsJob job;
  job.w = p.w + first * p.row_bytes;
  job.row_bytes = p.row_bytes;
  job.rows = count;
  job.k = p.k;
  job.w_ends = p.w_ends && first + count == p.n;
  job.x = packed_x;
  job.y = y;
  job.ldy = kRowsTile;
  job.layout = p.linear.rows->layout;
  p.linear.rows->multiply[step_for(p.m)](job);
  for (int64_t i = 0; i < p.m; ++i) p.store(i, first, count, y + i * kRowsTile);
}

// Packs one group of kTileTokens rows of x, from row `first` on, for the tile kernels. `many`: more than kPairedTokens
// rows are multiplied together, which changes the order.
inline void pack_tile_group(const Product& p, bool many, int64_t first, int64_t rows, const Scratch& floats,
                            uint8_t* out) {
  p.load(first, rows, floats.floats());
  p.linear.tiles->pack[many](floats.floats(), static_cast<int>(rows), p.k, out);
}

// Multiplies `tokens` rows of x from row `first_token` on. A unit of sixteen weight rows is decoded at a time.
inline void multiply_tile(const Product& p, int64_t tile, int64_t first_token, int64_t tokens,
                          const uint8_t* packed_x) {
  alignas(64) float y[kMaxTileTokens * kRowsTile];
  const TileKernels& kernels = *p.linear.tiles;
  const int64_t first = tile * kRowsTile, count = std::min(kRowsTile, p.n - first);
  kernels.multiply[tokens > kPairedTokens]({p.w + first * p.row_bytes, p.row_bytes, count, p.k,
                                            p.w_ends && first + count == p.n, packed_x, tokens, y, kRowsTile,
                                            kernels.layout});
  for (int64_t i = 0; i < tokens; ++i) p.store(first_token + i, first, count, y + i * kRowsTile);
}

// Packs one group of token_block rows of x, from row `first` on, for the panel kernels.
inline void pack_token_group(const Product& p, int64_t first, int64_t rows, const Scratch& floats, uint8_t* out) {
  p.load(first, rows, floats.floats());
  p.linear.panels->pack(floats.floats(), static_cast<int>(rows), p.k, out);
}

// Rows of w in a panel: such that every thread gets about two panels, if there are `matrices` matrices of this size.
inline int64_t rows_of_panel(const Product& p, int64_t matrices) {
  const PanelKernels& kernels = *p.linear.panels;
  const int64_t fair = p.n * matrices / (2 * torch::stable::get_num_threads());
  return std::clamp<int64_t>(round_up(fair, kernels.row_block), kernels.row_block,
                             std::min<int64_t>(kernels.panel_rows, round_up(p.n, kernels.row_block)));
}

// Computes outputs [first, first + rows) for the `tokens` rows of x from row `first_token` on, which are packed.
// Weights are decoded and multiplied a stretch of k at a time.
inline void multiply_panel(const Product& p, int64_t first, int64_t rows, int64_t first_token, int64_t tokens,
                           const uint8_t* packed_x) {
  thread_local Scratch panel, sums, y;
  const PanelKernels& kernels = *p.linear.panels;
  const int64_t count = std::min(rows, p.n - first), padded = round_up(count, kernels.row_block);
  const int64_t floats = padded * round_up(tokens, kernels.token_block);
  panel.grow(kernels.panel_bytes(padded, std::min(kStretch, round_up(p.k, kPanelStep))));
  sums.grow(floats * sizeof(float));
  y.grow(floats * sizeof(float));
  const uint8_t* w = p.w + first * p.row_bytes;
  const bool w_ends = p.w_ends && first + count == p.n;
  for (int64_t k = 0; k < p.k; k += kStretch) {
    const int64_t k_end = std::min(k + kStretch, p.k);
    kernels.decode({w, p.row_bytes, count, p.k, w_ends, k, k_end, panel.bytes(), kernels.layout});
    kernels.multiply({panel.bytes(), padded, p.k, k, k_end, packed_x, tokens, sums.floats(), k == 0});
  }
  kernels.unpack(sums.floats(), padded, tokens, y.floats(), padded);
  for (int64_t t = 0; t < tokens; ++t) p.store(first_token + t, first, count, y.floats() + t * padded);
}

// A float bias [n] or [matrices, n] as f32; empty if there is none.
inline std::vector<float> loaded_bias(const char* op, const PackedMatrix& packed, const std::optional<Tensor>& bias,
                                      const std::vector<int64_t>& wanted) {
  std::vector<float> values;
  if (!bias) return values;
  check_bias(op, *bias, wanted);
  const Dtype dtype = *float_dtype(bias->scalar_type());
  values.resize(bias->numel());
  packed.kernels->formats.load(dense(*bias).const_data_ptr(), dtype, bias->numel(), values.data());
  return values;
}

}  // namespace isqtorch
