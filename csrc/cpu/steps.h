// The border between the operators of one decoding step (ops_steps.cpp) and their kernels: norms, gates, rotary
// positions, attention of one token. The kernels compute in f32. Where torch rounds to the type of the tensors between
// two of its operators, they round, too.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace isqtorch {

// Between x / rms(x) and its product with the weight, some models round to the type of x, others do not, and Gemma
// multiplies with 1 + weight.
enum class NormStyle : uint8_t { kRounded, kScaled, kOnePlus };
constexpr int kNormStyles = 3;

struct NormJob {
  const float* x;       // [n], values of `dtype`
  const float* weight;  // [n], values of `dtype`
  int64_t n;
  float eps;
  NormStyle style;
  Dtype dtype;
  int lanes;  // of torch's vectors, which decide the order of its sums
  float* y;   // [n], values of `dtype`; may be x
};

// Attention of the heads that share one head of keys and values, over some columns of the cache.
struct StepAttendJob {
  const float* q;       // [heads, padded], zeros behind dim
  const uint8_t* keys;  // [columns, dim] of dtype
  const uint8_t* values;
  const uint8_t* mask;  // [columns], 0: not seen; or null
  int64_t heads, dim, padded, columns;
  float scale;
  Dtype dtype;
  float* scores;  // [heads, columns rounded up to kStepLanes], scratch
  float* rows;    // [kStepColumns, padded], scratch
  // Results: the largest score of each head, the sum of exp(score - largest), and the sum of these times the values.
  float* largest;  // [heads]
  float* sums;     // [heads]
  float* out;      // [heads, padded]
};
constexpr int kStepLanes = 16;        // vectors have at most this many floats
constexpr int64_t kStepColumns = 16;  // of the cache, converted at once; they fit the first-level cache

struct StepKernels {
  void (*norm)(const NormJob& job);
  // gate[i] = silu(gate[i]) * up[i]
  void (*gate)(float* gate, const float* up, int64_t n, Dtype dtype);
  // The first n values of a head, turned by the angles of a position; cos and sin are [n].
  void (*rotate)(float* head, const float* cos, const float* sin, int64_t n, Dtype dtype);
  // Values as they are after rounding to dtype.
  void (*round)(float* values, int64_t n, Dtype dtype);
  void (*attend)(const StepAttendJob& job);
};

// Levels that add only dot products share these, as they share the decoders.
namespace steps_baseline {
StepKernels step_kernels();
}
namespace steps_avx2 {
StepKernels step_kernels();
}
namespace steps_avx512 {
StepKernels step_kernels();
}

}  // namespace isqtorch
