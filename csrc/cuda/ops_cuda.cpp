// The operators on CUDA tensors: checks, memory, streams, and which kernel runs. The kernels know nothing of torch
// (launch.h). All operators but `quantize` only enqueue work: they never wait for the device or read anything back, and
// all memory is torch's, so a CUDA graph can capture them. `quantize` is in ops_quantize.cpp.
#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cuda/kernels/tile_plan.h"
#include "cuda/ops_device.h"
#include "ops_checks.h"

namespace isqtorch::cuda {
namespace {

constexpr uintptr_t kActivationAlignment = 16;
constexpr int64_t kSliceBytes = 32 << 20;  // decoded for one call of torch's product; fits into the second-level cache
constexpr int64_t kSliceRows = 128;        // rows in a block of torch's product; a slice has a multiple of it

// A packed weight on its device, with its sizes and kernels.
struct Packed : PackedShape {
  const FormatKernels& format;
  Tensor keep_alive;
  const uint8_t* bytes;

  Packed(const char* op, const Tensor& weight, const std::string& name, bool must_be_matrix)
      : Packed(op, weight, must_be_matrix, known_format(op, name)) {}

 private:
  Packed(const char* op, const Tensor& weight, bool must_be_matrix, const FormatKernels& format)
      : PackedShape(op, weight, format.name, format.shape.block, format.shape.block_bytes, must_be_matrix),
        format(format),
        keep_alive(aligned(weight, format.align)),
        bytes(static_cast<const uint8_t*>(keep_alive.const_data_ptr())) {}
};

// ---- linear -------------------------------------------------------------------------------------------------------

// A bias in the type of x; null if there is none.
std::optional<Tensor> loaded_bias(const char* op, const std::optional<Tensor>& bias, const Tensor& weight,
                                  const std::vector<int64_t>& wanted, ScalarType dtype) {
  if (!bias) return std::nullopt;
  check_bias(op, *bias, wanted);
  check_device(op, "bias is", *bias, weight);
  return dense(bias->scalar_type() == dtype ? *bias : torch::stable::to(*bias, dtype));
}

const void* address_of(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

// out = x w^T + bias, by torch.
void multiply(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias, const Tensor& out) {
  using torch::stable::detail::from;
  StableIValue stack[] = {from(x), from(w), from(bias), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack, TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // owns the result, which is `out` again
}

// How many rows of a weight are decoded for one product: about as many floats as stay in the second-level cache, but
// enough for every multiprocessor. With 640 rows of x and k = 8192 (bf16), 32 MB would keep only 80 of 132 busy, and a
// product would take 65 % longer than necessary. Of a slice of 55 MB, a part goes to memory and back: at most 20 us
// each way, while its product takes 54 us.
int64_t slice_rows(int64_t m, int64_t n, int64_t k, Dtype dtype) {
  const int64_t blocks_of_x = (m + kSliceRows - 1) / kSliceRows, busy = std::max<int64_t>(kProcessors / blocks_of_x, 1);
  const int64_t cached = kSliceBytes / (k * item_bytes(dtype)) / kSliceRows;
  const int64_t slices = (n + std::max(busy, cached) * kSliceRows - 1) / (std::max(busy, cached) * kSliceRows);
  return std::min(((n + slices - 1) / slices + kSliceRows - 1) / kSliceRows * kSliceRows, n);  // slices of equal size
}

// For many rows of x: decodes a slice of the weight and multiplies it by torch's product while it is in the cache.
void linear_decoded(const Place& place, const Packed& packed, Tensor x, std::optional<Tensor> bias, Tensor y,
                    Dtype dtype) {
  const int64_t n = packed.rows, k = packed.k;
  const int64_t rows = slice_rows(x.size(0), n, k, dtype);
  Tensor slice = place.empty({rows, k}, x.scalar_type());
  for (int64_t first = 0; first < n; first += rows) {
    const int64_t count = std::min(rows, n - first);
    const DecodeJob job{
        packed.bytes + first * packed.row_bytes, count, k, dtype, slice.mutable_data_ptr(), nullptr, false, 0};
    packed.format.decode(job, packed.format.shape, place.stream());
    place.check_launches("linear");
    std::optional<Tensor> part;
    if (bias) part = torch::stable::narrow(*bias, 0, first, count);
    multiply(x, torch::stable::narrow(slice, 0, 0, count), part, torch::stable::narrow(y, 1, first, count));
  }
}

Tensor linear(const Tensor& x, const Tensor& weight, Text format_name, std::optional<Tensor> bias) {
  const Packed packed("linear", weight, format_name, true);
  const Dtype dtype = checked_dtype("linear", "x", x.scalar_type());
  const std::vector<int64_t> shape = checked_linear(x, packed, format_name);
  check_device("linear", "x is", x, weight);
  const int64_t n = packed.rows, k = packed.k, m = x.numel() / k;
  const std::optional<Tensor> b = loaded_bias("linear", bias, weight, {n}, x.scalar_type());
  const Place place(weight);
  const Tensor y = place.empty(shape, x.scalar_type());
  if (m == 0 || n == 0) return y;
  const Tensor rows = aligned(x, kActivationAlignment);
  if (m > packed.format.max_rows) {
    linear_decoded(place, packed, torch::stable::view(rows, {m, k}), b, torch::stable::view(y, {m, n}), dtype);
    return y;
  }
  LinearJob job{rows.const_data_ptr(), packed.bytes, address_of(b), y.mutable_data_ptr(), dtype, m, n, k, nullptr};
  std::optional<Tensor> workspace;
  if (const int64_t bytes = packed.format.linear_workspace(job, packed.format.shape)) {
    workspace = place.empty({bytes}, ScalarType::Byte);
    job.workspace = workspace->mutable_data_ptr();
  }
  packed.format.linear(job, packed.format.shape, place.stream());
  place.check_launches("linear");
  return y;
}

// ---- dequantize, embedding ----------------------------------------------------------------------------------------

Tensor dequantize(const Tensor& weight, Text format_name, ScalarType dtype) {
  const Packed packed("dequantize", weight, format_name, false);
  const Dtype out_dtype = checked_dtype("dequantize", "dtype", dtype);
  const Place place(weight);
  std::vector<int64_t> shape = shape_of(weight);
  shape.back() = packed.k;
  const Tensor out = place.empty(shape, dtype);
  if (packed.rows == 0) return out;
  const DecodeJob job{packed.bytes, packed.rows, packed.k, out_dtype, out.mutable_data_ptr(), nullptr, false, 0};
  packed.format.decode(job, packed.format.shape, place.stream());
  place.check_launches("dequantize");
  return out;
}

// The kernel finds an id that is out of range and stops the device. Checking ids here would mean waiting for the
// device.
Tensor embedding(const Tensor& ids, const Tensor& weight, Text format_name, ScalarType dtype) {
  const Packed packed("embedding", weight, format_name, true);
  const Dtype out_dtype = checked_dtype("embedding", "dtype", dtype);
  const bool wide = checked_ids(ids);
  check_device("embedding", "ids are", ids, weight);
  const Place place(weight);
  std::vector<int64_t> shape = shape_of(ids);
  shape.push_back(packed.k);
  const Tensor out = place.empty(shape, dtype), flat = dense(ids);
  if (flat.numel() == 0) return out;
  const DecodeJob job{packed.bytes,           packed.rows,           packed.k, out_dtype,
                      out.mutable_data_ptr(), flat.const_data_ptr(), wide,     flat.numel()};
  packed.format.decode(job, packed.format.shape, place.stream());
  place.check_launches("embedding");
  return out;
}

// ---- experts_linear -----------------------------------------------------------------------------------------------

Tensor experts_linear(const Tensor& x, const Tensor& weight, Text format_name, const Tensor& ids,
                      std::optional<Tensor> bias) {
  const char* op = "experts_linear";
  const Packed packed(op, weight, format_name, false);
  const ExpertsShape sizes(x, weight, packed, format_name, ids);
  check_device(op, "x is", x, weight);
  check_device(op, "ids are", ids, weight);
  const std::optional<Tensor> b = loaded_bias(op, bias, weight, {sizes.experts, sizes.n}, x.scalar_type());
  const Place place(weight);
  const Tensor y = place.empty({sizes.tokens, sizes.slots, sizes.n}, x.scalar_type());
  if (y.numel() == 0) return y;
  const Tensor rows = aligned(x, kActivationAlignment), dense_ids = dense(ids);
  ExpertsJob job;
  job.x = rows.const_data_ptr();
  job.rows_per_slot = sizes.rows_per_slot;
  job.weight = packed.bytes;
  job.bias = address_of(b);
  job.ids = dense_ids.const_data_ptr();
  job.wide_ids = sizes.wide_ids;
  job.y = y.mutable_data_ptr();
  job.dtype = *float_dtype(x.scalar_type());
  job.tokens = sizes.tokens;
  job.slots = sizes.slots;
  job.experts = sizes.experts;
  job.n = sizes.n;
  job.k = packed.k;
  job.workspace = nullptr;
  const Tensor workspace = place.empty({packed.format.experts_workspace(job, packed.format.shape)}, ScalarType::Byte);
  job.workspace = workspace.mutable_data_ptr();
  packed.format.experts(job, packed.format.shape, place.stream());
  place.check_launches(op);
  return y;
}

// ---- inspection ---------------------------------------------------------------------------------------------------

#if !defined(ISQTORCH_CUDA_ARCHS)
#define ISQTORCH_CUDA_ARCHS ""
#endif

std::string cuda_info() {
  std::string formats;
  for (int i = 0; i < format_count(); ++i) {
    const FormatKernels& f = format_at(i);
    formats +=
        text(i ? ", " : "", '"', f.name, "\": {\"block\": ", f.shape.block, ", \"block_bytes\": ", f.shape.block_bytes,
             ", \"few_rows\": ", f.few_rows, ", \"max_rows\": ", f.max_rows, ", \"w8a8_rows\": ", f.w8a8_rows, '}');
  }
  return text("{\"toolkit\": \"", toolkit_version(), "\", \"archs\": \"", ISQTORCH_CUDA_ARCHS, "\", \"formats\": {",
              formats, "}}");
}

}  // namespace
}  // namespace isqtorch::cuda

ISQTORCH_LIBRARY_IMPL(ISQTORCH_OPERATORS, ISQTORCH_DEVICE, m) {
  m.impl("dequantize", TORCH_BOX(&isqtorch::cuda::dequantize));
  m.impl("linear", TORCH_BOX(&isqtorch::cuda::linear));
  m.impl("linear_frozen", TORCH_BOX(&isqtorch::cuda::linear));
  m.impl("embedding", TORCH_BOX(&isqtorch::cuda::embedding));
  m.impl("experts_linear", TORCH_BOX(&isqtorch::cuda::experts_linear));
}

ISQTORCH_LIBRARY_IMPL(ISQTORCH_OPERATORS, CompositeExplicitAutograd, m) {
  m.impl("cuda_info", TORCH_BOX(&isqtorch::cuda::cuda_info));
}
