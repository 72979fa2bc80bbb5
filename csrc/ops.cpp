// Every operator of the library, on one screen. Device kernels register themselves beside their code (cpu/ops_cpu.cpp,
// ...); shapes for tracing and gradients are in isqtorch/ops/schema.py.
#include <torch/csrc/stable/library.h>

#include "ops_tensors.h"

ISQTORCH_LIBRARY(ISQTORCH_OPERATORS, m) {
  // w [..., N, K] float -> uint8 [..., N, row_bytes]; importance f32 [K], or [E, K] for w [E, N, K]
  m.def("quantize(Tensor w, str format, Tensor? importance=None, str? rule=None) -> Tensor");

  // w [N, K] float -> uint8 [N, row_bytes], with codes that make up for each other's errors; factor f32 [K, K], unit
  // upper triangular; importance f32 [K]
  m.def("quantize_feedback(Tensor w, str format, Tensor factor, Tensor importance, str? rule=None) -> Tensor");

  // weight uint8 [..., N, row_bytes] -> [..., N, K]
  m.def("dequantize(Tensor weight, str format, ScalarType dtype) -> Tensor");

  // x [..., K] -> [..., N] = x @ dequantize(weight)^T + bias, in x's dtype; weight uint8 [N, row_bytes], bias [N]
  m.def("linear(Tensor x, Tensor weight, str format, Tensor? bias=None) -> Tensor");
  // The same without gradients: autograd is not even asked, which saves microseconds. QuantLinear calls it when no
  // argument requires a gradient
  m.def("linear_frozen(Tensor x, Tensor weight, str format, Tensor? bias=None) -> Tensor");

  // `linear` for an fp8 weight. Where that is faster, x too is rounded to FP8, as `quantize` would round it; elsewhere
  // the same as `linear`. The gradients are those of `linear`
  m.def("linear_w8a8(Tensor x, Tensor weight, str format, Tensor? bias=None) -> Tensor");
  m.def("linear_w8a8_frozen(Tensor x, Tensor weight, str format, Tensor? bias=None) -> Tensor");

  // x [T, K], or [T, S, K] with a row per slot -> [T, S, N]: row (t, s) = x @ dequantize(weight[e])^T + bias[e] with e
  // = ids[t, s], or zeros for e = E, which means that the expert is not on this device; weight uint8 [E, N, row_bytes],
  // bias [E, N], ids int32 or int64 [T, S]
  m.def("experts_linear(Tensor x, Tensor weight, str format, Tensor ids, Tensor? bias=None) -> Tensor");
  // dy [T, S, N] -> [T, S, K]: the gradient of experts_linear for a row of x per slot
  m.def("experts_linear_dx(Tensor dy, Tensor weight, str format, Tensor ids) -> Tensor");

  // ids int32 or int64 [...] -> [..., K]: rows of dequantize(weight)
  m.def("embedding(Tensor ids, Tensor weight, str format, ScalarType dtype) -> Tensor");

  // q [B, H, R, D] -> [B, H, R, V] = softmax(scale * q k^T + mask) v; k uint8 [B, G, S, bytes of D], v uint8 [B, G, S,
  // bytes of V], packed, a head of theirs for H / G heads of q; mask bool (true: seen) or float [B, H, R, S], 1 in
  // place of B, H or R if it is the same for all
  m.def("attention(Tensor q, Tensor k, Tensor v, str k_format, str v_format, float scale, Tensor? mask) -> Tensor");

  // x [..., K] -> f32 [count, K]: per group, the sums of x * x over its rows; groups int32 or int64 [rows, slots]: a
  // number outside 0 .. count - 1 means no group; without groups, every row is in group 0
  m.def("square_sums(Tensor x, Tensor? groups=None, int count=1) -> Tensor");

  // The parts of a decoding step, for tensors on the CPU and without gradients (isqtorch/ops/steps.py has the rules).
  // norm: the weight [K] of an RMS norm of x; style: 0 rounds before its product with the weight, 1 does not, 2 is 1
  // with 1 + weight; lanes: floats in the vectors of torch, which decide the order of its sums.
  // x [..., K] -> x / rms(x) * weight
  m.def("step_norm(Tensor x, Tensor weight, float eps, int style, int lanes) -> Tensor");
  // x [..., 2 N] -> [..., N]: silu(first half) * second half
  m.def("step_gate(Tensor x) -> Tensor");
  // x [..., K] -> [..., sum of N]: products of the norm of x with several weights, side by side. With `gate`, the
  // first half g and the second half u become silu(g) * u [..., sum of N / 2]
  m.def(
      "step_linears(Tensor x, Tensor[] weights, str[] formats, Tensor?[] biases, Tensor? norm, float eps, int style, "
      "int lanes, bool gate) -> Tensor");
  // x [..., K] -> residual + norm(x @ dequantize(weight)^T + bias)
  m.def(
      "step_linear_add(Tensor x, Tensor weight, str format, Tensor? bias, Tensor residual, Tensor? norm, float eps, "
      "int style, int lanes) -> Tensor");
  // x [B, 1, Hq * D + 2 * H * D], queries, keys and values of one token -> queries [B, Hq, 1, D], normed and turned by
  // the angles cos and sin [B or 1, 1, R], R <= D; keys and values go into column `at` of the cache [B, H, C, D]
  m.def(
      "step_heads(Tensor x, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, int at, Tensor? q_norm, "
      "Tensor? k_norm, float eps, int style, int lanes) -> Tensor");
  // q [B, Hq, 1, D] -> [B, 1, Hq * D]: attention to the columns [first, last) of keys and values [B, H, C, D]; mask
  // bool [B or 1, 1, 1, last - first]
  m.def("step_attend(Tensor q, Tensor keys, Tensor values, int first, int last, float scale, Tensor? mask) -> Tensor");
  // The halves of a decoder layer, each the operators above one after the other. `after` is a norm of what is added to
  // x. Attention: step_linears, step_heads into column last - 1, step_attend, step_linear_add
  m.def(
      "step_attention(Tensor x, Tensor[] weights, str[] formats, Tensor?[] biases, Tensor? norm, float eps, int style, "
      "int lanes, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, int first, int last, Tensor? q_norm, "
      "Tensor? k_norm, float heads_eps, int heads_style, int heads_lanes, float scale, Tensor? mask, Tensor o, "
      "str o_format, Tensor? o_bias, Tensor? after, float after_eps, int after_style, int after_lanes) -> Tensor");
  // MLP: step_linears with a gate, step_linear_add
  m.def(
      "step_mlp(Tensor x, Tensor[] weights, str[] formats, Tensor?[] biases, Tensor? norm, float eps, int style, "
      "int lanes, Tensor down, str down_format, Tensor? down_bias, Tensor? after, float after_eps, int after_style, "
      "int after_lanes) -> Tensor");

  // What the CPU part was compiled for, what this machine can run and what is selected, as JSON.
  m.def("cpu_info() -> str");
  // Select an instruction-set level by name, for tests and measurements; "" selects the best one again.
  m.def("set_cpu_isa(str name) -> ()");
  // What the CUDA part was compiled for, as JSON. The operator has no kernel if that part was not built.
  m.def("cuda_info() -> str");
  // Whether torch's _scaled_mm can multiply with one scale per 128 columns, which linear_w8a8 then uses where it is
  // faster.
  m.def("allow_fp8_products(bool allowed) -> ()");
}
