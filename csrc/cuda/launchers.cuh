// The functions that FormatKernels points to, as templates over a format's struct. kernels/ defines them; the files
// csrc/cuda/<kernel>_<family>.cu instantiate them for the formats of formats/list.cuh; table.cu names them all.
#pragma once

#include "cuda/launch.h"

namespace isqtorch::cuda {

template <class F>
void launch_decode(const DecodeJob&, const Shape&, Stream);

template <class F>
void launch_linear(const LinearJob&, const Shape&, Stream);

template <class F>
int64_t experts_workspace(const ExpertsJob&, const Shape&);
template <class F>
void launch_experts(const ExpertsJob&, const Shape&, Stream);

template <class F>
int64_t quantize_workspace(const QuantizeJob&, const Shape&);
template <class F>
void launch_quantize(const QuantizeJob&, const Shape&, Stream);

// Of x, for `linear`; more are faster decoded and multiplied by torch. By arithmetic, to be measured: with n = k = 8192
// on an H100, 64 rows take 35 us (0.17 GB from L2 in 31, instructions and matrix units 27), in proportion from there
// on; decoding takes 45, and cuBLAS 40 to 60 more. They meet between 128 and 192 rows.
constexpr int64_t kMaxLinearRows = 128;

}  // namespace isqtorch::cuda
