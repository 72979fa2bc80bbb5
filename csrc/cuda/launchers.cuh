// The functions that FormatKernels points to, as templates over a format's struct. kernels/ defines them; the
// files of instances/ instantiate them for one family of formats/list.cuh at a time; table.cu names them all.
#pragma once

#include "cuda/launch.h"

namespace isqtorch::cuda {

template <class F>
void launch_decode(const DecodeJob&, const Shape&, Stream);

template <class F>
int64_t linear_workspace(const LinearJob&, const Shape&);
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

constexpr int64_t kFewRows = 8;  // of x: the width of a matrix unit's operand

// The most rows of x for `linear`; for more, decoding and torch's product are faster. This is calculated and still has
// to be measured. With n = k = 8192 on an H100, the matrix units need 29 us for every 128 rows as the tile kernel feeds
// them, or 34 if they are busy 85 % of the time: 136 us for 512 rows. cuBLAS, whose instructions need two thirds of the
// time, takes 105 us for these, after 45 to 57 us of decoding. Both take the same time somewhere between 512 and 768
// rows.
constexpr int64_t kMaxLinearRows = 512;

// The same for `linear_w8a8`, whose alternative is an FP8 product at twice the speed.
constexpr int64_t kMaxW8A8Rows = 128;

}  // namespace isqtorch::cuda
