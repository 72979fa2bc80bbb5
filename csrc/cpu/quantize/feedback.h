// The driver of quantizers with error feedback. isqtorch/quantizers/feedback.py explains the method; the bytes are the
// same.
//
// For every weight, the driver needs the sum of the row's errors so far, times a column of the factor. Nearly all the
// time goes into these sums. They are a product of matrices, errors [rows, k] by factor [k, k], of which a part can be
// computed only after the codes of another part are chosen. So the columns are taken in slabs: first the sums of a slab
// over all columns before it, for a panel of rows; then strip by strip the codes of the slab, block by block, with the
// sums over the slab's own columns.
//
// A thread takes a panel of rows at a time.
#pragma once

#include "cpu/quantize/feedback_strip.h"

namespace isqtorch::ISQ_ISA {

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
  const FeedbackPlan plan(job, kBlock);

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
          const int count = plan.columns_of(slab / kSlabColumns);
          panel.clear_sums();
          panel.carry(0, slab, slab, count, 0, panel.strips);
          for (int64_t s = 0; s < panel.strips; ++s) {
            strip.begin(panel, s, slab, count);
            for (int64_t column = slab; column < slab + count; column += kBlock) {
              panel.carry(slab, column, column, kBlock, s, 1);
              strip.choose_scales(panel, s, column, memory.mean_square, &result);
              strip.round(panel, plan, s, column, &result);
            }
            if (plan.swept.at[slab / kSlabColumns]) {
              strip.sweep(panel, plan.couplings_of(slab / kSlabColumns), s, slab, count);
            }
            strip.end(panel, s, slab, count);
          }
        }
      }
    }
  });
  return result;
}

}  // namespace isqtorch::ISQ_ISA
