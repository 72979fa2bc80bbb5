// RMS norms within the operators of a decoding step.
#pragma once

#include <optional>

#include "cpu/ops_tensors.h"
#include "cpu/steps.h"

namespace isqtorch {

// x / rms(x) * weight.
class Norm {
 public:
  Norm(const char* op, const Tensor& weight, int64_t n, Dtype dtype, double eps, int64_t style, int64_t lanes)
      : weight_(n * sizeof(float)), job_{} {
    check(weight.dim() == 1 && weight.numel() == n, op, ": the weight of the norm must have shape [", n, "], got ",
          shape_text(shape_of(weight)), ".");
    check(float_dtype(weight.scalar_type()) == dtype, op, ": the weight of the norm must have the type of x, got ",
          name_of(weight.scalar_type()), ".");
    check(style >= 0 && style < kNormStyles, op, ": style must be 0, 1 or 2, got ", style, ".");
    check(lanes == 4 || lanes == 8 || lanes == 16, op, ": lanes must be 4, 8 or 16, got ", lanes, ".");
    selected_table().formats.load(dense(weight).const_data_ptr(), dtype, n, weight_.floats());
    job_.weight = weight_.floats();
    job_.n = n;
    job_.eps = static_cast<float>(eps);
    job_.style = static_cast<NormStyle>(style);
    job_.dtype = dtype;
    job_.lanes = static_cast<int>(lanes);
  }

  void apply(float* row) const {
    NormJob job = job_;
    job.x = job.y = row;
    selected_table().steps->norm(job);
  }

 private:
  Scratch weight_;
  NormJob job_;
};

inline std::optional<Norm> norm_of(const char* op, const std::optional<Tensor>& weight, int64_t n, Dtype dtype,
                                   double eps, int64_t style, int64_t lanes) {
  if (!weight) return std::nullopt;
  return std::optional<Norm>(std::in_place, op, *weight, n, dtype, eps, style, lanes);
}

}  // namespace isqtorch
