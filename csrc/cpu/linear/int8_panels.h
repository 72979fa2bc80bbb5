// `linear` for many rows of x without AMX: weights decoded to the form of int8_form.h, times x in int8 per 32.
//
// One word of activations is multiplied with sixteen weight rows at once. A span's integer sums become f32 by two
// multiplications for sixteen rows. So 32 weights of sixteen rows cost eight dot products, these two and, with offsets,
// one more. With activations of 15 bits they cost sixteen dot products and a conversion.
#pragma once

#include "cpu/linear/int8_form.h"

namespace isqtorch::ISQ_ISA {

ISQ_INLINE Floats as_floats(Ints bits) {
  Floats f;
  for (int p = 0; p < kParts; ++p) f.part[p] = (NativeF32)bits.part[p];
  return f;
}
// Part by part, as in load_wide.
ISQ_INLINE void store_floats_16(Floats f, float* to) {
  for (int p = 0; p < kParts; ++p) std::memcpy(to + p * ISQ_VECTOR_FLOATS, &f.part[p], kNativeBytes);
}

// Adds the dot products of a span with one byte of the activations.
template <class Unit>
ISQ_INLINE void add_span(const PanelUnit<Unit>* w, [[maybe_unused]] int64_t row_stride, const PanelActivations<Unit>& a,
                         int part, int span, Ints (&dots)[kRowBlocks][kPanelTokens]) {
  using Facts = PanelFacts<Unit>;
  const auto* words = a.q[part][span * Facts::kWords / kWordsAtOnce];
#if defined(ISQ_DOTPROD)
  static_assert(kRowBlocks == 1);
  for (int word = 0; word < Facts::kWords; word += 4, words += kPanelTokens) {
    const uint8_t* codes = w->span[span].codes[word];
    Quarter q[kPanelTokens];
    ISQ_UNROLL
    for (int t = 0; t < kPanelTokens; ++t) q[t] = load_16(words[t]);
    add_dots_of_word<0, kPanelTokens, Facts::kMaxCode>(dots[0], codes, q);
    add_dots_of_word<1, kPanelTokens, Facts::kMaxCode>(dots[0], codes + 64, q);
    add_dots_of_word<2, kPanelTokens, Facts::kMaxCode>(dots[0], codes + 128, q);
    add_dots_of_word<3, kPanelTokens, Facts::kMaxCode>(dots[0], codes + 192, q);
  }
#else
  constexpr int kTogether = kDotsTogether<Facts::kMaxCode>;
  for (int word = 0; word < Facts::kWords; word += kTogether, words += kTogether * kPanelTokens) {
    Bytes codes[kRowBlocks][kTogether];
    ISQ_UNROLL
    for (int r = 0; r < kRowBlocks; ++r) {
      for (int c = 0; c < kTogether; ++c) codes[r][c] = load_64(w[r * row_stride].span[span].codes[word + c]);
    }
    ISQ_UNROLL
    for (int t = 0; t < kPanelTokens; ++t) {
      Bytes q[kTogether];
      for (int c = 0; c < kTogether; ++c) q[c] = word_in_all_lanes(words[c * kPanelTokens + t]);
      ISQ_UNROLL
      for (int r = 0; r < kRowBlocks; ++r) {
        dots[r][t] = add_dot_products<kTogether, Facts::kMaxCode>(dots[r][t], codes[r], q);
      }
    }
  }
#endif
}

// Adds the dot products of a span with activations as 16-bit numbers (activations.h).
template <class Unit>
ISQ_INLINE void add_words_of_span([[maybe_unused]] const PanelUnit<Unit>* w, [[maybe_unused]] int64_t row_stride,
                                  [[maybe_unused]] const PanelActivations<Unit>& a, [[maybe_unused]] int span,
                                  [[maybe_unused]] Ints (&dots)[kRowBlocks][kPanelTokens]) {
#if defined(__x86_64__)
  using Facts = PanelFacts<Unit>;
  const int first = span * Facts::kWords;
  for (int word = 0; word < Facts::kWords; ++word) {
    NativeU16 even[kRowBlocks][kParts], odd[kRowBlocks][kParts];
    ISQ_UNROLL
    for (int r = 0; r < kRowBlocks; ++r) {
      const Bytes codes = load_64(w[r * row_stride].span[span].codes[word]);
      for (int p = 0; p < kParts; ++p) {
        even[r][p] = (NativeU16)codes.part[p] & (uint16_t)255;
        odd[r][p] = (NativeU16)codes.part[p] >> 8;
      }
    }
    ISQ_UNROLL
    for (int t = 0; t < kPanelTokens; ++t) {
      const Bytes q0 = word_in_all_lanes(a.q[0][first + word][t]), q1 = word_in_all_lanes(a.q[1][first + word][t]);
      ISQ_UNROLL
      for (int r = 0; r < kRowBlocks; ++r) {
        for (int p = 0; p < kParts; ++p) {
          dots[r][t].part[p] += multiply_words(even[r][p], (NativeU16)q0.part[p]);
          dots[r][t].part[p] += multiply_words(odd[r][p], (NativeU16)q1.part[p]);
        }
      }
    }
  }
#endif
}

// Multiplies kRowBlocks * 16 rows, whose row blocks are row_stride units apart, by kPanelTokens rows of x. The sums
// [tokens][16] of the row blocks are sum_stride floats apart.
template <class Unit>
void multiply_panel_block(const PanelUnit<Unit>* w, int64_t row_stride, const PanelActivations<Unit>* x, int64_t units,
                          float* sums, int64_t sum_stride, bool first) {
  using Facts = PanelFacts<Unit>;
  Floats acc[kRowBlocks][kPanelTokens];
  ISQ_UNROLL
  for (int r = 0; r < kRowBlocks; ++r) {
    ISQ_UNROLL
    for (int t = 0; t < kPanelTokens; ++t) {
      if (first) {
        acc[r][t] = all_lanes(0.0f);
      } else {
        acc[r][t] = load_floats_16(sums + r * sum_stride + 16 * t);
      }
    }
  }
  for (int64_t u = 0; u < units; ++u) {
    for (int span = 0; span < Facts::kSpans; ++span) {
      const auto& a = x[u];
      Ints dots[kRowBlocks][kPanelTokens];
      ISQ_UNROLL
      for (int t = 0; t < kPanelTokens; ++t) {
        Ints start;
        if constexpr (Unit::kAffine) {
          start = all_lanes(Facts::kWide ? 0 : kSumOriginBits);
        } else {
          start = all_lanes(a.start[span][t]);
        }
        ISQ_UNROLL
        for (int r = 0; r < kRowBlocks; ++r) dots[r][t] = start;
      }
      if constexpr (!Facts::kWide) {
        add_span(w + u, row_stride, a, 0, span, dots);
      } else if constexpr (kWideWords) {
        add_words_of_span(w + u, row_stride, a, span, dots);
      } else {
        add_span(w + u, row_stride, a, 0, span, dots);
        ISQ_UNROLL
        for (int r = 0; r < kRowBlocks; ++r) {
          ISQ_UNROLL
          for (int t = 0; t < kPanelTokens; ++t) dots[r][t] = shift_left(dots[r][t], kTermBits);
        }
        add_span(w + u, row_stride, a, 1, span, dots);
      }
      ISQ_UNROLL
      for (int r = 0; r < kRowBlocks; ++r) {
        const PanelUnit<Unit>& rows = w[r * row_stride + u];
        const Floats scale = load_floats_16(rows.scale[Facts::kFolds ? 0 : span]);
        ISQ_UNROLL
        for (int t = 0; t < kPanelTokens; ++t) {
          Floats sum;
          if constexpr (!Facts::kWide) {
            sum = multiply_add(as_floats(dots[r][t]), all_lanes(a.step[span][t]), all_lanes(a.origin[span][t]));
          } else {
            sum = to_floats(dots[r][t]) * all_lanes(a.step[span][t]);
          }
          acc[r][t] = multiply_add(sum, scale, acc[r][t]);
          if constexpr (Unit::kAffine) {
            for (int h = 0; h < Facts::kOffsets; ++h) {
              const int lane = Facts::lane_of(span, h);
              acc[r][t] = multiply_add(load_floats_16(rows.offset[lane]), all_lanes(a.offset[lane][t]), acc[r][t]);
            }
          }
        }
      }
    }
  }
  ISQ_UNROLL
  for (int r = 0; r < kRowBlocks; ++r) {
    ISQ_UNROLL
    for (int t = 0; t < kPanelTokens; ++t) store_floats_16(acc[r][t], sums + r * sum_stride + 16 * t);
  }
}

// A stretch of each row block that stays in the first-level cache while all of x passes.
constexpr int kStretchWeights = 512;

template <class Unit>
void multiply_int8_panel(const ProductJob& job) {
  const auto units_of = [](int64_t weights) { return (weights + Unit::kWeights - 1) / Unit::kWeights; };
  const int64_t units = units_of(job.k_end - job.k_begin), all_units = units_of(job.k);
  const int64_t blocks = (job.tokens + kPanelTokens - 1) / kPanelTokens, sum_stride = blocks * kPanelTokens * 16;
  const PanelUnit<Unit>* w = static_cast<const PanelUnit<Unit>*>(job.panel);
  const PanelActivations<Unit>* x = static_cast<const PanelActivations<Unit>*>(job.x) + job.k_begin / Unit::kWeights;
  constexpr int64_t kStretch = kStretchWeights / Unit::kWeights;
  for (int64_t r = 0; r < job.rows / kPanelRows; r += kRowBlocks) {
    for (int64_t u = 0; u < units; u += kStretch) {
      const int64_t count = units - u < kStretch ? units - u : kStretch;
      for (int64_t b = 0; b < blocks; ++b) {
        multiply_panel_block<Unit>(w + r * units + u, units, x + b * all_units + u, count,
                                   job.sums + r * sum_stride + b * kPanelTokens * 16, sum_stride, job.first && u == 0);
      }
    }
  }
}

inline void unpack_int8_sums(const float* sums, int64_t rows, int64_t tokens, float* y, int64_t ldy) {
  const int64_t padded = (tokens + kPanelTokens - 1) / kPanelTokens * kPanelTokens;
  for (int64_t r = 0; r < rows; r += kPanelRows) {
    for (int64_t t = 0; t < tokens; ++t) std::memcpy(y + t * ldy + r, sums + r * padded + 16 * t, 64);
  }
}

struct Int8Panels {
  template <class Unit>
  static PanelKernels get(const UnitLayout& layout) {
    return {kActivationBytes<Unit> == 1 ? "int8 panels" : "int8 panels, x in 15 bits",
            kRowBlocks * kPanelRows,
            kPanelTokens,
            128,
            int8_panel_bytes<Unit>,
            int8_packed_bytes<Unit>,
            pack_int8_tokens<Unit>,
            layout,
            decode_int8_panel<Unit>,
            multiply_int8_panel<Unit>,
            unpack_int8_sums};
  }
  static PanelKernels fp8() { return {}; }
};

}  // namespace isqtorch::ISQ_ISA
