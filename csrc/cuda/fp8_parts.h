// FP8 matrices as torch's _scaled_mm takes them: codes without scales between them, and the scales elsewhere. The
// border between the operator and its kernels, like launch.h.
#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace isqtorch::cuda {

// A matrix in two pieces of memory, as cuBLAS wants it: what is one scale for the 128 columns of a run there, is a
// column of `scales` for all rows here.
struct Fp8Parts {
  static constexpr int kRun = 128;
  uint8_t* codes;  // e4m3 [rows, k], 16-byte aligned
  float* scales;   // [k / 128, rows]
  int64_t rows, k;
};

// x [m, k] of dtype, 16-byte aligned, rounded as `quantize` rounds weights; zeros from row m on. A run with a number
// that is not finite has NaN for its scale, and so makes NaN of what it is multiplied with.
void quantize_activations(const void* x, Dtype dtype, int64_t m, const Fp8Parts& to, Stream stream);

// Rows of a packed weight.
void split_fp8(const uint8_t* weight, const Fp8Parts& to, Stream stream);

// y [m, n] += bias [n]; both of dtype and 16-byte aligned, n a multiple of 8.
void add_bias(void* y, const void* bias, Dtype dtype, int64_t m, int64_t n, Stream stream);

}  // namespace isqtorch::cuda
