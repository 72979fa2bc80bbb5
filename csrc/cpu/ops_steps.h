// The operators of a decoding step, for those that consist of several (ops_step_halves.cpp). isqtorch/ops/steps.py says
// what they compute.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "ops_tensors.h"

namespace isqtorch {

Tensor step_linears(const Tensor& x, std::vector<Tensor> weights, std::vector<Text> formats,
                    std::vector<std::optional<Tensor>> biases, std::optional<Tensor> norm_weight, double eps,
                    int64_t style, int64_t lanes, bool gate);
Tensor step_linear_add(const Tensor& x, const Tensor& weight, Text format, std::optional<Tensor> bias,
                       const Tensor& residual, std::optional<Tensor> norm_weight, double eps, int64_t style,
                       int64_t lanes);
Tensor step_heads(const Tensor& x, const Tensor& cos, const Tensor& sin, Tensor keys, Tensor values, int64_t at,
                  std::optional<Tensor> q_norm, std::optional<Tensor> k_norm, double eps, int64_t style, int64_t lanes);
Tensor step_attend(const Tensor& q, const Tensor& keys, const Tensor& values, int64_t first, int64_t last, double scale,
                   std::optional<Tensor> mask);

}  // namespace isqtorch
