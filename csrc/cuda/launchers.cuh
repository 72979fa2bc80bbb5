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

// Of x, for `linear`; more are faster decoded and multiplied by torch.
constexpr int64_t kMaxLinearRows = 128;

}  // namespace isqtorch::cuda
