// The checks of the operators' arguments, the same on every device and in the words of the reference
// (isqtorch/ops/checks.py).
//
// A message is built only when its check fails: a decoding step calls `linear` hundreds of times.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ops_tensors.h"
#include "rule.h"

namespace isqtorch {

// Weights in a row. Larger sizes make no sense, and their bytes could overflow.
constexpr int64_t kMostColumns = int64_t{1} << 40;

// Importance above this is no mean of squares that a layer can meet. Only the ratios of importance count, and the sums
// of the searches, which contain the square of importance, stay within f32.
constexpr float kMostImportance = 0x1p40f;

// A flat index as text: 5 in a 2 x 3 tensor is "1, 2".
inline std::string position_text(int64_t index, const std::vector<int64_t>& shape) {
  std::string position;
  for (size_t i = shape.size(); i-- > 0;) {
    position = text(index % shape[i], position.empty() ? "" : ", ", position);
    index /= shape[i];
  }
  return position;
}

inline std::string number_text(float value) {
  if (std::isfinite(value)) return text(value);
  return std::isnan(value) ? "nan" : value > 0 ? "inf" : "-inf";
}

// Raises IndexError.
template <class... Parts>
[[noreturn]] void out_of_range(const Parts&... message) {
  throw std::out_of_range(text(message...));
}

// ---- packed weights -----------------------------------------------------------------------------------------------

// The sizes of a packed weight [..., N, row_bytes].
struct PackedShape {
  int64_t rows, row_bytes, k;

  PackedShape(const char* op, const Tensor& weight, const std::string& format, int block, int block_bytes,
              bool must_be_matrix) {
    if (weight.scalar_type() != ScalarType::Byte) {
      check(false, op, ": a packed weight is uint8, got ", name_of(weight.scalar_type()),
            ". Pack it with isqtorch.quantize.");
    }
    if (weight.dim() < 2 || (must_be_matrix && weight.dim() > 2)) {
      check(false, op, ": a packed weight must have ", must_be_matrix ? "" : "at least ",
            "2 dimensions [N, row_bytes], got shape ", shape_text(shape_of(weight)), ".");
    }
    row_bytes = weight.size(weight.dim() - 1);
    if (row_bytes <= 0 || row_bytes % block_bytes) {
      check(false, format, ": a packed row must be a positive multiple of ", block_bytes, " bytes, got ", row_bytes,
            ". The weight was packed in another format, or cut inside a block.");
    }
    if (row_bytes / block_bytes > kMostColumns / block) {
      check(false, format, ": a packed row must not have more than 2**40 weights, got ", row_bytes, " bytes.");
    }
    k = row_bytes / block_bytes * block;
    rows = weight.numel() / row_bytes;
  }
};

// ---- products -----------------------------------------------------------------------------------------------------

// Returns the shape of y.
inline std::vector<int64_t> checked_linear(const Tensor& x, const PackedShape& weight, const std::string& format) {
  std::vector<int64_t> shape = shape_of(x);
  if (shape.empty() || shape.back() != weight.k) {
    check(false, "linear: the last dimension of x must be ", weight.k, ", the in_features of this ", format,
          " weight, got shape ", shape_text(shape), ".");
  }
  shape.back() = weight.rows;
  return shape;
}

inline void check_bias(const char* op, const Tensor& bias, const std::vector<int64_t>& wanted) {
  if (shape_of(bias) != wanted) {
    check(false, op, ": bias must have shape ", shape_text(wanted), ", got ", shape_text(shape_of(bias)), ".");
  }
  checked_dtype(op, "bias", bias.scalar_type());
}

// The shapes of q [B, H, R, D] and of packed k and v, whose rows of keys hold key_dim numbers.
inline void check_attention(const std::vector<int64_t>& q, const std::vector<int64_t>& k, int64_t key_dim,
                            const std::vector<int64_t>& v) {
  if (q.size() != 4) {
    check(false, "attention: q must have 4 dimensions [B, heads, queries, head_dim], got shape ", shape_text(q), ".");
  }
  if (!std::equal(k.begin(), k.begin() + 3, v.begin())) {
    check(false, "attention: k and v must have the same batch, heads and tokens, got shapes ", shape_text(k), " and ",
          shape_text(v), ".");
  }
  if (q[3] != key_dim) {
    check(false, "attention: the last dimension of q must be ", key_dim, ", the numbers in a row of k, got shape ",
          shape_text(q), ".");
  }
  if (q[0] != k[0] || k[1] == 0 || q[1] % k[1]) {
    check(false, "attention: q must have the batch of k and a multiple of its heads, got shapes ", shape_text(q),
          " and ", shape_text(k), ".");
  }
}

// The sizes of `experts_linear`.
struct ExpertsShape {
  int64_t experts, n, tokens, slots;
  bool rows_per_slot, wide_ids;

  ExpertsShape(const Tensor& x, const Tensor& weight, const PackedShape& packed, const std::string& format,
               const Tensor& ids) {
    if (weight.dim() != 3) {
      check(false, "experts_linear: the weight must have 3 dimensions [E, N, row_bytes], got shape ",
            shape_text(shape_of(weight)), ".");
    }
    checked_dtype("experts_linear", "x", x.scalar_type());
    const ScalarType type = ids.scalar_type();
    wide_ids = type == ScalarType::Long;
    if ((!wide_ids && type != ScalarType::Int) || ids.dim() != 2) {
      check(false, "experts_linear: ids must be int64 or int32 [T, S], got ", name_of(type), " ",
            shape_text(shape_of(ids)), ".");
    }
    experts = weight.size(0);
    n = weight.size(1);
    tokens = ids.size(0);
    slots = ids.size(1);
    const std::vector<int64_t> shape = shape_of(x), shared = {tokens, packed.k}, own = {tokens, slots, packed.k};
    rows_per_slot = shape == own;
    if (!rows_per_slot && shape != shared) {
      check(false, "experts_linear: x must be ", shape_text(shared), ", one row per token, or ", shape_text(own),
            ", one per slot, for this ", format, " weight and these ids; got shape ", shape_text(shape), ".");
    }
  }
};

// Whether the ids of `embedding` are int64.
inline bool checked_ids(const Tensor& ids) {
  const ScalarType type = ids.scalar_type();
  if (type != ScalarType::Long && type != ScalarType::Int) {
    check(false, "embedding: ids must be int64 or int32, got ", name_of(type), ".");
  }
  return type == ScalarType::Long;
}

// ---- square_sums ---------------------------------------------------------------------------------------------------

inline void check_square_sums(const Tensor& x, const std::optional<Tensor>& groups, int64_t count) {
  const std::vector<int64_t> shape = shape_of(x);
  check(!shape.empty() && shape.back() > 0, "square_sums: x must have columns, got shape ", shape_text(shape), ".");
  check(count > 0, "square_sums: count must be positive, got ", count, ".");
  if (!groups) return;
  const ScalarType type = groups->scalar_type();
  check(type == ScalarType::Long || type == ScalarType::Int, "square_sums: groups must be int64 or int32, got ",
        name_of(type), ".");
  const int64_t rows = x.numel() / shape.back();
  check(groups->dim() == 2 && groups->size(0) == rows, "square_sums: groups must have shape [", rows, ", slots], got ",
        shape_text(shape_of(*groups)), ".");
}

// ---- quantize -----------------------------------------------------------------------------------------------------

// Returns the shape of the packed weight.
inline std::vector<int64_t> checked_source(const Tensor& w, const char* format, int block, int block_bytes) {
  const ScalarType type = w.scalar_type();
  check(float_dtype(type) || type == ScalarType::Double,
        "quantize: weight must be one of float32, float16, bfloat16, float64, got ", name_of(type), ".");
  std::vector<int64_t> shape = shape_of(w);
  check(shape.size() >= 2, "quantize: weight must have at least 2 dimensions [N, K], got shape ", shape_text(shape),
        ". Vectors (biases, norms) are left as they are.");
  const int64_t k = shape.back();
  check(k > 0 && k % block == 0, format, ": in_features must be a positive multiple of ", block, ", got ", k,
        ". Use a format with a smaller block, or leave this weight as it is.");
  check(k <= kMostColumns, format, ": in_features must not be more than 2**40, got ", k, ".");
  shape.back() = k / block * block_bytes;
  return shape;
}

// `rules`: one bit for each rule that the format has besides the default, see rule_bit.
inline Rule checked_rule(const char* format, uint8_t rules, const std::optional<std::string>& rule) {
  constexpr std::pair<const char*, Rule> kRules[] = {{"mlx", Rule::kMlx}, {"search", Rule::kSearch}};
  if (!rule) return Rule::kDefault;
  std::string known;
  for (const auto& [name, number] : kRules) {
    if (!(rules & rule_bit(number))) continue;
    if (*rule == name) return number;
    known += text(" or '", name, "'");
  }
  check(
      *rule != "feedback",
      "quantize: rule 'feedback' needs the second moments of the layer's inputs. Use quantize_feedback for one weight, "
      "or quantize_ for a model.");
  check(false, "quantize: ", format, " has no rule '", shortened(*rule), "'. Use rule=None", known, ".");
  return Rule::kDefault;
}

// f32 importance [matrices, K] from a tensor on the CPU; empty if there is none. Of a weight without elements, nothing
// will be read, and the importance is only checked.
inline std::vector<float> checked_importance(const std::optional<Tensor>& importance,
                                             const std::vector<int64_t>& weight_shape) {
  if (!importance) return {};
  const int64_t k = weight_shape.back();
  std::vector<int64_t> own(weight_shape.begin(), weight_shape.end() - 2);  // one vector per matrix
  own.push_back(k);
  const std::vector<int64_t> shape = shape_of(*importance);
  const bool shared = shape == std::vector<int64_t>{k};
  check(shared || shape == own, "quantize: importance must have shape [", k, "], one value per column of the weight",
        own.size() > 1 ? text(", or ", shape_text(own), ", one vector per matrix") : "", "; got ", shape_text(shape),
        ". Is this the entry of another layer?");
  check(float_dtype(importance->scalar_type()) || importance->scalar_type() == ScalarType::Double,
        "quantize: importance must be a float tensor, got ", name_of(importance->scalar_type()), ".");
  const Tensor values = dense(torch::stable::to(*importance, ScalarType::Float));
  const float* const first = static_cast<const float*>(values.const_data_ptr());
  std::vector<float> columns(first, first + values.numel());
  const auto bad =
      std::find_if_not(columns.begin(), columns.end(), [](float v) { return v >= 0 && v <= kMostImportance; });
  if (bad != columns.end()) {
    check(false, "quantize: importance[", position_text(bad - columns.begin(), shape), "] is ", number_text(*bad),
          "; importance must be finite, not negative and at most 2**40. Only its ratios count: divide it by its "
          "maximum.");
  }
  if (!shared || std::find(weight_shape.begin(), weight_shape.end(), 0) != weight_shape.end()) return columns;
  int64_t matrices = 1;
  for (size_t i = 0; i + 2 < weight_shape.size(); ++i) matrices *= weight_shape[i];
  columns.resize(matrices * k);
  for (int64_t e = 1; e < matrices; ++e) std::copy_n(columns.begin(), k, columns.begin() + e * k);
  return columns;
}

// The arguments of `quantize_feedback` that `quantize` does not have. The shape is that of the weight.
inline void check_feedback(const std::vector<int64_t>& shape, const Tensor& factor) {
  if (shape.size() != 2) {
    check(false, "quantize_feedback: weight must be one matrix [N, K], got shape ", shape_text(shape),
          ". Matrices of a stack have inputs of their own: pack them one by one.");
  }
  const int64_t k = shape[1];
  if (factor.scalar_type() != ScalarType::Float || shape_of(factor) != std::vector<int64_t>{k, k}) {
    check(false, "quantize_feedback: factor must be float32 [", k, ", ", k, "] for a weight of ", k, " columns, got ",
          name_of(factor.scalar_type()), " ", shape_text(shape_of(factor)), ". Is this the factor of another layer?");
  }
}
[[noreturn]] inline void refuse_factor(int64_t i, int64_t j, float value) {
  throw std::invalid_argument(text("quantize_feedback: factor[", i, ", ", j, "] is ", number_text(value),
                                   "; a factor has zeros below its diagonal, positive numbers on it and finite numbers "
                                   "above. Make it with isqtorch.quantizers.feedback_factor."));
}

// Weight number `at` of a tensor is NaN or infinite.
[[noreturn]] inline void refuse_weight(const char* format, int64_t at, const std::vector<int64_t>& shape, float value) {
  throw std::invalid_argument(text("quantize: weight[", position_text(at, shape), "] is ", number_text(value), "; ",
                                   format, " needs finite values. Repair the checkpoint, or leave this weight out."));
}

// In the block that begins with weight number `at`, the weights minus the errors carried to them overflow.
[[noreturn]] inline void refuse_carried(const std::string& format, int64_t at, const std::vector<int64_t>& shape) {
  throw std::invalid_argument(text("quantize_feedback: the errors carried to the block of ", format, " from weight[",
                                   position_text(at, shape),
                                   "] on are larger than float32 can hold. Make the factor "
                                   "from moments with more damping, or scale the weight down."));
}

// The block that begins with weight number `at` has a scale that overflows.
[[noreturn]] inline void refuse_block(const std::string& format, int64_t at, const std::vector<int64_t>& shape) {
  const size_t suffix = format.find(".f16");
  const std::string way_out = suffix == std::string::npos
                                  ? "Scale the weight down, or use a format with a wider scale (q8k, fp8)"
                                  : text("Use ", format.substr(0, suffix), ", which has bf16 scales");
  throw std::invalid_argument(text("quantize: the block of ", format, " from weight[", position_text(at, shape),
                                   "] on holds values too large for its 16-bit scale. ", way_out, "."));
}

}  // namespace isqtorch
