// The border between the operators and the kernels of a CPU instruction-set level: plain structs and function pointers.
// A level has a table of formats, each with a decoder and a quantizer, and up to three tables of kernels for `linear`:
// for few, some and many rows of x (linear_choice.h says which runs). Kernels see raw pointers and sizes; tensors,
// checks and errors belong to the ops_*.cpp files.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "rule.h"

namespace isqtorch {

// A loop body over [begin, end), and the function that runs it on several threads.
struct RangeFn {
  const void* context;
  void (*call)(const void* context, int64_t begin, int64_t end);
};
using ParallelFor = void (*)(int64_t count, int64_t grain, RangeFn body);

// The flat index of the first weight that cannot be quantized; kNone if there is none.
struct QuantizeResult {
  static constexpr int64_t kNone = INT64_MAX;
  int64_t bad_weight = kNone;   // a NaN or an infinity
  int64_t overflow_at = kNone;  // a finite weight in a block whose 16-bit scale would be infinite
  int64_t carried_at = kNone;   // a block with a weight to which more errors are carried than f32 can hold
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

// The same with error feedback.
struct FeedbackJob : QuantizeJob {
  const float* factor;  // [k, k], upper triangular: V above the diagonal, d on it
  int64_t threads;
};

struct FormatKernels {
  const char* name;
  int block;
  int block_bytes;
  uint8_t rules;                                                   // a bit for each rule besides the default
  void (*decode)(const uint8_t* blocks, int64_t count, float* w);  // w [count * block]
  QuantizeResult (*quantize)(const QuantizeJob& job);
  QuantizeResult (*quantize_feedback)(const FeedbackJob& job);
};

// ---- `linear` for few rows of x: cpu/linear/rows.h ------------------------------------------------------------------

// Where the parts of a unit of 512 weights lie, for formats whose group size or header is known only at run time.
enum class UnitHeader : uint8_t { kScaleBiasBf16, kScaleBiasF16, kScaleZeroF16 };
struct UnitLayout {
  int32_t unit_bytes;
  UnitHeader header;
  int32_t codes_at[16], header_at[16];  // [l]: of the 32 weights whose sum lane l has
  int32_t words_at[16];                 // [w]: word w % 4 of the codes of lane w / 4 * 4, relative to lane 0
};
constexpr int kMaxUnitBytes = 640;

struct RowsJob {
  const uint8_t* w;  // packed rows, row_bytes apart
  int64_t row_bytes, rows, k;
  bool w_ends;    // memory may end with the last row
  const void* x;  // packed activations of the rows of x, one after the other
  float* y;       // y[m * ldy + row]
  int64_t ldy;
  UnitLayout layout;
};

constexpr int kMaxTokens = 8;
constexpr int kRowSlots[] = {1, 2, 3, 4, 6, 8};  // numbers of rows of x for which there are row kernels
constexpr int kRowSteps = sizeof kRowSlots / sizeof *kRowSlots;

struct RowKernels {
  const char* name;
  int up_to;  // rows of x; for more rows panel kernels are faster, if there are any
  UnitLayout layout;
  int64_t (*packed_bytes)(int64_t k);                     // of one row of x
  void (*pack)(const float* x, int64_t k, void* packed);  // one row of x; both 64-byte aligned
  // Copies a packed row of x to row `token` of the `tokens` rows (one of kRowSlots, not 1) that a kernel takes.
  void (*place)(const void* packed, int64_t k, int tokens, int token, void* together);
  void (*multiply[kRowSteps])(const RowsJob& job);  // for kRowSlots[..] rows of x
};

// ---- `linear` for some rows of x, with AMX tiles: cpu/linear/int8_tiles.h -------------------------------------------

constexpr int kPairedTokens = 8, kTileTokens = 16, kMaxTileTokens = 64;

struct TilesJob {
  const uint8_t* w;  // packed rows, row_bytes apart
  int64_t row_bytes, rows, k;
  bool w_ends;    // memory may end with the last row
  const void* x;  // packed groups of tokens, one after the other
  int64_t tokens;
  float* y;  // y[t * ldy + row], with room for a multiple of kTileTokens rows
  int64_t ldy;
  UnitLayout layout;
};

struct TileKernels {
  const char* name;
  int from, up_to;  // rows of x; row kernels take fewer, panel kernels more
  UnitLayout layout;
  int64_t (*packed_bytes)(int64_t k);  // of kTileTokens rows of x
  // [0] is for at most kPairedTokens rows of x, [1] for up to kMaxTileTokens. Rows of x are packed kTileTokens at a
  // time.
  void (*pack[2])(const float* x, int tokens, int64_t k, void* packed);
  void (*multiply[2])(const TilesJob& job);
};

// ---- `linear` for many rows of x: cpu/linear/int8_panels.h, cpu/linear/amx_panels.h ---------------------------------

// Decodes part of some weight rows into a panel, in the form and order that the product needs.
struct DecodeJob {
  const uint8_t* w;  // packed rows, row_bytes apart
  int64_t row_bytes, rows, k;
  bool w_ends;
  int64_t k_begin, k_end;  // multiples of kPanelStep, or the end
  void* panel;
  UnitLayout layout;
};
// sums (+)= panel * x, over the panel's part of k.
struct ProductJob {
  const void* panel;
  int64_t rows, k, k_begin, k_end;
  const void* x;  // packed groups of tokens, one after the other
  int64_t tokens;
  float* sums;  // [tokens, rows] in the kernel's own order, both rounded up to whole blocks
  bool first;   // set the sums instead of adding to them
};

constexpr int64_t kPanelStep = 512;

struct PanelKernels {
  const char* name;
  int row_block, token_block;  // the kernels work on whole blocks of this many
  int panel_rows;              // that fit into the caches beside 1024 columns of 512 rows of x
  int64_t (*panel_bytes)(int64_t rows, int64_t weights);              // rows: a multiple of row_block
  int64_t (*packed_bytes)(int64_t k);                                 // of token_block rows of x
  void (*pack)(const float* x, int tokens, int64_t k, void* packed);  // up to token_block rows of x
  UnitLayout layout;
  void (*decode)(const DecodeJob& job);
  void (*multiply)(const ProductJob& job);
  // Writes the kernel's sums to y[t * ldy + r]; rows and tokens as in the ProductJob.
  void (*unpack)(const float* sums, int64_t rows, int64_t tokens, float* y, int64_t ldy);
};

// ---- attention over packed keys and values: cpu/attention/attend.h
// ---------------------------------------------------

constexpr int64_t kAttendTile = 64;  // tokens whose scores are in memory at a time

enum class AttendRead : uint8_t { kQ8_0, kQ4_0, kDecoded };  // kDecoded: any format, through its decoder

// The packed keys, or values, of some tokens.
struct AttendSide {
  const uint8_t* rows;     // one after the other
  int64_t row_bytes, dim;  // dim: numbers of a row, a multiple of 32
  AttendRead read;
  int block_bytes;
  void (*decode)(const uint8_t* blocks, int64_t count, float* to);
};

struct AttendJob {
  AttendSide keys, values;
  int64_t tokens;
  int queries;
  const float* q;            // [queries, keys.dim] with the scale of the scores; zeros up to the next power of two
  const float* const* mask;  // of each query, [tokens] to add to its scores; or null
  float* buffer;             // [kAttendTile, the larger dim]
  // Results, with room for a power of two of queries: the weighted sums [queries, values.dim], which score the weights
  // are relative to, and the sum of the weights.
  float *sums, *most, *total;
};

struct AttentionKernels {
  int most_queries;  // of a job; a power of two
  void (*attend)(const AttendJob& job);
};

// ---- a level ------------------------------------------------------------------------------------------------------

struct FormatTable {
  const FormatKernels* formats;
  int count;
  void (*load)(const void* from, Dtype dtype, int64_t count, float* to);   // convert to f32
  void (*store)(const float* from, int64_t count, Dtype dtype, void* to);  // convert from f32, to nearest even
  // sums[i] += v * v over `rows` rows of `count` values, `stride` bytes apart
  void (*add_squares)(const void* from, Dtype dtype, int64_t stride, int64_t rows, int64_t count, float* sums);
  AttentionKernels attention;
};

struct StepKernels;  // cpu/steps.h

struct KernelTable {
  const char* isa;
  FormatTable formats;
  const StepKernels* steps;    // the parts of a decoding step besides products
  const RowKernels* rows;      // of the same formats, in the same order
  const TileKernels* tiles;    // likewise; the table, or the name of a format in it, is null where there is no kernel
  const PanelKernels* panels;  // likewise, as for tiles
};

// What the files in isa/ define. Decoders and quantizers gain nothing from dot-product instructions, so levels that add
// only those instructions share them.
namespace baseline {
FormatTable format_table();
const RowKernels* row_kernels();
const PanelKernels* panel_kernels();  // only on arm64
}  // namespace baseline
namespace dotprod {
const RowKernels* row_kernels();
const PanelKernels* panel_kernels();
}  // namespace dotprod
namespace i8mm {
const RowKernels* row_kernels();
const PanelKernels* panel_kernels();
}  // namespace i8mm
namespace avx2 {
FormatTable format_table();
const RowKernels* row_kernels();
const PanelKernels* panel_kernels();
}  // namespace avx2
namespace avxvnni {
const RowKernels* row_kernels();
const PanelKernels* panel_kernels();
}  // namespace avxvnni
namespace avx512 {
FormatTable format_table();
const RowKernels* row_kernels();
const PanelKernels* panel_kernels();
}  // namespace avx512
namespace avx512vnni {
const RowKernels* row_kernels();
const PanelKernels* panel_kernels();
}  // namespace avx512vnni
namespace avx512bf16 {
const RowKernels* row_kernels();
}  // namespace avx512bf16
namespace amx {
const TileKernels* tile_kernels();
const PanelKernels* panel_kernels();
}  // namespace amx

}  // namespace isqtorch
