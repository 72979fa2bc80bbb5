// The operators of one decoding step on CPU tensors. A token of a small model is hundreds of operators of a few
// microseconds each; these do the work of five or ten of them. Each gives the bits of the operators of torch that it
// stands for. Attention is in ops_step_attend.cpp.
#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cpu/ops_norm.h"
#include "cpu/ops_products.h"
#include "cpu/ops_steps.h"

namespace isqtorch {
namespace {

Tensor step_norm(const Tensor& x, const Tensor& weight, double eps, int64_t style, int64_t lanes) {
  const Dtype dtype = checked_dtype("step_norm", "x", x.scalar_type());
  check(x.dim() > 0, "step_norm: x must have a dimension.");
  const int64_t n = x.size(x.dim() - 1), rows = n ? x.numel() / n : 0;
  const Norm norm("step_norm", weight, n, dtype, eps, style, lanes);
  const Tensor source = dense(x);
  Tensor y = empty(shape_of(x), x.scalar_type());
  const uint8_t* from = static_cast<const uint8_t*>(source.const_data_ptr());
  uint8_t* to = static_cast<uint8_t*>(y.mutable_data_ptr());
  const FormatTable& convert = selected_table().formats;
  parallel_rows(rows, n, [&](int64_t begin, int64_t end) {
    const Scratch row(n * sizeof(float));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i * n * item_bytes(dtype);
      convert.load(from + at, dtype, n, row.floats());
      norm.apply(row.floats());
      convert.store(row.floats(), n, dtype, to + at);
    }
  });
  return y;
}

// Rows of a gate and what it gates, [rows, width] -> [rows, width / 2].
void gate_rows(const uint8_t* from, uint8_t* to, int64_t rows, int64_t width, Dtype dtype) {
  const KernelTable& kernels = selected_table();
  const int64_t half = width / 2, item = item_bytes(dtype);
  const Scratch both(width * sizeof(float));
  for (int64_t i = 0; i < rows; ++i) {
    kernels.formats.load(from + i * width * item, dtype, width, both.floats());
    kernels.steps->gate(both.floats(), both.floats() + half, half, dtype);
    kernels.formats.store(both.floats(), half, dtype, to + i * half * item);
  }
}

void check_halves(const char* op, int64_t width) {
  check(width % 2 == 0, op, ": a gate and what it gates must be as wide as each other, got ", width, " values.");
}

Tensor step_gate(const Tensor& x) {
  const Dtype dtype = checked_dtype("step_gate", "x", x.scalar_type());
  std::vector<int64_t> shape = shape_of(x);
  check(!shape.empty(), "step_gate: x must have a dimension.");
  const int64_t width = shape.back(), rows = width ? x.numel() / width : 0;
  check_halves("step_gate", width);
  shape.back() = width / 2;
  Tensor y = empty(shape, x.scalar_type());
  const Tensor source = dense(x);
  gate_rows(static_cast<const uint8_t*>(source.const_data_ptr()), static_cast<uint8_t*>(y.mutable_data_ptr()), rows,
            width, dtype);
  return y;
}

// ---- products -----------------------------------------------------------------------------------------------------

// Some products of the same rows of x, side by side in the rows of y, in one parallel region.
class Products {
 public:
  Products(const char* op, const std::vector<Tensor>& weights, const std::vector<Text>& formats,
           const std::vector<std::optional<Tensor>>& biases, Dtype dtype)
      : width(0) {
    check(!weights.empty() && weights.size() == formats.size() && weights.size() == biases.size(), op,
          ": weights, formats and biases must be lists of one length, and not empty; got ", weights.size(), ", ",
          formats.size(), " and ", biases.size(), ".");
    packed_.reserve(weights.size());
    biases_.reserve(weights.size());
    for (size_t i = 0; i < weights.size(); ++i) {
      packed_.emplace_back(op, weights[i], formats[i], true);
      const PackedMatrix& packed = packed_.back();
      check(packed.k == packed_[0].k, op, ": the weights must have the same in_features, got ", packed_[0].k, " and ",
            packed.k, ".");
      biases_.push_back(loaded_bias(op, packed, biases[i], {packed.rows}));
      products_.emplace_back(packed, dtype);
      products_.back().bias = biases[i] ? biases_.back().data() : nullptr;
      width += packed.rows;
    }
  }

  int64_t k() const { return packed_[0].k; }
  int64_t rows_of(size_t i) const { return packed_[i].rows; }

  // Whether row kernels multiply so many rows of x. Other kernels pack x in another way; `linear` knows it.
  bool in_rows(int64_t m) const {
    return m > 0 && std::all_of(products_.begin(), products_.end(),
                                [m](const Product& p) { return linear_way(p.linear, m) == LinearWay::kRows; });
  }

  // x f32 [m, k], values of dtype; y [m, width] of dtype.
  void run(const float* x, int64_t m, uint8_t* y) {
    std::vector<Scratch> packed_x;  // one for each way to pack x; formats of one family share it
    std::vector<const RowKernels*> ways;
    std::vector<const uint8_t*> inputs;
    int64_t tiles = 0, first = 0;
    for (Product& p : products_) {
      p.m = m;
      p.ldy = width;
      p.y = y + first * item_bytes(p.dtype);
      first += p.n;
      tiles += p.row_tiles();
      const RowKernels& kernels = *p.linear.rows;
      const auto same =
          std::find_if(ways.begin(), ways.end(), [&](const RowKernels* way) { return way->pack == kernels.pack; });
      if (same != ways.end()) {
        inputs.push_back(packed_x[same - ways.begin()].bytes());
        continue;
      }
      Scratch& packed = packed_x.emplace_back(slots_for(m) * kernels.packed_bytes(p.k));
      ways.push_back(&kernels);
      inputs.push_back(packed.bytes());
      pack_rows(kernels, p.k, m, packed.bytes(),
                [&](int64_t i, float* row) { std::memcpy(row, x + i * p.k, p.k * sizeof(float)); });
    }
    parallel_tiles(tiles, kRowsTile * k(), [&](int64_t begin, int64_t end) {
      int64_t before = 0;
      for (size_t i = 0; i < products_.size(); ++i) {
        const int64_t own = products_[i].row_tiles();
        for (int64_t t = std::max(begin, before); t < std::min(end, before + own); ++t) {
          multiply_row_tile(products_[i], inputs[i], t - before);
        }
        before += own;
      }
    });
  }

  int64_t width;

 private:
  std::vector<PackedMatrix> packed_;
  std::vector<std::vector<float>> biases_;
  std::vector<Product> products_;
};

Tensor any_linear(const Tensor& x, const Tensor& weight, const Text& format, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  StableIValue stack[] = {from(x), from(weight), from(static_cast<const std::string&>(format)), from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("isqtorch::linear_frozen", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

std::vector<int64_t> checked_shape(const char* op, const Tensor& x, int64_t k, int64_t width) {
  std::vector<int64_t> shape = shape_of(x);
  if (shape.empty() || shape.back() != k) {
    check(false, op, ": the last dimension of x must be ", k, ", the in_features of the weights, got shape ",
          shape_text(shape), ".");
  }
  shape.back() = width;
  return shape;
}

}  // namespace

Tensor step_linears(const Tensor& x, std::vector<Tensor> weights, std::vector<Text> formats,
                    std::vector<std::optional<Tensor>> biases, std::optional<Tensor> norm_weight, double eps,
                    int64_t style, int64_t lanes, bool gate) {
  const char* const op = "step_linears";
  const Dtype dtype = checked_dtype(op, "x", x.scalar_type());
  Products products(op, weights, formats, biases, dtype);
  const int64_t k = products.k(), width = products.width, m = x.numel() / k, item = item_bytes(dtype);
  if (gate) check_halves(op, width);
  const std::vector<int64_t> shape = checked_shape(op, x, k, gate ? width / 2 : width);
  const std::optional<Norm> norm = norm_of(op, norm_weight, k, dtype, eps, style, lanes);
  Tensor y = empty(shape, x.scalar_type());
  if (y.numel() == 0) return y;
  const KernelTable& kernels = selected_table();
  const Tensor source = dense(x);
  const Scratch rows(m * k * sizeof(float));
  kernels.formats.load(source.const_data_ptr(), dtype, m * k, rows.floats());
  if (norm) {
    for (int64_t i = 0; i < m; ++i) norm->apply(rows.floats() + i * k);
  }
  const Scratch wide(gate ? m * width * item : 0);
  uint8_t* out = static_cast<uint8_t*>(y.mutable_data_ptr());
  uint8_t* to = gate ? wide.bytes() : out;
  if (products.in_rows(m)) {
    products.run(rows.floats(), m, to);
  } else {
    Tensor normed = empty({m, k}, x.scalar_type());
    kernels.formats.store(rows.floats(), m * k, dtype, normed.mutable_data_ptr());
    int64_t first = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
      const Tensor part = dense(any_linear(normed, weights[i], formats[i], biases[i]));
      const uint8_t* from = static_cast<const uint8_t*>(part.const_data_ptr());
      const int64_t n = products.rows_of(i);
      for (int64_t j = 0; j < m; ++j) std::memcpy(to + (j * width + first) * item, from + j * n * item, n * item);
      first += n;
    }
  }
  if (!gate) return y;
  gate_rows(to, out, m, width, dtype);
  return y;
}

Tensor step_linear_add(const Tensor& x, const Tensor& weight, Text format, std::optional<Tensor> bias,
                       const Tensor& residual, std::optional<Tensor> norm_weight, double eps, int64_t style,
                       int64_t lanes) {
  const char* const op = "step_linear_add";
  const Dtype dtype = checked_dtype(op, "x", x.scalar_type());
  Products products(op, {weight}, {format}, {bias}, dtype);
  const int64_t k = products.k(), n = products.width, m = x.numel() / k;
  const std::vector<int64_t> shape = checked_shape(op, x, k, n);
  if (shape_of(residual) != shape || residual.scalar_type() != x.scalar_type()) {
    check(false, op, ": the residual must be ", name_of(x.scalar_type()), " ", shape_text(shape), ", got ",
          name_of(residual.scalar_type()), " ", shape_text(shape_of(residual)), ".");
  }
  const std::optional<Norm> norm = norm_of(op, norm_weight, n, dtype, eps, style, lanes);
  const KernelTable& kernels = selected_table();
  const Tensor source = dense(x), added = dense(residual);
  Tensor y;
  if (products.in_rows(m)) {
    y = empty(shape, x.scalar_type());
    const Scratch rows(m * k * sizeof(float));
    kernels.formats.load(source.const_data_ptr(), dtype, m * k, rows.floats());
    products.run(rows.floats(), m, static_cast<uint8_t*>(y.mutable_data_ptr()));
  } else {
    y = dense(any_linear(source, weight, format, bias));
  }
  const Scratch row(n * sizeof(float)), other(n * sizeof(float));
  for (int64_t i = 0; i < m; ++i) {
    uint8_t* at = static_cast<uint8_t*>(y.mutable_data_ptr()) + i * n * item_bytes(dtype);
    kernels.formats.load(at, dtype, n, row.floats());
    if (norm) norm->apply(row.floats());
    kernels.formats.load(static_cast<const uint8_t*>(added.const_data_ptr()) + i * n * item_bytes(dtype), dtype, n,
                         other.floats());
    float* sum = row.floats();
    for (int64_t j = 0; j < n; ++j) sum[j] += other.floats()[j];
    kernels.formats.store(sum, n, dtype, at);
  }
  return y;
}

}  // namespace isqtorch

STABLE_TORCH_LIBRARY_IMPL(isqtorch, CPU, m) {
  m.impl("step_norm", TORCH_BOX(&isqtorch::step_norm));
  m.impl("step_gate", TORCH_BOX(&isqtorch::step_gate));
  m.impl("step_linears", TORCH_BOX(&isqtorch::step_linears));
  m.impl("step_linear_add", TORCH_BOX(&isqtorch::step_linear_add));
}
