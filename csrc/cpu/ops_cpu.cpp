// The operators on CPU tensors: checks, errors, memory and threads. Arithmetic is in the kernels (kernels.h), which
// know nothing of torch.
#include <algorithm>
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

std::string number_text(float value) {
  if (std::isfinite(value)) return text(value);
  return std::isnan(value) ? "nan" : value > 0 ? "inf" : "-inf";
}

// What to do about a format whose scales overflow.
std::string wider_scale(const std::string& format) {
  const size_t suffix = format.find(".f16");
  if (suffix != std::string::npos) return text("Use ", format.substr(0, suffix), ", which has bf16 scales");
  return "Scale the weight down, or use a format with a wider scale (q8k, fp8)";
}

std::string position_text(int64_t index, const std::vector<int64_t>& shape) {
  std::string position;
  for (size_t i = shape.size(); i-- > 0;) {
    position = text(index % shape[i], position.empty() ? "" : ", ", position);
    index /= shape[i];
  }
  return position;
}

// f32 importance [matrices, K], checked; empty if there is none.
std::vector<float> checked_importance(const std::optional<Tensor>& importance,
                                      const std::vector<int64_t>& weight_shape) {
  if (!importance) return {};
  const int64_t k = weight_shape.back();
  std::vector<int64_t> own(weight_shape.begin(), weight_shape.end() - 2);  // one vector per matrix
  int64_t matrices = 1;
  for (const int64_t size : own) matrices *= size;
  own.push_back(k);
  const std::vector<int64_t> shape = shape_of(*importance);
  const bool shared = shape == std::vector<int64_t>{k};
  check(shared || shape == own, "quantize: importance must have shape [", k, "], one value per column of the weight",
        own.size() > 1 ? text(", or ", shape_text(own), ", one vector per matrix") : "", "; got ", shape_text(shape),
        ". Is this the entry of another layer?");
  check(float_dtype(importance->scalar_type()) || importance->scalar_type() == ScalarType::Double,
        "quantize: importance must be a float tensor, got ", name_of(importance->scalar_type()), ".");
  const Tensor values = dense(torch::stable::to(*importance, ScalarType::Float));
  std::vector<float> columns(matrices * k);
  const int64_t count = shared ? k : matrices * k;
  std::copy_n(static_cast<const float*>(values.const_data_ptr()), std::min<int64_t>(count, columns.size()),
              columns.begin());
  const auto last = columns.begin() + (matrices ? count : 0);
  const auto bad = std::find_if_not(columns.begin(), last, [](float v) { return std::isfinite(v) && v >= 0; });
  if (bad != last) {
    check(false, "quantize: importance[", position_text(bad - columns.begin(), shape), "] is ", number_text(*bad),
          "; importance must be finite and not negative.");
  }
  for (int64_t e = 1; shared && e < matrices; ++e) std::copy_n(columns.begin(), k, columns.begin() + e * k);
  return columns;
}

Rule checked_rule(const FormatKernels& format, const std::optional<std::string>& rule) {
  constexpr std::pair<const char*, Rule> kRules[] = {{"mlx", Rule::kMlx}, {"search", Rule::kSearch}};
  if (!rule) return Rule::kDefault;
  std::string known;
  for (const auto& [name, number] : kRules) {
    if (!(format.rules & rule_bit(number))) continue;
    if (*rule == name) return number;
    known += text(" or '", name, "'");
  }
  check(false, "quantize: ", format.name, " has no rule '", *rule, "'. Use rule=None", known, ".");
  return Rule::kDefault;
}

Tensor quantize(const Tensor& w, std::string format_name, std::optional<Tensor> importance,
                std::optional<std::string> rule) {
  const KernelTable& kernels = selected_table();
  const FormatKernels& format = kernels.formats.formats[find_format("quantize", format_name)];
  const std::vector<int64_t> shape = shape_of(w);
  check(float_dtype(w.scalar_type()) || w.scalar_type() == ScalarType::Double,
        "quantize: weight must be one of float32, float16, bfloat16, float64, got ", name_of(w.scalar_type()), ".");
  check(shape.size() >= 2, "quantize: weight must have at least 2 dimensions [N, K], got shape ", shape_text(shape),
        ". Vectors (biases, norms) are left as they are.");
  const int64_t k = shape.back(), rows = shape[shape.size() - 2];
  check(k > 0 && k % format.block == 0, format.name, ": in_features must be a positive multiple of ", format.block,
        ", got ", k, ". Use a format with a smaller block, or leave this weight as it is.");
  const Rule checked = checked_rule(format, rule);
  const std::vector<float> columns = checked_importance(importance, shape);
  const Tensor source = dense(w.scalar_type() == ScalarType::Double ? torch::stable::to(w, ScalarType::Float) : w);
  const Dtype dtype = *float_dtype(source.scalar_type());
  const int64_t matrices = rows ? w.numel() / (rows * k) : 0;

  std::vector<int64_t> packed_shape = shape;
  packed_shape.back() = k / format.block * format.block_bytes;
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
    const QuantizeResult result = format.quantize(job);
    if (result.bad_weight != QuantizeResult::kNone) {
      const int64_t at = e * matrix_weights + result.bad_weight;
      float value;
      kernels.formats.load(static_cast<const uint8_t*>(source.const_data_ptr()) + at * item_bytes(dtype), dtype, 1,
                           &value);
      check(false, "quantize: weight[", position_text(at, shape), "] is ", number_text(value), "; ", format.name,
            " needs finite values. Repair the checkpoint, or leave this weight out.");
    }
    if (result.overflow_at != QuantizeResult::kNone) {
      const int64_t at = e * matrix_weights + result.overflow_at;
      check(false, "quantize: the block of ", format.name, " from weight[", position_text(at, shape),
            "] on holds values too large for its 16-bit scale. ", wider_scale(format.name), ".");
    }
  }
  return out;
}

// ---- dequantize, embedding ----------------------------------------------------------------------------------------

Tensor dequantize(const Tensor& weight, std::string format_name, ScalarType dtype) {
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

Tensor embedding(const Tensor& ids, const Tensor& weight, std::string format_name, ScalarType dtype) {
  const PackedMatrix packed("embedding", weight, format_name, true);
  const Dtype out_dtype = checked_dtype("embedding", "dtype", dtype);
  const ScalarType id_type = ids.scalar_type();
  check(id_type == ScalarType::Long || id_type == ScalarType::Int, "embedding: ids must be int64 or int32, got ",
        name_of(id_type), ".");
  const Tensor flat = dense(ids);
  const int64_t count = flat.numel();
  std::vector<int64_t> rows(count);
  const void* data = flat.const_data_ptr();
  for (int64_t i = 0; i < count; ++i) {
    rows[i] = id_type == ScalarType::Long ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
    if (rows[i] < 0 || rows[i] >= packed.rows) {
      throw std::out_of_range(text("embedding: ids[", position_text(i, shape_of(ids)), "] is ", rows[i],
                                   ", but the table has ", packed.rows, " rows."));
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
    list += text(list.empty() ? "" : ", ", "{\"first\": ", choice.first,
                 ", \"last\": ", choice.last == INT64_MAX ? "null" : text(choice.last),
                 ", \"kernel\": ", quoted(choice.kernel), ", \"level\": ", quoted(level),
                 ", \"why\": ", quoted(choice.why), "}");
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

void set_cpu_isa(std::string name) { select_isa(name); }

}  // namespace
}  // namespace isqtorch

STABLE_TORCH_LIBRARY_IMPL(isqtorch, CPU, m) {
  m.impl("quantize", TORCH_BOX(&isqtorch::quantize));
  m.impl("dequantize", TORCH_BOX(&isqtorch::dequantize));
  m.impl("embedding", TORCH_BOX(&isqtorch::embedding));
}

STABLE_TORCH_LIBRARY_IMPL(isqtorch, CompositeExplicitAutograd, m) {
  m.impl("cpu_info", TORCH_BOX(&isqtorch::cpu_info));
  m.impl("set_cpu_isa", TORCH_BOX(&isqtorch::set_cpu_isa));
}
