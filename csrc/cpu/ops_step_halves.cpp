// The halves of a decoder layer as one operator each. A call of an operator by Python takes some microseconds, and a
// small model has hundreds of them for each token.
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cpu/ops_steps.h"

namespace isqtorch {
namespace {

Tensor step_attention(const Tensor& x, std::vector<Tensor> weights, std::vector<Text> formats,
                      std::vector<std::optional<Tensor>> biases, std::optional<Tensor> norm, double eps, int64_t style,
                      int64_t lanes, const Tensor& cos, const Tensor& sin, Tensor keys, Tensor values, int64_t first,
                      int64_t last, std::optional<Tensor> q_norm, std::optional<Tensor> k_norm, double heads_eps,
                      int64_t heads_style, int64_t heads_lanes, double scale, std::optional<Tensor> mask,
                      const Tensor& o, Text o_format, std::optional<Tensor> o_bias, std::optional<Tensor> after,
                      double after_eps, int64_t after_style, int64_t after_lanes) {
  const Tensor qkv = step_linears(x, std::move(weights), std::move(formats), std::move(biases), std::move(norm), eps,
                                  style, lanes, false);
  const Tensor q = step_heads(qkv, cos, sin, keys, values, last - 1, std::move(q_norm), std::move(k_norm), heads_eps,
                              heads_style, heads_lanes);
  const Tensor y = step_attend(q, keys, values, first, last, scale, std::move(mask));
  return step_linear_add(y, o, std::move(o_format), std::move(o_bias), x, std::move(after), after_eps, after_style,
                         after_lanes);
}

Tensor step_mlp(const Tensor& x, std::vector<Tensor> weights, std::vector<Text> formats,
                std::vector<std::optional<Tensor>> biases, std::optional<Tensor> norm, double eps, int64_t style,
                int64_t lanes, const Tensor& down, Text down_format, std::optional<Tensor> down_bias,
                std::optional<Tensor> after, double after_eps, int64_t after_style, int64_t after_lanes) {
  const Tensor y = step_linears(x, std::move(weights), std::move(formats), std::move(biases), std::move(norm), eps,
                                style, lanes, true);
  return step_linear_add(y, down, std::move(down_format), std::move(down_bias), x, std::move(after), after_eps,
                         after_style, after_lanes);
}

}  // namespace
}  // namespace isqtorch

STABLE_TORCH_LIBRARY_IMPL(isqtorch, CPU, m) {
  m.impl("step_attention", TORCH_BOX(&isqtorch::step_attention));
  m.impl("step_mlp", TORCH_BOX(&isqtorch::step_mlp));
}
