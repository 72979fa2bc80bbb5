// The functions that FormatKernels points to, as templates over a format's struct. kernels/ defines them; the files
// csrc/cuda/<kernel>_<family>.cu instantiate them for the formats of formats/list.cuh; table.cu names them all.
#pragma once

#include "cuda/launch.h"

namespace isqtorch::cuda {

// Null where no file instantiates it yet.
#define ISQ_LATER __attribute__((weak))

template <class F>
ISQ_LATER void launch_decode(const DecodeJob&, const Shape&, Stream);

template <class F>
ISQ_LATER void launch_linear(const LinearJob&, const Shape&, Stream);

template <class F>
ISQ_LATER int64_t experts_workspace(const ExpertsJob&, const Shape&);
template <class F>
ISQ_LATER void launch_experts(const ExpertsJob&, const Shape&, Stream);

template <class F>
ISQ_LATER int64_t quantize_workspace(const QuantizeJob&, const Shape&);
template <class F>
ISQ_LATER void launch_quantize(const QuantizeJob&, const Shape&, Stream);

// Of x, for `linear`; more are faster decoded and multiplied by torch.
constexpr int64_t kMaxLinearRows = 512;

}  // namespace isqtorch::cuda
