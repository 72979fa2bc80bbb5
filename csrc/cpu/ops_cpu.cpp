// The operators on CPU tensors: checks, errors, memory and threads. Arithmetic is in the kernels (kernels.h), which
// know nothing of torch.
#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cpu/ops_tensors.h"

namespace isqtorch {
namespace {

// ---- quantize -----------------------------------------------------------------------------------------------------

// Raises the error for the first fault of a matrix that begins with weight number `first` of `source`.
void refuse_faults(const QuantizeResult& result, const KernelTable& kernels, const char* format, const Tensor& source,
                   int64_t first, const std::vector<int64_t>& shape) {
  constexpr int64_t kNone = QuantizeResult::kNone;
  if (result.bad_weight != kNone) {
    const Dtype dtype = *float_dtype(source.scalar_type());
    const int64_t at = first + result.bad_weight;
    float value;
    kernels.formats.load(static_cast<const uint8_t*>(source.const_data_ptr()) + at * item_bytes(dtype), dtype, 1,
                         &value);
    refuse_weight(format, at, shape, value);
  }
  // In a row, the first of the two is the cause of the other.
  if (result.overflow_at != kNone && result.overflow_at <= result.carried_at) {
    refuse_block(format, first + result.overflow_at, shape);
  }
  if (result.carried_at != kNone) refuse_carried(format, first + result.carried_at, shape);
}

Tensor quantize(const Tensor& w, Text format_name, std::optional<Tensor> importance, std::optional<Text> rule) {
  const KernelTable& kernels = selected_table();
  const FormatKernels& format = kernels.formats.formats[find_format("quantize", format_name)];
  const std::vector<int64_t> packed_shape = checked_source(w, format.name, format.block, format.block_bytes);
  const std::vector<int64_t> shape = shape_of(w);
  const int64_t k = shape.back(), rows = shape[shape.size() - 2];
  const Rule checked = checked_rule(format.name, format.rules, rule);
  const std::vector<float> columns = checked_importance(importance, shape);
  const Tensor source = dense(w.scalar_type() == ScalarType::Double ? torch::stable::to(w, ScalarType::Float) : w);
  const Dtype dtype = *float_dtype(source.scalar_type());
  const int64_t matrices = w.numel() ? w.numel() / (rows * k) : 0;

  Tensor out = empty(packed_shape, ScalarType::Byte);
  const int64_t matrix_bytes = rows * packed_shape.back(), matrix_weights = rows * k;
  for (int64_t e = 0; e < matrices; ++e) {
    QuantizeJob job;
    job.w = static_cast<const uint8_t*>(source.const_data_ptr()) + e * matrix_weights * item_bytes(dtype);
    job.dtype = dtype;
    job.rows = rows;
    job.k = k;
    job.importance = columns.empty() ? nullptr : columns.data() + e * k;
    job.rule = checked;
    job.out = static_cast<uint8_t*>(out.mutable_data_ptr()) + e * matrix_bytes;
    job.parallel_for = parallel;
    refuse_faults(format.quantize(job), kernels, format.name, source, e * matrix_weights, shape);
  }
  return out;
}

// ---- quantize_feedback --------------------------------------------------------------------------------------------

// Checks that a factor [k, k] is upper triangular and finite, with a positive diagonal.
void check_factor(const float* factor, int64_t k) {
  const auto bad = [=](int64_t i, int64_t j) {
    const float v = factor[i * k + j];
    return j < i ? v != 0 : !std::isfinite(v) || (j == i && v <= 0);
  };
  std::atomic<int64_t> first{QuantizeResult::kNone};  // row
  parallel_rows(k, k, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end && i < first; ++i) {
      const float* row = factor + i * k;
      bool fault = !(row[i] > 0);
      for (int64_t j = 0; j < i; ++j) fault |= row[j] != 0;
      for (int64_t j = i; j < k; ++j) fault |= !(std::abs(row[j]) <= FLT_MAX);
      if (!fault) continue;
      int64_t seen = first;
      while (i < seen && !first.compare_exchange_weak(seen, i)) {
      }
    }
  });
  if (first == QuantizeResult::kNone) return;
  const int64_t i = first;
  int64_t j = 0;
  while (!bad(i, j)) ++j;
  refuse_factor(i, j, factor[i * k + j]);
}

Tensor quantize_feedback(const Tensor& w, Text format_name, const Tensor& factor, const Tensor& importance,
                         std::optional<Text> rule) {
  const KernelTable& kernels = selected_table();
  const FormatKernels& format = kernels.formats.formats[find_format("quantize_feedback", format_name)];
  const std::vector<int64_t> packed_shape = checked_source(w, format.name, format.block, format.block_bytes);
  const std::vector<int64_t> shape = shape_of(w);
  const Rule checked = checked_rule(format.name, format.rules, rule);
  const std::vector<float> columns = checked_importance(importance, shape);
  check_feedback(shape, factor);
  const Tensor v = dense(factor);
  const float* const first = static_cast<const float*>(v.const_data_ptr());
  const Tensor source = dense(w.scalar_type() == ScalarType::Double ? torch::stable::to(w, ScalarType::Float) : w);
  check_factor(first, shape[1]);

  Tensor out = empty(packed_shape, ScalarType::Byte);
  FeedbackJob job;
  job.w = source.const_data_ptr();
  job.dtype = *float_dtype(source.scalar_type());
  job.rows = shape[0];
  job.k = shape[1];
  job.importance = columns.data();
  job.rule = checked;
  job.out = static_cast<uint8_t*>(out.mutable_data_ptr());
  job.parallel_for = parallel;
  job.factor = first;
  job.threads = std::max<int64_t>(torch::stable::get_num_threads(), 1);
  refuse_faults(format.quantize_feedback(job), kernels, format.name, source, 0, shape);
  return out;
}

// ---- dequantize, embedding ----------------------------------------------------------------------------------------

Tensor dequantize(const Tensor& weight, Text format_name, ScalarType dtype) {
  const PackedMatrix packed("dequantize", weight, format_name, false);
  const Dtype out_dtype = checked_dtype("dequantize", "dtype", dtype);
  std::vector<int64_t> shape = shape_of(weight);
  shape.back() = packed.k;
  Tensor out = empty(shape, dtype);
  uint8_t* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  parallel_rows(packed.rows, packed.k, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      packed.decode_row(row, out_dtype, to + row * packed.k * item_bytes(out_dtype));
  });
  return out;
}

Tensor embedding(const Tensor& ids, const Tensor& weight, Text format_name, ScalarType dtype) {
  const PackedMatrix packed("embedding", weight, format_name, true);
  const Dtype out_dtype = checked_dtype("embedding", "dtype", dtype);
  const bool wide = checked_ids(ids);
  const Tensor flat = dense(ids);
  const int64_t count = flat.numel();
  std::vector<int64_t> rows(count);
  const void* data = flat.const_data_ptr();
  for (int64_t i = 0; i < count; ++i) {
    rows[i] = wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
    if (rows[i] < 0 || rows[i] >= packed.rows) {
      out_of_range("embedding: ids[", position_text(i, shape_of(ids)), "] is ", rows[i], ", but the table has ",
                   packed.rows, " rows.");
    }
  }
  std::vector<int64_t> shape = shape_of(ids);
  shape.push_back(packed.k);
  Tensor out = empty(shape, dtype);
  uint8_t* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  parallel_rows(count, packed.k, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      packed.decode_row(rows[i], out_dtype, to + i * packed.k * item_bytes(out_dtype));
  });
  return out;
}

// ---- inspection ---------------------------------------------------------------------------------------------------

std::string quoted(const std::string& s) { return '"' + s + '"'; }

// The level whose file compiled some kernels; later levels may share them.
template <class Kernels>
const char* home_of(const Kernels* kernels, const Kernels* (*get)(const KernelTable&)) {
  for (const IsaLevel& level : isa_levels()) {
    if (get(level.table) == kernels) return level.name;
  }
  return "";
}

// Ranges of rows of x with the kernel of `linear` for a format, as a JSON list.
std::string linear_json(const KernelTable& table, int format) {
  std::string list;
  for (const LinearChoice& choice : linear_choices(linear_kernels(table, format))) {
    const char* level = table.isa;
    if (choice.way == LinearWay::kRows) {
      level = home_of<RowKernels>(table.rows, [](const KernelTable& t) { return t.rows; });
    } else if (choice.way == LinearWay::kTiles) {
      level = home_of<TileKernels>(table.tiles, [](const KernelTable& t) { return t.tiles; });
    } else if (choice.way == LinearWay::kPanels) {
      level = home_of<PanelKernels>(table.panels, [](const KernelTable& t) { return t.panels; });
    }
    list +=
        text(list.empty() ? "" : ", ", "{\"first\": ", choice.first,
             ", \"last\": ", choice.last == INT64_MAX ? "null" : text(choice.last),
             ", \"kernel\": ", quoted(choice.kernel), ", \"level\": ", quoted(level), ", \"why\": ", quoted(choice.why),
             ", \"decodes\": ", choice.way == LinearWay::kDecoded ? "true" : "false", "}");
  }
  return '[' + list + ']';
}

std::string cpu_info() {
  const auto append = [&](std::string& list, const char* name) {
    list += text(list.empty() ? "" : ", ", quoted(name));
  };
  std::string compiled, supported, with_formats, formats, linear;
  const FormatKernels* last = nullptr;
  for (const IsaLevel& level : isa_levels()) {
    append(compiled, level.name);
    if (level.supported) append(supported, level.name);
    if (level.supported && level.table.formats.formats != last) append(with_formats, level.name);
    last = level.table.formats.formats;
  }
  const KernelTable& table = selected_table();
  for (int i = 0; i < table.formats.count; ++i) {
    const FormatKernels& f = table.formats.formats[i];
    formats +=
        text(i ? ", " : "", quoted(f.name), ": {\"block\": ", f.block, ", \"block_bytes\": ", f.block_bytes, "}");
    linear += text(i ? ", " : "", quoted(f.name), ": ", linear_json(table, i));
  }
  const char* formats_level =
      home_of<FormatKernels>(table.formats.formats, [](const KernelTable& t) { return t.formats.formats; });
  return text("{\"isa_compiled\": [", compiled, "], \"isa_supported\": [", supported, "], \"isa_with_formats\": [",
              with_formats, "], \"isa_selected\": ", quoted(table.isa), ", \"isa_of_formats\": ", quoted(formats_level),
              ", \"reason\": ", quoted(selection_reason()), ", \"threads\": ", torch::stable::get_num_threads(),
              ", \"formats\": {", formats, "}, \"linear\": {", linear, "}}");
}

void set_cpu_isa(Text name) { select_isa(name); }

}  // namespace
}  // namespace isqtorch

STABLE_TORCH_LIBRARY_IMPL(isqtorch, CPU, m) {
  m.impl("quantize", TORCH_BOX(&isqtorch::quantize));
  m.impl("quantize_feedback", TORCH_BOX(&isqtorch::quantize_feedback));
  m.impl("dequantize", TORCH_BOX(&isqtorch::dequantize));
  m.impl("embedding", TORCH_BOX(&isqtorch::embedding));
}

STABLE_TORCH_LIBRARY_IMPL(isqtorch, CompositeExplicitAutograd, m) {
  m.impl("cpu_info", TORCH_BOX(&isqtorch::cpu_info));
  m.impl("set_cpu_isa", TORCH_BOX(&isqtorch::set_cpu_isa));
}
