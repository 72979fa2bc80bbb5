// The kernels of csrc/cuda, by format and name, for the tests in Python.
#include <cstring>
#include <string>

#include "cuda/fp8_parts.h"
#include "cuda/launch.h"
#include "simt.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace isqtorch;
using namespace isqtorch::cuda;

namespace {

std::string error;

// Runs a member of a format's table on a job; -1 and an error if there is none, or if a launch failed.
template <class Result, class Job, class... More>
int64_t run(const char* format, const char* what, Result (*FormatKernels::*member)(const Job&, const Shape&, More...),
            const Job* job, More... more) {
  const FormatKernels* const kernels = find_format(format);
  if (!kernels || !(kernels->*member)) {
    error = std::string(format) + " has no kernel '" + what + "'";
    return -1;
  }
  simt::take_error();
  int64_t result = 0;
  if constexpr (std::is_void_v<Result>) {
    (kernels->*member)(*job, kernels->shape, more...);
  } else {
    result = (kernels->*member)(*job, kernels->shape, more...);
  }
  error = simt::take_error();
  return error.empty() ? result : -1;
}

template <class Launch>
int64_t launched(const Launch& launch) {
  simt::take_error();
  launch();
  error = simt::take_error();
  return error.empty() ? 0 : -1;
}

}  // namespace

EXPORT const char* kernels_error() { return error.c_str(); }

EXPORT int64_t kernels_decode(const char* format, const DecodeJob* job) {
  return run(format, "decode", &FormatKernels::decode, job, Stream());
}
EXPORT int64_t kernels_linear_workspace(const char* format, const LinearJob* job) {
  return run(format, "linear_workspace", &FormatKernels::linear_workspace, job);
}
EXPORT int64_t kernels_linear(const char* format, const LinearJob* job) {
  return run(format, "linear", &FormatKernels::linear, job, Stream());
}
EXPORT int64_t kernels_experts_workspace(const char* format, const ExpertsJob* job) {
  return run(format, "experts_workspace", &FormatKernels::experts_workspace, job);
}
EXPORT int64_t kernels_experts(const char* format, const ExpertsJob* job) {
  return run(format, "experts", &FormatKernels::experts, job, Stream());
}
EXPORT int64_t kernels_quantize_workspace(const char* format, const QuantizeJob* job) {
  return run(format, "quantize_workspace", &FormatKernels::quantize_workspace, job);
}
EXPORT int64_t kernels_quantize(const char* format, const QuantizeJob* job) {
  return run(format, "quantize", &FormatKernels::quantize, job, Stream());
}

// The kernels that are there for fp8 alone (fp8_parts.h).
EXPORT int64_t kernels_quantize_activations(const void* x, Dtype dtype, int64_t m, const Fp8Parts* to) {
  return launched([&] { quantize_activations(x, dtype, m, *to, Stream()); });
}
EXPORT int64_t kernels_split_fp8(const uint8_t* weight, const Fp8Parts* to) {
  return launched([&] { split_fp8(weight, *to, Stream()); });
}
EXPORT int64_t kernels_add_bias(void* y, const void* bias, Dtype dtype, int64_t m, int64_t n) {
  return launched([&] { add_bias(y, bias, dtype, m, n, Stream()); });
}

EXPORT int kernels_count() { return format_count(); }
EXPORT const char* kernels_name(int index) { return format_at(index).name; }
// block, block_bytes, align, rules, few_rows, max_rows
EXPORT void kernels_facts(const char* format, int64_t* facts) {
  const FormatKernels& kernels = *find_format(format);
  facts[0] = kernels.shape.block;
  facts[1] = kernels.shape.block_bytes;
  facts[2] = kernels.align;
  facts[3] = kernels.rules;
  facts[4] = kernels.few_rows;
  facts[5] = kernels.max_rows;
}
// What the ctypes structures must agree with.
EXPORT void kernels_job_sizes(int64_t* sizes) {
  sizes[0] = sizeof(DecodeJob);
  sizes[1] = sizeof(LinearJob);
  sizes[2] = sizeof(ExpertsJob);
  sizes[3] = sizeof(QuantizeJob);
  sizes[4] = sizeof(Fp8Parts);
}
