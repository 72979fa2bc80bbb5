// The formats' structs by family: X(F) for each. A .cu file instantiates a launcher (launchers.cuh) for one family:
//
//   #define ISQ_INSTANTIATE(F) template void launch_decode<F>(const DecodeJob&, const Shape&, Stream);
//   ISQ_GGML32_FORMATS(ISQ_INSTANTIATE)
#pragma once

#include "cuda/formats/ggml32.cuh"

#define ISQ_GGML32_FORMATS(X) X(Q4_0)
