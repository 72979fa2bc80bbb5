// The driver of quantizers with error feedback. isqtorch/quantizers/feedback.py explains the method; the bytes are the
// same.
//
// For every weight, the driver needs the sum of the row's errors so far, times a column of the factor. Nearly all the
// time goes into these sums. They are a product of matrices, errors [rows, k] by factor [k, k], of which a part can be
// computed only after the codes of another part are chosen. So the columns are taken in slabs: first the sums of a slab
// over all columns before it, then block by block those over the slab's own columns, and inside a block column by
// column.
//
// A thread takes a panel of rows at a time. Rows lie in the lanes: a panel consists of strips of kStripRows rows, and
// errors and sums of a strip are [column][row of the strip]. Every sum is added in the order of columns, one rounding
// for the product and one for the sum. So the result does not depend on threads, panels or ISA level.
#pragma once

#include "cpu/quantize/blockwise.h"

namespace isqtorch::ISQ_ISA {

#if ISQ_VECTOR_FLOATS == 16 || defined(__aarch64__)  // 32 registers
constexpr int kStripUnits = 4;
#else
constexpr int kStripUnits = 2;
#endif
constexpr int kStripRows = kStripUnits * kWidth;
constexpr int kTileColumns = 4;    // with kStripUnits, as many sums as fit into registers
constexpr int kTileDepth = 64;     // earlier columns at a time: errors of a strip stay in the first-level cache
constexpr int kSlabColumns = 256;  // a multiple of every block
constexpr int kRowsAtOnce = 256;   // sums of a slab, and a tile of the factor, stay in the second-level cache
constexpr int kTileStride = kSlabColumns + 16;  // no power of two, which would put all rows into one set of a cache
static_assert(kRowsAtOnce % kStripRows == 0);

// The state of a thread: errors and sums of a panel of rows.
struct FeedbackPanel {
  const FeedbackJob& job;
  const int64_t most_strips;
  int64_t first_row = 0, strips = 0;
  LaneFloats *errors, *sums;  // [strip][column][kStripUnits]: of all columns, and of a slab
  float* tile;                // of the factor: [kTileDepth][kTileStride]

  FeedbackPanel(const FeedbackJob& j, int64_t most)
      : job(j),
        most_strips(most),
        errors(new LaneFloats[most * j.k * kStripUnits]),
        sums(new LaneFloats[most * kSlabColumns * kStripUnits]),
        tile(new float[kTileStride * kTileDepth]) {}
  ~FeedbackPanel() {
    delete[] errors;
    delete[] sums;
    delete[] tile;
  }
  FeedbackPanel(const FeedbackPanel&) = delete;
  FeedbackPanel& operator=(const FeedbackPanel&) = delete;

  LaneFloats* errors_of(int64_t strip, int64_t column) const { return errors + (strip * job.k + column) * kStripUnits; }
  LaneFloats* sums_of(int64_t strip, int64_t column) const {
    return sums + (strip * kSlabColumns + column % kSlabColumns) * kStripUnits;
  }
  // The part of the factor's row `from` that begins at column `to`.
  const float* factor(int64_t from, int64_t to) const { return job.factor + from * job.k + to; }

  void clear_sums() { std::memset((void*)sums, 0, strips * kSlabColumns * kStripUnits * sizeof(LaneFloats)); }

  // Adds to the sums of columns [to, to + count) the errors of columns [from, until).
  __attribute__((noinline)) void carry(int64_t from, int64_t until, int64_t to, int64_t count) {
    for (int64_t begin = from; begin < until; begin += kTileDepth) {
      const int64_t depth = until - begin < kTileDepth ? until - begin : kTileDepth;
      for (int64_t k = 0; k < depth; ++k) {
        std::memcpy(tile + k * kTileStride, factor(begin + k, to), count * sizeof(float));
      }
      for (int64_t strip = 0; strip < strips; ++strip) {
        for (int64_t c = 0; c < count; c += kTileColumns) {
          add_products(errors_of(strip, begin), tile + c, depth, sums_of(strip, to + c));
        }
      }
    }
  }

  // sums[c][u] += errors[k][u] * factor[k][c], for k < depth in this order. `factor` is a part of the tile.
  static void add_products(const LaneFloats* errors, const float* factor, int64_t depth, LaneFloats* sums) {
    LaneFloats held[kTileColumns][kStripUnits];
#pragma GCC unroll 4
    for (int c = 0; c < kTileColumns; ++c) {
#pragma GCC unroll 4
      for (int u = 0; u < kStripUnits; ++u) held[c][u] = sums[c * kStripUnits + u];
    }
    for (int64_t k = 0; k < depth; ++k) {
      LaneFloats error[kStripUnits];
#pragma GCC unroll 4
      for (int u = 0; u < kStripUnits; ++u) error[u] = errors[k * kStripUnits + u];
#pragma GCC unroll 4
      for (int c = 0; c < kTileColumns; ++c) {
        const LaneFloats weight = splat<LaneFloats>(factor[k * kTileStride + c]);
#pragma GCC unroll 4
        for (int u = 0; u < kStripUnits; ++u) held[c][u] += error[u] * weight;
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < kTileColumns; ++c) {
#pragma GCC unroll 4
      for (int u = 0; u < kStripUnits; ++u) sums[c * kStripUnits + u] = held[c][u];
    }
  }
};

// The number of the level that is nearest to the target, the first of two that are equally near. `turned` lanes have
// their levels in descending order.
template <class Format>
ISQ_INLINE LaneInts nearest_code(const typename Format::Chosen& chosen, int i, LaneFloats target, LaneInts turned) {
  constexpr int kLevels = Format::kLastRank - Format::kFirstRank + 1;
  const LaneInts sign = turned & (int32_t)0x80000000;
  const auto level = [&](LaneInts number) {
    const LaneFloats value = chosen.value(i, Format::code_of(number + Format::kFirstRank));
    return as_float(as_int(value) ^ sign);
  };
  target = as_float(as_int(target) ^ sign);
  constexpr auto kFirstStep = [](int levels) {
    int step = 1;
    while (2 * step <= levels) step *= 2;
    return step;
  };
  LaneInts below = splat<LaneInts>(0);  // how many levels are below the target
  for (int step = kFirstStep(kLevels); step; step /= 2) {
    const LaneInts next = below + step;
    const LaneInts within = next <= kLevels;
    const LaneInts last = select(within, next, kLevels) - 1;
    below = select(within & (level(last) < target), next, below);
  }
  const LaneInts low = select(below > 0, below - 1, 0), high = select(below < kLevels, below, kLevels - 1);
  const LaneInts down = abs(target - level(low)) <= abs(level(high) - target);
  return Format::code_of(select(down, low, high) + Format::kFirstRank);
}

// A block of every row of a strip.
template <class Format>
struct FeedbackStrip {
  static constexpr int kBlock = Format::kBlock;
  LaneBlocks<kBlock> lanes;
  LaneFloats w[kStripUnits][kBlock], x[kStripUnits][kBlock];  // the weights, and those that the quantizer sees
  typename Format::Chosen chosen[kStripUnits];
  LaneFloats change[kBlock][kStripUnits];
  LaneInts changed[kStripUnits];  // lanes with codes that are not the quantizer's

  // Loads the weights, and lets the quantizer choose scales and codes. It sees the weights that would make up for all
  // errors before the block if they could be stored exactly. The change of a column is carried to those behind it, as
  // its errors are.
  void begin(const FeedbackPanel& panel, int64_t strip, int64_t column, const float* mean_square,
             QuantizeResult* result) {
    const FeedbackJob& job = panel.job;
    std::memcpy((void*)change, panel.sums_of(strip, column), sizeof change);
    for (int i = 0; i < kBlock; ++i) {
      LaneFloats here[kStripUnits];
      std::memcpy((void*)here, change[i], sizeof here);
      const float* factor = panel.factor(column + i, column);
      for (int j = i + 1; j < kBlock; ++j) {
        const LaneFloats weight = splat<LaneFloats>(factor[j]);
        for (int u = 0; u < kStripUnits; ++u) change[j][u] -= here[u] * weight;
      }
    }
    if (lanes.weighted) {
      for (int i = 0; i < kBlock; ++i) lanes.importance[i] = splat<LaneFloats>(job.importance[column + i]);
    }
    for (int u = 0; u < kStripUnits; ++u) {
      const int64_t first = panel.first_row + strip * kStripRows + u * kWidth;
      alignas(64) float rows[kWidth * kBlock];
      for (int l = 0; l < kWidth; ++l) {
        float* row = rows + l * kBlock;
        if (first + l < job.rows) {
          load_floats(weight_at(job, (first + l) * job.k + column), job.dtype, kBlock, row);
        } else {
          std::memset(row, 0, kBlock * sizeof(float));
        }
        if (mean_square) lanes.row_mean_square[l] = first + l < job.rows ? mean_square[first + l] : 0;
      }
      for (int i = 0; i < kBlock; i += kWidth) load_turned(rows + i, kBlock, w[u] + i);
      lanes.largest = splat<LaneFloats>(0.0f);
      LaneInts finite = splat<LaneInts>(-1);
      for (int i = 0; i < kBlock; ++i) {
        lanes.x[i] = x[u][i] = w[u][i] - change[i][u];
        lanes.largest = max(abs(lanes.x[i]), lanes.largest);
        finite &= abs(lanes.x[i]) <= FLT_MAX;
      }
      choose<Format>(lanes, &chosen[u]);
      changed[u] = splat<LaneInts>(0);
      LaneInts overflow = chosen[u].overflow();
      if (Format::kF16Scales) overflow |= lanes.largest > kLargestWithF16Scales;
      report(overflow & finite, first, column, job, &result->overflow_at);
    }
  }

  // Chooses the codes of all columns, one column after the other.
  __attribute__((noinline)) void round(FeedbackPanel& panel, int64_t strip, int64_t column, QuantizeResult* result) {
    const FeedbackJob& job = panel.job;
    LaneFloats* const sums = panel.sums_of(strip, column);
    LaneInts lost[kStripUnits] = {};
    for (int i = 0; i < kBlock; ++i) {
      LaneFloats errors[kStripUnits];
      for (int u = 0; u < kStripUnits; ++u) {
        typename Format::Chosen& unit = chosen[u];
        const LaneFloats first = unit.value(i, Format::code_of(splat<LaneInts>(Format::kFirstRank)));
        const LaneFloats last = unit.value(i, Format::code_of(splat<LaneInts>(Format::kLastRank)));
        const LaneFloats target = w[u][i] - sums[i * kStripUnits + u];
        lost[u] |= ~(abs(target) <= FLT_MAX);
        // The quantizer's code stands for the weight that it saw, and where all codes mean the same.
        const LaneInts keep = (target == x[u][i]) | (first == last);
        const LaneInts code = select(keep, unit.codes[i], nearest_code<Format>(unit, i, target, last < first));
        changed[u] |= code != unit.codes[i];
        unit.codes[i] = code;
        errors[u] = unit.value(i, code) - w[u][i];
      }
      std::memcpy((void*)panel.errors_of(strip, column + i), errors, sizeof errors);
      const float* factor = panel.factor(column + i, column);
      for (int j = i + 1; j < kBlock; ++j) {
        const LaneFloats weight = splat<LaneFloats>(factor[j]);
        for (int u = 0; u < kStripUnits; ++u) sums[j * kStripUnits + u] += errors[u] * weight;
      }
    }
    for (int u = 0; u < kStripUnits; ++u) {
      const int64_t row = panel.first_row + strip * kStripRows + u * kWidth;
      report(lost[u], row, column, job, &result->carried_at);
    }
  }

  void end(const FeedbackPanel& panel, int64_t strip, int64_t column) {
    using Block = typename Format::Block;
    const FeedbackJob& job = panel.job;
    for (int u = 0; u < kStripUnits; ++u) {
      Block packed[kWidth];
      Format::codes_changed(changed[u], &chosen[u]);
      store<Format>(chosen[u], packed);
      const int64_t first = panel.first_row + strip * kStripRows + u * kWidth;
      for (int l = 0; l < kWidth && first + l < job.rows; ++l) {
        const int64_t block = (first + l) * (job.k / kBlock) + column / kBlock;
        std::memcpy(job.out + block * sizeof(Block), packed + l, sizeof(Block));
      }
    }
  }

 private:
  // Notes the first of the rows from `first` on whose lane is set.
  static void report(LaneInts lanes, int64_t first, int64_t column, const FeedbackJob& job, int64_t* at) {
    if (!any(lanes)) return;
    for (int l = 0; l < kWidth && first + l < job.rows; ++l) {
      if (lanes[l]) lower_to(at, (first + l) * job.k + column);
    }
  }
};

// The index of the first weight that is not finite.
inline int64_t first_bad_weight(const FeedbackJob& job) {
  int64_t bad = QuantizeResult::kNone;
  for_range(job, job.rows, 1 + (1 << 16) / job.k, [&](int64_t begin, int64_t end) {
    float w[32];
    for (int64_t at = begin * job.k; at < end * job.k; at += 32) {
      load_floats(weight_at(job, at), job.dtype, 32, w);
      int32_t special = 0;
      for (int i = 0; i < 32; ++i) special |= (int32_t)(float_bits(w[i]) & 0x7fffffff) >= kInfinityBits;
      if (!special) continue;
      int i = 0;
      while ((int32_t)(float_bits(w[i]) & 0x7fffffff) < kInfinityBits) ++i;
      lower_to(&bad, at + i);
      break;
    }
  });
  return bad;
}

template <class Format>
QuantizeResult quantize_feedback(const FeedbackJob& job) {
  constexpr int kBlock = Format::kBlock;
  static_assert(kSlabColumns % kBlock == 0);
  QuantizeResult result;
  result.bad_weight = first_bad_weight(job);
  if (result.bad_weight != QuantizeResult::kNone || job.rows == 0) return result;
  const bool weighted = Format::kTakesImportance || job.rule == Rule::kSearch;
  const bool needs_rows = Format::kNeedsRowMeanSquare && weighted;
  const int steps = Format::count_steps(job);

  const int64_t all_strips = (job.rows + kStripRows - 1) / kStripRows;
  int64_t strips = (all_strips + job.threads - 1) / job.threads;
  if (strips > kRowsAtOnce / kStripRows) strips = kRowsAtOnce / kStripRows;
  const int64_t panels = (all_strips + strips - 1) / strips, workers = panels < job.threads ? panels : job.threads;

  struct Memory {
    float* mean_square = nullptr;
    FeedbackPanel** panels;
    FeedbackStrip<Format>* strips;
    int64_t workers;
    ~Memory() {
      delete[] mean_square;
      for (int64_t i = 0; i < workers; ++i) delete panels[i];
      delete[] panels;
      delete[] strips;
    }
  } memory{nullptr, new FeedbackPanel* [workers] {}, nullptr, workers};
  memory.strips = new FeedbackStrip<Format>[workers];
  for (int64_t i = 0; i < workers; ++i) memory.panels[i] = new FeedbackPanel(job, strips);
  if (needs_rows) {
    memory.mean_square = new float[job.rows];
    row_mean_squares(job, memory.mean_square);
  }

  int64_t next = 0;  // panel; a thread that is done takes the next one
  for_range(job, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      FeedbackPanel& panel = *memory.panels[worker];
      FeedbackStrip<Format>& strip = memory.strips[worker];
      strip.lanes.weighted = weighted;
      strip.lanes.rule = job.rule;
      strip.lanes.steps = steps;
      for (;;) {
        const int64_t number = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (number >= panels) break;
        panel.first_row = number * strips * kStripRows;
        panel.strips = all_strips - number * strips < strips ? all_strips - number * strips : strips;
        for (int64_t slab = 0; slab < job.k; slab += kSlabColumns) {
          const int64_t next_slab = job.k - slab < kSlabColumns ? job.k : slab + kSlabColumns;
          panel.clear_sums();
          panel.carry(0, slab, slab, next_slab - slab);
          for (int64_t column = slab; column < next_slab; column += kBlock) {
            panel.carry(slab, column, column, kBlock);
            for (int64_t s = 0; s < panel.strips; ++s) {
              strip.begin(panel, s, column, memory.mean_square, &result);
              strip.round(panel, s, column, &result);
              strip.end(panel, s, column);
            }
          }
        }
      }
    }
  });
  return result;
}

}  // namespace isqtorch::ISQ_ISA
