// `quantize` on CUDA tensors. It waits for the device, because it must refuse weights that are NaN or infinite.
#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cuda/ops_device.h"
#include "ops_checks.h"

namespace isqtorch::cuda {
namespace {

constexpr uintptr_t kSourceAlignment = 16;  // for wide loads

torch::stable::Device cpu() { return {torch::headeronly::DeviceType::CPU, 0}; }

// f32 [matrices, K] on the device. The values are checked on the CPU: they are few, and `quantize` waits anyway.
std::optional<Tensor> loaded_importance(const Place& place, const std::optional<Tensor>& importance,
                                        const std::vector<int64_t>& shape) {
  if (!importance) return std::nullopt;
  const std::vector<float> columns = checked_importance(torch::stable::to(*importance, cpu()), shape);
  const Tensor values = empty({static_cast<int64_t>(columns.size())}, ScalarType::Float);
  if (!columns.empty()) std::memcpy(values.mutable_data_ptr(), columns.data(), columns.size() * sizeof(float));
  return place.upload(values);
}

Tensor quantize(const Tensor& w, Text format_name, std::optional<Tensor> importance, std::optional<Text> rule) {
  const FormatKernels& format = known_format("quantize", format_name);
  const std::vector<int64_t> packed_shape =
      checked_source(w, format.name, format.shape.block, format.shape.block_bytes);
  const std::vector<int64_t> shape = shape_of(w);
  const int64_t k = shape.back(), rows = shape[shape.size() - 2];
  const Rule checked = checked_rule(format.name, format.rules, rule);
  if (importance && !importance->is_cpu()) check_device("quantize", "importance is", *importance, w);
  const Place place(w);
  const std::optional<Tensor> columns = loaded_importance(place, importance, shape);
  const Tensor source =
      aligned(w.scalar_type() == ScalarType::Double ? torch::stable::to(w, ScalarType::Float) : w, kSourceAlignment);
  const Dtype dtype = *float_dtype(source.scalar_type());
  const Tensor out = place.empty(packed_shape, ScalarType::Byte);
  const int64_t matrices = w.numel() ? w.numel() / (rows * k) : 0;
  if (matrices == 0) return out;

  // Every matrix writes its faults into a row of two numbers. All rows are read back at once.
  Tensor faults = empty({matrices, 2}, ScalarType::Long);
  std::fill_n(static_cast<int64_t*>(faults.mutable_data_ptr()), 2 * matrices, INT64_MAX);
  faults = place.upload(faults);
  std::optional<Tensor> workspace;
  for (int64_t e = 0; e < matrices; ++e) {
    QuantizeJob job;
    job.w = static_cast<const uint8_t*>(source.const_data_ptr()) + e * rows * k * item_bytes(dtype);
    job.dtype = dtype;
    job.rows = rows;
    job.k = k;
    job.importance = columns ? static_cast<const float*>(columns->const_data_ptr()) + e * k : nullptr;
    job.rule = checked;
    job.out = static_cast<uint8_t*>(out.mutable_data_ptr()) + e * rows * packed_shape.back();
    job.faults = static_cast<int64_t*>(faults.mutable_data_ptr()) + 2 * e;
    job.workspace = nullptr;
    if (!workspace) workspace = place.empty({format.quantize_workspace(job, format.shape)}, ScalarType::Byte);
    job.workspace = workspace->mutable_data_ptr();
    format.quantize(job, format.shape, place.stream());
    place.check_launches("quantize");
  }

  const Tensor found = torch::stable::to(faults, cpu());
  const int64_t* fault = static_cast<const int64_t*>(found.const_data_ptr());
  for (int64_t e = 0; e < matrices; ++e, fault += 2) {
    if (fault[0] != INT64_MAX) {
      const int64_t at = e * rows * k + fault[0];
      Tensor flat = torch::stable::view(source, {source.numel()});
      const Tensor value =
          torch::stable::to(torch::stable::to(torch::stable::narrow(flat, 0, at, 1), ScalarType::Float), cpu());
      refuse_weight(format.name, at, shape, *static_cast<const float*>(value.const_data_ptr()));
    }
    if (fault[1] != INT64_MAX) refuse_block(format.name, e * rows * k + fault[1], shape);
  }
  return out;
}

}  // namespace
}  // namespace isqtorch::cuda

ISQTORCH_LIBRARY_IMPL(ISQTORCH_OPERATORS, ISQTORCH_DEVICE, m) {
  m.impl("quantize", TORCH_BOX(&isqtorch::cuda::quantize));
}
