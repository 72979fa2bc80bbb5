// linear_w8a8: `linear` for fp8 weights that may round x to FP8 as well, as torch's allow_tf32 lets a product round to
// TF32. Where that is faster, torch's _scaled_mm multiplies, by cuBLAS. It takes one scale per run of 128 columns,
// which is what the blocks of fp8 are, on GPUs of compute capability 9.0 and from CUDA 12.9 on. Everywhere else this is
// `linear`.
#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cuda/fp8_parts.h"
#include "cuda/ops_device.h"
#include "ops_checks.h"

namespace isqtorch::cuda {
namespace {

constexpr const char* kFormat = "fp8";
constexpr uintptr_t kAlignment = 16;  // of what the kernels read and write in words of 16 bytes
constexpr int64_t kMultiple = 16;     // rows of both matrices, for cuBLAS: scales of neighbouring rows are adjacent
constexpr int64_t kSliceBytes = 32 << 20;     // of codes for one product; fits into the second-level cache
constexpr int64_t kTile = 128, kTiles = 132;  // a slice has at least a tile per multiprocessor

// Set by Python, which knows the CUDA version that torch was compiled for.
std::atomic<bool> products_allowed{false};

void allow_fp8_products(bool allowed) { products_allowed = allowed; }

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

bool pays(const FormatKernels& fp8, int64_t m, int64_t n, int64_t k, int32_t device) {
  // With a single run, torch would treat the scales as those of whole rows.
  return m > fp8.w8a8_rows && n > 0 && n % kMultiple == 0 && k > Fp8Parts::kRun && products_allowed &&
         compute_capability(device) / 10 == 9;
}

Tensor part_of(Tensor t, int dim, int64_t first, int64_t count) { return torch::stable::narrow(t, dim, first, count); }

// Memory for codes and scales of so many rows.
struct Parts {
  Tensor codes, scales;
  int64_t k;

  Parts(const Place& place, int64_t rows, int64_t k)
      : codes(place.empty({rows, k}, ScalarType::Float8_e4m3fn)),
        scales(place.empty({rows * (k / Fp8Parts::kRun)}, ScalarType::Float)),
        k(k) {}

  Fp8Parts for_rows(int64_t rows) const {
    return {static_cast<uint8_t*>(codes.mutable_data_ptr()), static_cast<float*>(scales.mutable_data_ptr()), rows, k};
  }
  // [rows, k]
  Tensor codes_of(int64_t rows) const { return part_of(codes, 0, 0, rows); }
  // [k / 128, rows]
  Tensor scales_of(int64_t rows) const {
    const int64_t runs = k / Fp8Parts::kRun;
    return torch::stable::view(part_of(scales, 0, 0, runs * rows), {runs, rows});
  }
};

// out = x w^T by torch. The bias is added later, because cuBLAS does not add it to f32.
void multiply(const Parts& x, int64_t m, const Parts& w, int64_t n, const Tensor& out) {
  using torch::stable::detail::from;
  const std::optional<Tensor> none;
  StableIValue stack[] = {from(x.codes_of(m)),
                          from(torch::stable::transpose(w.codes_of(n), 0, 1)),
                          from(torch::stable::transpose(x.scales_of(m), 0, 1)),
                          from(w.scales_of(n)),
                          from(none),  // bias
                          from(none),  // scale of the result
                          from(std::optional<ScalarType>(out.scalar_type())),
                          from(false),  // fast accumulation, less precise
                          from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_scaled_mm", "out", stack, TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // owns the result, which is `out` again
}

#define ISQTORCH_SPELLED(name) #name
#define ISQTORCH_OPERATOR(library, name) ISQTORCH_SPELLED(library) "::" name

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  StableIValue stack[] = {from(x), from(weight), from(std::string(kFormat)), from(bias)};
  const char* const name = ISQTORCH_OPERATOR(ISQTORCH_OPERATORS, "linear_frozen");
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor linear_w8a8(const Tensor& x, const Tensor& weight, Text format, std::optional<Tensor> bias) {
  if (format != kFormat) {
    check(false, "linear_w8a8: activations are rounded to FP8 for weights in fp8 alone, got \"", shortened(format),
          "\". Use linear.");
  }
  const FormatKernels& fp8 = *find_format(kFormat);
  const PackedShape packed("linear", weight, kFormat, fp8.shape.block, fp8.shape.block_bytes, true);
  const Dtype dtype = checked_dtype("linear", "x", x.scalar_type());
  const std::vector<int64_t> shape = checked_linear(x, packed, kFormat);
  check_device("linear", "x is", x, weight);
  const int64_t n = packed.rows, k = packed.k, m = x.numel() / k;
  if (bias) {
    check_bias("linear", *bias, {n});
    check_device("linear", "bias is", *bias, weight);
  }
  if (!pays(fp8, m, n, k, weight.get_device_index())) return linear(x, weight, bias);

  const Place place(weight);
  std::optional<Tensor> b;
  if (bias) b = aligned(torch::stable::to(*bias, x.scalar_type()), kAlignment);
  const Tensor rows_of_x = aligned(x, kAlignment), bytes = aligned(weight, fp8.align);
  const int64_t padded = round_up(m, kMultiple);
  const Parts activations(place, padded, k);
  quantize_activations(rows_of_x.const_data_ptr(), dtype, m, activations.for_rows(padded), place.stream());
  place.check_launches("linear_w8a8");

  const int64_t across = (m + kTile - 1) / kTile, least = (kTiles + across - 1) / across * kTile;
  const int64_t slices = (n - 1) / std::max(kSliceBytes / k, least) + 1;
  const int64_t rows = std::min(round_up((n - 1) / slices + 1, kTile), n);  // slices of about the same size
  const Parts slice(place, rows, k);
  const Tensor y = place.empty({padded, n}, x.scalar_type());
  for (int64_t first = 0; first < n; first += rows) {
    const int64_t count = std::min(rows, n - first);
    const auto* const from = static_cast<const uint8_t*>(bytes.const_data_ptr()) + first * packed.row_bytes;
    split_fp8(from, slice.for_rows(count), place.stream());
    place.check_launches("linear_w8a8");
    multiply(activations, padded, slice, count, part_of(y, 1, first, count));
  }
  if (b) {
    add_bias(y.mutable_data_ptr(), b->const_data_ptr(), dtype, m, n, place.stream());
    place.check_launches("linear_w8a8");
  }
  return torch::stable::view(part_of(y, 0, 0, m), shape);
}

}  // namespace
}  // namespace isqtorch::cuda

ISQTORCH_LIBRARY_IMPL(ISQTORCH_OPERATORS, ISQTORCH_DEVICE, m) {
  m.impl("linear_w8a8", TORCH_BOX(&isqtorch::cuda::linear_w8a8));
  m.impl("linear_w8a8_frozen", TORCH_BOX(&isqtorch::cuda::linear_w8a8));
}

ISQTORCH_LIBRARY_IMPL(ISQTORCH_OPERATORS, CompositeExplicitAutograd, m) {
  m.impl("allow_fp8_products", TORCH_BOX(&isqtorch::cuda::allow_fp8_products));
}
