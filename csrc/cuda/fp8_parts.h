// FP8 matrices in the form that torch's _scaled_mm takes: codes without scales between them, and scales apart. Part of
// the border between operators and kernels, like launch.h.
#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace isqtorch::cuda {

// A matrix in two pieces of memory, as cuBLAS takes it: the scales of one run of 128 columns are a row of `scales`,
// with one entry per row of the matrix.
struct Fp8Parts {
  static constexpr int kRun = 128;
  uint8_t* codes;  // e4m3 [rows, k], 16-byte aligned
  float* scales;   // [k / 128, rows]
  int64_t rows, k;
};

// x [m, k] of dtype, 16-byte aligned, is rounded as `quantize` rounds weights. Rows from m on are zeros. If a run has a
// number that is not finite, its scale is NaN, and so are all products with it.
void quantize_activations(const void* x, Dtype dtype, int64_t m, const Fp8Parts& to, Stream stream);

// Rows of a packed weight.
void split_fp8(const uint8_t* weight, const Fp8Parts& to, Stream stream);

// y [m, n] += bias [n]; both of dtype and 16-byte aligned, n a multiple of 8.
void add_bias(void* y, const void* bias, Dtype dtype, int64_t m, int64_t n, Stream stream);

}  // namespace isqtorch::cuda
