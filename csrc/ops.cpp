// Every operator of the library, on one screen. Device kernels register themselves beside their code (cpu/ops_cpu.cpp,
// ...); shapes for tracing and gradients are in isqtorch/ops/schema.py.
#include <torch/csrc/stable/library.h>

#include "ops_tensors.h"

ISQTORCH_LIBRARY(ISQTORCH_OPERATORS, m) {
  // w [..., N, K] float -> uint8 [..., N, row_bytes]; importance f32 [K], or [E, K] for w [E, N, K]
  m.def("quantize(Tensor w, str format, Tensor? importance=None, str? rule=None) -> Tensor");

  // weight uint8 [..., N, row_bytes] -> [..., N, K]
  m.def("dequantize(Tensor weight, str format, ScalarType dtype) -> Tensor");

  // x [..., K] -> [..., N] = x @ dequantize(weight)^T + bias, in x's dtype; weight uint8 [N, row_bytes], bias [N]
  m.def("linear(Tensor x, Tensor weight, str format, Tensor? bias=None) -> Tensor");
  // The same where no argument wants a gradient, which is then not looked for: QuantLinear's way, microseconds shorter
  m.def("linear_frozen(Tensor x, Tensor weight, str format, Tensor? bias=None) -> Tensor");

  // `linear` for a weight in fp8 that may round x to FP8, too, as quantize would, where that is faster; elsewhere the
  // same as `linear`. Its gradients are those of `linear`
  m.def("linear_w8a8(Tensor x, Tensor weight, str format, Tensor? bias=None) -> Tensor");
  m.def("linear_w8a8_frozen(Tensor x, Tensor weight, str format, Tensor? bias=None) -> Tensor");

  // x [T, K], or [T, S, K] with a row per slot -> [T, S, N]: row (t, s) = x @ dequantize(weight[e])^T + bias[e] with
  // e = ids[t, s], or zeros where e = E, an expert that is not here; weight uint8 [E, N, row_bytes], bias [E, N], ids
  // int32 or int64 [T, S]
  m.def("experts_linear(Tensor x, Tensor weight, str format, Tensor ids, Tensor? bias=None) -> Tensor");
  // dy [T, S, N] -> [T, S, K]: the gradient of experts_linear for a row of x per slot
  m.def("experts_linear_dx(Tensor dy, Tensor weight, str format, Tensor ids) -> Tensor");

  // ids int32 or int64 [...] -> [..., K]: rows of dequantize(weight)
  m.def("embedding(Tensor ids, Tensor weight, str format, ScalarType dtype) -> Tensor");

  // x [..., K] -> f32 [count, K]: sums of x * x over the rows of each group; groups int32 or int64 [rows, slots], other
  // numbers than 0 to count - 1 for no group, or all rows in group 0
  m.def("square_sums(Tensor x, Tensor? groups=None, int count=1) -> Tensor");

  // What the CPU part was compiled for, what this machine can run and what is selected, as JSON.
  m.def("cpu_info() -> str");
  // Select an instruction-set level by name, for tests and measurements; "" selects the best one again.
  m.def("set_cpu_isa(str name) -> ()");
  // What the CUDA part was compiled for, as JSON; there is no kernel for it where that part is missing.
  m.def("cuda_info() -> str");
  // Whether torch's _scaled_mm can multiply with scales for runs of 128, as linear_w8a8 does where it pays.
  m.def("allow_fp8_products(bool allowed) -> ()");
}
