// The border between the operators and the kernels: plain structs and functions, no torch and no CUDA syntax, so that
// nvcc never sees torch's headers and the tests' emulator compiles both sides.
#pragma once

#include <cstdint>
#include <string>

#include "dtype.h"
#include "rule.h"

namespace isqtorch::cuda {

using Stream = void*;  // a cudaStream_t

// The block of a format, for kernels that serve a whole family and get it at run time.
enum class Header : int { kNone, kScaleBiasBf16, kScaleBiasF16, kScaleZeroF16 };
struct Shape {
  int block, block_bytes;  // weights and bytes of a block
  Header header;           // of a BitStream's block
};

// Rows of a packed weight as floats: all of them, or those that ids name.
struct DecodeJob {
  const uint8_t* weight;  // [rows, k / block * block_bytes]
  int64_t rows, k;
  Dtype dtype;      // of out
  void* out;        // [rows, k], or [count, k]
  const void* ids;  // int32 or int64 [count], each below rows; null: every row (even if count is 0)
  bool wide_ids;    // int64
  int64_t count;    // of ids
};

// y = x w^T + bias for a few or many rows of x.
struct LinearJob {
  const void* x;  // [m, k] of dtype, 16-byte aligned
  const uint8_t* weight;
  const void* bias;  // [n] of dtype, or null
  void* y;           // [m, n] of dtype
  Dtype dtype;
  int64_t m, n, k;
  void* workspace;  // linear_workspace(job) bytes, 16-byte aligned
};

// Row (t, s) of y = x[t] (or x[t, s]) w[ids[t, s]]^T + bias[ids[t, s]]; zeros where ids[t, s] == experts.
struct ExpertsJob {
  const void* x;  // [tokens, k], or [tokens, slots, k] if rows_per_slot
  bool rows_per_slot;
  const uint8_t* weight;  // [experts, n, row_bytes]
  const void* bias;       // [experts, n], or null
  const void* ids;        // int32 or int64 [tokens, slots]
  bool wide_ids;
  void* y;  // [tokens, slots, n]
  Dtype dtype;
  int64_t tokens, slots, experts, n, k;
  void* workspace;  // experts_workspace_bytes(job)
};

// One matrix to quantize. Faults come back in device memory: [0] the first weight that is NaN or infinite, [1] the
// first weight of the first block whose 16-bit scale overflows; untouched where there is none.
struct QuantizeJob {
  const void* w;  // [rows, k] of dtype
  Dtype dtype;
  int64_t rows, k;
  const float* importance;  // [k], or null
  Rule rule;                // one of the format's
  uint8_t* out;
  int64_t* faults;  // [2], preset to INT64_MAX
  void* workspace;  // quantize_workspace bytes
};

// A format, as the operators see it.
struct FormatKernels {
  const char* name;
  Shape shape;
  int align;      // of every block's address
  uint8_t rules;  // a bit for each rule that the operator takes besides the default
  void (*decode)(const DecodeJob&, const Shape&, Stream);
  int64_t few_rows;   // rows of x that cost `linear` no more than one row
  int64_t max_rows;   // for more rows of x, decoding and torch's product are faster
  int64_t w8a8_rows;  // for more rows of x, `linear_w8a8` rounds x to FP8
  int64_t (*linear_workspace)(const LinearJob&, const Shape&);
  void (*linear)(const LinearJob&, const Shape&, Stream);
  int64_t (*experts_workspace)(const ExpertsJob&, const Shape&);
  void (*experts)(const ExpertsJob&, const Shape&, Stream);
  int64_t (*quantize_workspace)(const QuantizeJob&, const Shape&);
  void (*quantize)(const QuantizeJob&, const Shape&, Stream);
};

// By canonical name; null if there is none.
const FormatKernels* find_format(const std::string& name);
int format_count();
const FormatKernels& format_at(int index);

}  // namespace isqtorch::cuda
