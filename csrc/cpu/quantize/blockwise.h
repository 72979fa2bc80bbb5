// The driver of the quantizers that work block by block. It loads as many blocks as a vector has lanes (a unit), lets
// the format choose their codes, and stores the result. Blocks are numbered through the whole matrix, so a unit may
// span rows. The result does not depend on how threads share the units.
//
// A format has a type Block, as it is stored, and a type Chosen, which holds the scales and codes of a unit:
//
//   choose(in, out)       chooses them
//   store(chosen, out)    packs them
//   Chosen::overflow()    lanes whose 16-bit scale is not finite
//   Chosen::value(i, c)   what code c of element i stands for, as decode computes it
//   kLastRank             see BlockwiseFormat
#pragma once

#include "cpu/convert.h"
#include "cpu/fp_env.h"
#include "cpu/quantize/transpose.h"

namespace isqtorch::ISQ_ISA {

// A unit of blocks: x[i][l] is element i of block l.
template <int kBlock>
struct LaneBlocks {
  LaneFloats x[kBlock];
  LaneFloats largest;             // magnitude per block
  LaneFloats importance[kBlock];  // of the elements' columns; unset if the job has none
  LaneFloats row_mean_square;     // of the row of each block, if kNeedsRowMeanSquare
  bool weighted;
  Rule rule;
  int steps;  // of HQQ's solver, where that does not have the whole matrix before it
};

// Defaults for the properties of a format.
struct BlockwiseFormat {
  static constexpr bool kNeedsRowMeanSquare = false;
  static constexpr uint8_t kRules = 0;
  static constexpr bool kF16Scales = true;

  // The codes in the order of what they stand for: code_of(kFirstRank .. kLastRank), and the other way round.
  static constexpr int kFirstRank = 0;
  static LaneInts code_of(LaneInts rank) { return rank; }
  static LaneInts rank_of(LaneInts code) { return code; }

  // Adapts what else depends on codes, after those of some lanes have been replaced.
  template <class Chosen>
  static void codes_changed(LaneInts, Chosen*) {}

  static int count_steps(const QuantizeJob&) { return 0; }
};

// Larger than any weight that a format with f16 scales can hold: the largest such weight is 65504 * 128 * 32, f16 times
// an 8-bit scale times a 6-bit code. Beyond this the searches' own sums overflow and may give a scale that is finite
// but wrong.
constexpr float kLargestWithF16Scales = 0x1p30f;

constexpr int32_t kInfinityBits = 0x7f800000;

template <class Body>
void for_range(const QuantizeJob& job, int64_t count, int64_t grain, const Body& body) {
  job.parallel_for(count, grain, {&body, [](const void* context, int64_t begin, int64_t end) {
                                    const IeeeScope ieee;
                                    (*static_cast<const Body*>(context))(begin, end);
                                  }});
}

ISQ_INLINE void lower_to(int64_t* target, int64_t value) {
  int64_t seen = __atomic_load_n(target, __ATOMIC_RELAXED);
  while (value < seen && !__atomic_compare_exchange_n(target, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

ISQ_INLINE const uint8_t* weight_at(const QuantizeJob& job, int64_t index) {
  return static_cast<const uint8_t*>(job.w) + index * (job.dtype == Dtype::kF32 ? 4 : 2);
}

// The next kWidth elements of kWidth rows, one row per lane.
ISQ_INLINE void load_turned(const float* rows, int64_t stride, LaneFloats* x) {
  for (int l = 0; l < kWidth; ++l) std::memcpy(&x[l], rows + l * stride, sizeof x[l]);
  transpose(x);
}

// mean_square[r] = sum of x^2 over row r, in the order of its elements, / k. One row per lane.
inline void row_mean_squares(const QuantizeJob& job, float* mean_square) {
  const int64_t units = (job.rows + kWidth - 1) / kWidth;
  for_range(job, units, 1 + (1 << 15) / (kWidth * job.k), [&](int64_t begin, int64_t end) {
    float w[kWidth][32] = {};
    for (int64_t first = kWidth * begin; first < kWidth * end && first < job.rows; first += kWidth) {
      const int64_t left = job.rows - first, count = left < kWidth ? left : kWidth;
      LaneFloats sum = splat<LaneFloats>(0.0f);
      for (int64_t k = 0; k < job.k; k += 32) {
        for (int l = 0; l < count; ++l) load_floats(weight_at(job, (first + l) * job.k + k), job.dtype, 32, w[l]);
        for (int i = 0; i < 32; i += kWidth) {
          LaneFloats x[kWidth];
          load_turned(&w[0][i], 32, x);
          for (int n = 0; n < kWidth; ++n) sum += x[n] * x[n];
        }
      }
      sum /= (float)job.k;
      std::memcpy(mean_square + first, &sum, count * sizeof(float));
    }
  });
}

// Fills the lanes from block `first` on. Lanes past the last block get zeros.
template <int kBlock>
ISQ_NOINLINE void load_blocks(const QuantizeJob& job, int64_t first, int64_t count, LaneBlocks<kBlock>& lanes,
                              int64_t* bad_weight) {
  alignas(64) float w[kWidth * kBlock];
  load_floats(weight_at(job, first * kBlock), job.dtype, count * kBlock, w);
  std::memset(w + count * kBlock, 0, (kWidth - count) * kBlock * sizeof(float));
  LaneInts largest = splat<LaneInts>(0);  // bits are ordered like the numbers, with NaN last
  for (int i = 0; i < kBlock; i += kWidth) {
    load_turned(w + i, kBlock, lanes.x + i);
    for (int k = 0; k < kWidth; ++k) largest = max(largest, as_int(abs(lanes.x[i + k])));
  }
  lanes.largest = as_float(largest);
  if (any(largest >= kInfinityBits)) {
    int64_t i = 0;
    while ((float_bits(w[i]) & 0x7fffffff) < kInfinityBits) ++i;
    lower_to(bad_weight, first * kBlock + i);
  }
  if (!lanes.weighted) return;
  const int64_t blocks_per_row = job.k / kBlock;
  for (int l = 0; l < count; ++l) {
    std::memcpy(w + l * kBlock, job.importance + (first + l) % blocks_per_row * kBlock, kBlock * sizeof(float));
  }
  for (int i = 0; i < kBlock; i += kWidth) load_turned(w + i, kBlock, lanes.importance + i);
}

// Not inlined, because more than one driver calls them.
template <class Format>
ISQ_NOINLINE void choose(const LaneBlocks<Format::kBlock>& in, typename Format::Chosen* out) {
  Format::choose(in, out);
}
template <class Format>
ISQ_NOINLINE void store(const typename Format::Chosen& chosen, typename Format::Block* out) {
  Format::store(chosen, out);
}

template <class Format>
QuantizeResult quantize_feedback(const FeedbackJob& job);  // feedback.h

template <class Format>
QuantizeResult quantize_blockwise(const QuantizeJob& job) {
  constexpr int kBlock = Format::kBlock;
  using Block = typename Format::Block;
  const int64_t blocks_per_row = job.k / kBlock, blocks = job.rows * blocks_per_row;
  const bool weighted = job.importance && (Format::kTakesImportance || job.rule == Rule::kSearch);
  const bool needs_rows = Format::kNeedsRowMeanSquare && weighted;
  float* mean_square = needs_rows ? new float[job.rows] : nullptr;
  if (needs_rows) row_mean_squares(job, mean_square);

  QuantizeResult result;
  const int64_t units = (blocks + kWidth - 1) / kWidth;
  for_range(job, units, 1 + (1 << 12) / (kWidth * kBlock), [&](int64_t begin, int64_t end) {
    LaneBlocks<kBlock> lanes;
    typename Format::Chosen chosen;
    lanes.weighted = weighted;
    lanes.rule = job.rule;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit * kWidth, left = blocks - first, count = left < kWidth ? left : kWidth;
      load_blocks(job, first, count, lanes, &result.bad_weight);
      if (needs_rows) {
        for (int l = 0; l < kWidth; ++l)
          lanes.row_mean_square[l] = l < count ? mean_square[(first + l) / blocks_per_row] : 0;
      }
      choose<Format>(lanes, &chosen);
      Block packed[kWidth];
      store<Format>(chosen, packed);
      LaneInts overflow = chosen.overflow();
      if (Format::kF16Scales) overflow |= lanes.largest > kLargestWithF16Scales;
      for (int l = 0; l < count; ++l) {
        if (overflow[l]) lower_to(&result.overflow_at, (first + l) * kBlock);
      }
      std::memcpy(job.out + first * sizeof(Block), packed, count * sizeof(Block));
    }
  });
  delete[] mean_square;
  return result;
}

template <class Format>
void decode_blocks(const uint8_t* bytes, int64_t count, float* w) {
  const IeeeScope ieee;  // the scales of mxfp4 and q8k may be subnormal
  using Block = typename Format::Block;
  const Block* blocks = reinterpret_cast<const Block*>(bytes);
  for (int64_t b = 0; b < count; ++b) Format::decode(blocks[b], w + b * Format::kBlock);
}

// A format's entry in the kernel table. Formats that do not work block by block specialize this.
template <class Format>
struct KernelsOf {
  static constexpr FormatKernels get(const char* name) {
    return {name,
            Format::kBlock,
            sizeof(typename Format::Block),
            Format::kRules,
            decode_blocks<Format>,
            quantize_blockwise<Format>,
            quantize_feedback<Format>};
  }
};

}  // namespace isqtorch::ISQ_ISA
