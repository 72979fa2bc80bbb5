// What a CPU instruction-set level offers: for every format one decoder and one quantizer, and the dot products over
// decoded rows. Kernels see raw pointers and sizes; tensors, checks and errors are ops_cpu.cpp's business.
#pragma once

#include <cstdint>

namespace isqtorch {

enum class Dtype : uint8_t { kF32, kF16, kBf16 };

// Which of several ways to choose the codes; only the affine family has more than one.
enum class Rule : uint8_t { kDefault, kMlx };

// A loop body over [begin, end), and whoever spreads it over threads.
struct RangeFn {
  const void* context;
  void (*call)(const void* context, int64_t begin, int64_t end);
};
using ParallelFor = void (*)(int64_t count, int64_t grain, RangeFn body);

// Nothing went wrong, or the flat index of the first weight that no block can hold.
struct QuantizeResult {
  static constexpr int64_t kNone = INT64_MAX;
  int64_t bad_weight = kNone;   // a NaN or an infinity
  int64_t overflow_at = kNone;  // a finite weight in a block whose 16-bit scale would be infinite
};

// One matrix to quantize.
struct QuantizeJob {
  const void* w;  // [rows, k] of dtype, contiguous
  Dtype dtype;
  int64_t rows, k;
  const float* importance;  // [k], or null
  Rule rule;
  uint8_t* out;  // [rows, k / block * block_bytes]
  ParallelFor parallel_for;
};

struct FormatKernels {
  const char* name;
  int block;
  int block_bytes;
  bool has_rules;
  void (*decode)(const uint8_t* blocks, int64_t count, float* w);  // w [count * block]
  QuantizeResult (*quantize)(const QuantizeJob& job);
};

struct KernelTable {
  const char* isa;
  const FormatKernels* formats;
  int format_count;
  // y[m] += sum_k w[k] * x[m * ldx + k] for m < rows <= kMaxDotRows
  void (*dot)(const float* w, const float* x, int64_t ldx, int rows, int64_t k, float* y);
  void (*load)(const void* from, Dtype dtype, int64_t count, float* to);   // convert to f32
  void (*store)(const float* from, int64_t count, Dtype dtype, void* to);  // convert from f32, to nearest even
};

constexpr int kMaxDotRows = 8;

// One function per ISA level, each in its own file under isa/.
namespace baseline {
const KernelTable& kernel_table();
}
namespace avx2 {
const KernelTable& kernel_table();
}
namespace avx512 {
const KernelTable& kernel_table();
}

}  // namespace isqtorch
