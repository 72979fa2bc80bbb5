// The codes of a strip of rows in a slab of columns.
#pragma once

#include "cpu/quantize/feedback_panel.h"

namespace isqtorch::ISQ_ISA {

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

// Lanes whose code `nearest_code` would choose as well: it is nearer than the codes below and above it.
template <class Format>
ISQ_INLINE LaneInts is_nearest(const typename Format::Chosen& chosen, int i, LaneFloats target) {
  const LaneInts code = chosen.codes[i], rank = Format::rank_of(code);
  const LaneInts lowest = rank <= Format::kFirstRank, highest = rank >= Format::kLastRank;
  const LaneFloats off = abs(target - chosen.value(i, code));
  const LaneFloats below = chosen.value(i, Format::code_of(select(lowest, rank, rank - 1)));
  const LaneFloats above = chosen.value(i, Format::code_of(select(highest, rank, rank + 1)));
  return (Format::code_of(rank) == code) & (lowest | (off < abs(target - below))) &
         (highest | (off < abs(target - above)));
}

// The blocks of every row of a strip in a slab of columns.
template <class Format>
struct FeedbackStrip {
  static constexpr int kBlock = Format::kBlock, kBlocks = kSlabColumns / kBlock;
  using Chosen = typename Format::Chosen;
  using Strip = LaneFloats[kStripUnits];
  LaneBlocks<kBlock> lanes;
  LaneFloats w[kStripUnits][kSlabColumns];
  Strip wanted[kSlabColumns];  // what the slab should be, so that all errors before it are made up for
  Strip rest[kSlabColumns];    // what it is, minus that
  Strip x[kBlock];             // what a block should be, so that all errors before it are made up for
  Strip carried[kBlock];       // inside a block
  Chosen chosen[kBlocks][kStripUnits];
  LaneInts changed[kBlocks][kStripUnits];  // lanes with codes that are not the quantizer's

  // Loads the weights of `count` columns. The panel has the sums of what is carried to them from other slabs.
  void begin(const FeedbackPanel& panel, int64_t strip, int64_t slab, int count) {
    const FeedbackJob& job = panel.job;
    for (int u = 0; u < kStripUnits; ++u) {
      const int64_t first = row_of(panel, strip, u);
      alignas(64) float rows[kWidth * kSlabColumns];
      for (int l = 0; l < kWidth; ++l) {
        float* row = rows + l * kSlabColumns;
        if (first + l < job.rows) {
          load_floats(weight_at(job, (first + l) * job.k + slab), job.dtype, count, row);
        } else {
          std::memset(row, 0, count * sizeof(float));
        }
      }
      for (int i = 0; i < count; i += kWidth) load_turned(rows + i, kSlabColumns, w[u] + i);
    }
    make_up(panel, strip, slab, count, wanted);
  }

  // Lets the quantizer choose scales and codes of a block. It sees the weights that would make up for all errors before
  // the block if they could be stored exactly.
  void choose_scales(const FeedbackPanel& panel, int64_t strip, int64_t column, const float* mean_square,
                     QuantizeResult* result) {
    const FeedbackJob& job = panel.job;
    if (kBlock == kSlabColumns) {
      std::memcpy((void*)x, wanted, sizeof x);
    } else {
      make_up(panel, strip, column, kBlock, x);
    }
    if (lanes.weighted) {
      for (int i = 0; i < kBlock; ++i) lanes.importance[i] = splat<LaneFloats>(job.importance[column + i]);
    }
    for (int u = 0; u < kStripUnits; ++u) {
      const int64_t first = row_of(panel, strip, u);
      for (int l = 0; mean_square && l < kWidth; ++l) {
        lanes.row_mean_square[l] = first + l < job.rows ? mean_square[first + l] : 0;
      }
      lanes.largest = splat<LaneFloats>(0.0f);
      LaneInts finite = splat<LaneInts>(-1);
      for (int i = 0; i < kBlock; ++i) {
        lanes.x[i] = x[i][u];
        lanes.largest = max(abs(lanes.x[i]), lanes.largest);
        finite &= abs(lanes.x[i]) <= FLT_MAX;
      }
      Chosen& unit = chosen[block_of(column)][u];
      choose<Format>(lanes, &unit);
      changed[block_of(column)][u] = splat<LaneInts>(0);
      LaneInts overflow = unit.overflow();
      if (Format::kF16Scales) overflow |= lanes.largest > kLargestWithF16Scales;
      report(overflow & finite, first, column, job, &result->overflow_at);
    }
  }

  // Chooses the codes of all columns of a block, one column after the other.
  ISQ_NOINLINE void round(const FeedbackPanel& panel, const FeedbackPlan& plan, int64_t strip, int64_t column,
                          QuantizeResult* result) {
    std::memset((void*)carried, 0, sizeof carried);
    LaneInts lost[kStripUnits] = {};
    for (int position = 0; position < kBlock; ++position) {
      const int i = plan.order.at[column + position], at = column % kSlabColumns + i;
      Strip left, errors;
      for (int u = 0; u < kStripUnits; ++u) {
        const LaneFloats target = x[i][u] - carried[position][u];
        lost[u] |= ~(abs(target) <= FLT_MAX);
        const LaneFloats value = choose_code(column, i, u, target, x[i][u]);
        left[u] = value - x[i][u];
        rest[at][u] = value - wanted[at][u];
        errors[u] = value - w[u][at];
      }
      std::memcpy((void*)panel.errors_of(strip, column + i), errors, sizeof errors);
      const float* factor = plan.turned.at + (column + position) * kBlock;
      for (int j = position + 1; j < kBlock; ++j) {
        const LaneFloats weight = splat<LaneFloats>(factor[j]);
        for (int u = 0; u < kStripUnits; ++u) carried[j][u] += left[u] * weight;
      }
    }
    for (int u = 0; u < kStripUnits; ++u) {
      report(lost[u], row_of(panel, strip, u), column, panel.job, &result->carried_at);
    }
  }

  // Chooses each code of the slab again, given all others.
  ISQ_NOINLINE void sweep(const FeedbackPanel& panel, const float* couplings, int64_t strip, int64_t slab, int count) {
    LaneFloats* const sums = panel.sums_of(strip, slab);
    std::memset((void*)sums, 0, count * sizeof(Strip));
    for (int begin = 0; begin < count; begin += kTileDepth) {
      const int depth = count - begin < kTileDepth ? count - begin : kTileDepth;
      for (int c = 0; c < count; c += kTileColumns) {
        FeedbackPanel::add_products(rest[begin], couplings + begin * kTileStride + c, depth, sums + c * kStripUnits);
      }
    }
    for (int i = 0; i < count; ++i) {
      const int64_t column = slab + i / kBlock * kBlock;
      const float* factor = couplings + i * kTileStride;
      for (int u = 0; u < kStripUnits; ++u) {
        const Chosen& unit = chosen[block_of(column)][u];
        const LaneFloats target = wanted[i][u] - sums[i * kStripUnits + u];
        if (!any(~is_nearest<Format>(unit, i % kBlock, target))) continue;
        const LaneInts code = unit.codes[i % kBlock];
        const LaneFloats before = unit.value(i % kBlock, code);
        const LaneFloats value = choose_code(column, i % kBlock, u, target, wanted[i][u]);
        if (!any(code != unit.codes[i % kBlock])) continue;
        const LaneFloats change = value - before;
        panel.errors_of(strip, slab + i)[u] = value - w[u][i];
        for (int j = i + 1; j < count; ++j) sums[j * kStripUnits + u] += change * factor[j];
      }
    }
  }

  // Stores the blocks.
  void end(const FeedbackPanel& panel, int64_t strip, int64_t slab, int count) {
    using Block = typename Format::Block;
    const FeedbackJob& job = panel.job;
    for (int64_t column = slab; column < slab + count; column += kBlock) {
      for (int u = 0; u < kStripUnits; ++u) {
        Chosen& unit = chosen[block_of(column)][u];
        Block packed[kWidth];
        Format::codes_changed(changed[block_of(column)][u], &unit);
        store<Format>(unit, packed);
        const int64_t first = row_of(panel, strip, u);
        for (int l = 0; l < kWidth && first + l < job.rows; ++l) {
          const int64_t block = (first + l) * (job.k / kBlock) + column / kBlock;
          std::memcpy(job.out + block * sizeof(Block), packed + l, sizeof(Block));
        }
      }
    }
  }

 private:
  static int64_t row_of(const FeedbackPanel& panel, int64_t strip, int unit) {
    return panel.first_row + strip * kStripRows + unit * kWidth;
  }
  static int block_of(int64_t column) { return column % kSlabColumns / kBlock; }

  // Computes what columns should be, so that the errors of other columns, of which the panel has the sums, are made up
  // for. The change of a column is carried to those behind it, as its errors are.
  ISQ_NOINLINE void make_up(const FeedbackPanel& panel, int64_t strip, int64_t column, int count, Strip* out) const {
    std::memcpy((void*)out, panel.sums_of(strip, column), count * sizeof(Strip));
    for (int i = 0; i < count; ++i) {
      Strip here;
      std::memcpy((void*)here, out[i], sizeof here);
      const float* factor = panel.factor(column + i, column);
      for (int j = i + 1; j < count; ++j) {
        const LaneFloats weight = splat<LaneFloats>(factor[j]);
        for (int u = 0; u < kStripUnits; ++u) out[j][u] -= here[u] * weight;
      }
      for (int u = 0; u < kStripUnits; ++u) out[i][u] = w[u][column % kSlabColumns + i] - here[u];
    }
  }

  // Chooses the code of element i of a block and returns its value. The present code stays where the target is the
  // weight that it stands for, `seen`, and where all codes mean the same. So it does where the target is not finite.
  ISQ_INLINE LaneFloats choose_code(int64_t column, int i, int u, LaneFloats target, LaneFloats seen) {
    Chosen& unit = chosen[block_of(column)][u];
    const LaneFloats first = unit.value(i, Format::code_of(splat<LaneInts>(Format::kFirstRank)));
    const LaneFloats last = unit.value(i, Format::code_of(splat<LaneInts>(Format::kLastRank)));
    const LaneInts keep = (target == seen) | (first == last) | ~(abs(target) <= FLT_MAX);
    const LaneInts code = select(keep, unit.codes[i], nearest_code<Format>(unit, i, target, last < first));
    changed[block_of(column)][u] |= code != unit.codes[i];
    unit.codes[i] = code;
    return unit.value(i, code);
  }

  // Notes the first of the rows from `first` on whose lane is set.
  static void report(LaneInts lanes, int64_t first, int64_t column, const FeedbackJob& job, int64_t* at) {
    if (!any(lanes)) return;
    for (int l = 0; l < kWidth && first + l < job.rows; ++l) {
      if (lanes[l]) lower_to(at, (first + l) * job.k + column);
    }
  }
};

}  // namespace isqtorch::ISQ_ISA
