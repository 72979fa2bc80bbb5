// The int8 form of weights and of x for many rows of x without AMX: one affine form for all formats.
//
// A panel holds sixteen weight rows side by side, one row per lane. A unit consists of spans of 32 weights (or of a
// smaller group). A span has the codes of the sixteen rows, four neighbours of each row at a time, and the scales and
// offsets. x is packed in the same order, as many rows side by side as the product takes at a time.
#pragma once

#include "cpu/linear/rows.h"
#include "cpu/linear/transpose.h"
#include "cpu/linear/units_kquants.h"

namespace isqtorch::ISQ_ISA {

constexpr int kPanelRows = 16;
// The product takes kRowBlocks * 16 weight rows times kPanelTokens rows of x at a time, as many as there are registers
// for their sums.
constexpr int kRowBlocks = ISQ_VECTOR_FLOATS == 16 ? 2 : 1;
constexpr int kPanelTokens = ISQ_VECTOR_FLOATS == 16 ? 6 : 4;
#if defined(ISQ_DOTPROD)
constexpr int kWordsAtOnce = 4;  // words of a row of x to load; the instruction picks one
#else
constexpr int kWordsAtOnce = 1;
#endif

ISQ_INLINE Bytes all_bytes(uint8_t v) {
  Bytes b;
  for (int p = 0; p < kParts; ++p) b.part[p] = v - NativeU8{};
  return b;
}
// For numbers below 2^22.
ISQ_INLINE Ints nearest_ints(Floats f) {
  Ints i;
  for (int p = 0; p < kParts; ++p) i.part[p] = (NativeI32)(f.part[p] + 12582912.0f) - 0x4b400000;
  return i;
}

// ---- the form -----------------------------------------------------------------------------------------------------

template <class Unit>
struct PanelFacts {
  static constexpr bool kFolds = Folding<Unit>::kFits;
  static constexpr int kSpan = kFolds ? 32 : Unit::kWeights / 16, kSpans = Unit::kWeights / kSpan, kWords = kSpan / 4;
  static constexpr int kScales = kFolds ? 1 : 16, kOffsets = 16 / kSpans;  // of a unit; of a span
  static constexpr int kMaxCode = [] {
    if constexpr (kFolds) return Folding<Unit>::kMaxCode;
    return Unit::kMaxCode;
  }();
  static constexpr int kCenter = [] {
    if constexpr (kFolds) return Folding<Unit>::kCenter;
    return Unit::kCenter;
  }();
  static constexpr bool kWide = kActivationBytes<Unit> == 2;
  static constexpr bool kSigned =
      kMaxCode > 127 && !kUnsignedDots && !(kWide && kWideWords);  // dot products take code - 128
  static constexpr int kCodeVectors = Unit::kWeights / 64, kDots = kCodeVectors / 4;

  // Quarter q of code vector v holds words first_word .. first_word + 3 of a span.
  static constexpr int span_of(int v, int q) { return kFolds ? q / 2 * 4 + v : q * 4 + v / kDots; }
  static constexpr int first_word(int v, int q) { return kFolds ? q % 2 * 4 : v % kDots * 4; }
  // The lane that has the scale and offset of a span, or of its half h where a span is folded from two groups.
  static constexpr int lane_of(int span, int h = 0) { return kFolds ? span / 4 * 8 + span % 4 + 4 * h : span; }
};

// One unit of sixteen rows.
template <class Unit>
struct alignas(64) PanelUnit {
  using Facts = PanelFacts<Unit>;
  struct {
    uint8_t codes[Facts::kWords][64];  // word w of the rows 0 .. 15
  } span[Facts::kSpans];
  float scale[Facts::kScales][16];           // [span][row]
  float offset[Unit::kAffine ? 16 : 0][16];  // [lane][row]
};

// Sums of products with activations of 8 bits start at these bits. Read as a float, the result is kSumOrigin + sum;
// the subtraction of kSumOrigin is part of the multiplication by the step of x. Sums stay below 32 * 255 * 127. (From
// 3e33 on, an x gives infinity here.) Sums with 15 bits are too large for that; they are converted.
constexpr int32_t kSumOriginBits = 0x4b400000;
constexpr float kSumOrigin = 12582912.0f;

// One unit of kPanelTokens rows of x.
template <class Unit>
struct alignas(64) PanelActivations {
  using Facts = PanelFacts<Unit>;
  int8_t q[kActivationBytes<Unit>][Unit::kWeights / 4 / kWordsAtOnce][kPanelTokens][4 * kWordsAtOnce];
  float step[Facts::kSpans][kPanelTokens];                       // for 8 bits: at most 22 bits, so that ...
  float origin[Facts::kWide ? 0 : Facts::kSpans][kPanelTokens];  // ... -kSumOrigin * step is exact
  int32_t start[Unit::kAffine ? 0 : Facts::kSpans]
               [kPanelTokens];                         // initial value of a sum; with terms, that of the high ones
  float offset[Unit::kAffine ? 16 : 0][kPanelTokens];  // [lane]: step * sum(q)
};

template <class Unit>
int64_t int8_panel_bytes(int64_t rows, int64_t weights) {
  const int64_t units = (weights + Unit::kWeights - 1) / Unit::kWeights;
  return rows / kPanelRows * units * (int64_t)sizeof(PanelUnit<Unit>);
}

// ---- packing x ----------------------------------------------------------------------------------------------------

template <class Unit>
int64_t int8_packed_bytes(int64_t k) {
  return (k + Unit::kWeights - 1) / Unit::kWeights * (int64_t)sizeof(PanelActivations<Unit>);
}

// Packs a unit of row t of x, of which the first `there` values exist.
template <class Unit>
void pack_panel_unit(const float* x, int64_t there, int t, PanelActivations<Unit>* out) {
  using Facts = PanelFacts<Unit>;
  using Integer = std::conditional_t<Facts::kWide, int16_t, int8_t>;
  constexpr int kWeights = Unit::kWeights;
  Integer natural[kWeights] = {}, ordered[kWeights];
  float step[kWeights / 32] = {};
  for (int b = 0; 32 * b < kWeights && 32 * b < there; ++b) {
    step[b] = quantize_activations<Facts::kWide ? kLargestWide : 127>(x + 32 * b, natural + 32 * b);
    if constexpr (!Facts::kWide) step[b] = bits_float((float_bits(step[b]) + 2) & ~3u);
  }
  order_activations<Unit>(natural, ordered);
  uint8_t q[kActivationBytes<Unit>][kWeights];
  if constexpr (Facts::kWide) {
    store_wide<kWeights>(ordered, q[0], q[1]);
  } else {
    std::memcpy(q, ordered, kWeights);
  }
  for (int part = 0; part < kActivationBytes<Unit>; ++part) {
    for (int p = 0; p < kWeights; p += 16) {
      const int word = Facts::span_of(p / 64, p % 64 / 16) * Facts::kWords + Facts::first_word(p / 64, p % 64 / 16);
      for (int w = 0; w < 4; w += kWordsAtOnce) {
        std::memcpy(out->q[part][(word + w) / kWordsAtOnce][t], q[part] + p + 4 * w, 4 * kWordsAtOnce);
      }
    }
  }
  int32_t sum[16];
  for (int lane = 0; lane < 16; ++lane) {
    const Integer* group = ordered + lane % 4 * Facts::kDots * 64 + lane / 4 * 16;
    sum[lane] = 0;
    for (int d = 0; d < Facts::kDots; ++d) {
      for (int j = 0; j < 16; ++j) sum[lane] += group[64 * d + j];
    }
  }
  for (int span = 0; span < Facts::kSpans; ++span) {
    const float of_span = step[UnitFacts<Unit>::group_of_lane(Facts::lane_of(span))];
    out->step[span][t] = of_span;
    if constexpr (!Facts::kWide) out->origin[span][t] = -kSumOrigin * of_span;
    int all = 0;
    for (int h = 0; h < Facts::kOffsets; ++h) {
      const int lane = Facts::lane_of(span, h);
      all += sum[lane];
      if constexpr (Unit::kAffine) out->offset[lane][t] = of_span * (float)sum[lane];
    }
    if constexpr (!Unit::kAffine) {
      constexpr int kCenter = Facts::kCenter - (Facts::kSigned ? 128 : 0);
      if constexpr (!Facts::kWide) {
        out->start[span][t] = kSumOriginBits - kCenter * all;
      } else if constexpr (kWideWords) {
        out->start[span][t] = -kCenter * all;
      } else {
        static_assert(kCenter % (1 << kTermBits) == 0);  // sums of high terms are shifted later
        out->start[span][t] = -(kCenter >> kTermBits) * all;
      }
    }
  }
}

template <class Unit>
void pack_int8_tokens(const float* x, int tokens, int64_t k, void* packed) {
  PanelActivations<Unit>* out = static_cast<PanelActivations<Unit>*>(packed);
  for (int64_t begin = 0; begin < k; begin += Unit::kWeights, ++out) {
    for (int t = 0; t < kPanelTokens; ++t) {
      const int64_t there = t < tokens ? k - begin : 0;
      pack_panel_unit<Unit>(x + (there ? t * k + begin : 0), there, t, out);
    }
  }
}

// ---- decoding -----------------------------------------------------------------------------------------------------

// Multiplies codes of sixteen rows, four neighbours of each, by the scales of their groups, modulo 256, and adds
// kCenter.
template <class Unit>
ISQ_INLINE void fold_scales(uint8_t* codes, Ints scale) {
  Bytes factor, start;
  for (int p = 0; p < kParts; ++p) {
    const NativeI32 by = scale.part[p] & 255, two = by | by << 16;
    factor.part[p] = (NativeU8)two;
    start.part[p] = Folding<Unit>::kCenter - (NativeU8)(two | two << 8) * (uint8_t)Unit::kCenter;
  }
  for (int w = 0; w < 4; ++w) {
    const Bytes all = load_64(codes + 64 * w);
    for (int p = 0; p < kParts; ++p) {
      const NativeU16 two = (NativeU16)all.part[p], by = (NativeU16)factor.part[p];
      const NativeU8 product = (NativeU8)((two * by & 0x00ff) | (two & 0xff00) * by);
      const NativeU8 folded = product + start.part[p];
      std::memcpy(codes + 64 * w + p * kNativeBytes, &folded, kNativeBytes);
    }
  }
}

// Decodes one unit of sixteen rows; that of row r begins at w[r].
template <class Unit>
void decode_panel_unit(const uint8_t* const* w, const UnitLayout& layout, PanelUnit<Unit>* out) {
  using Facts = PanelFacts<Unit>;
  alignas(64) Bytes codes[kPanelRows][Facts::kCodeVectors];
  alignas(64) Floats scale[kPanelRows], offset[kPanelRows];
  for (int r = 0; r < kPanelRows; ++r) {
    Unit::load(w[r], layout, codes[r], &scale[r], &offset[r]);
    if constexpr (Unit::kAffine && Facts::kSigned) {
      offset[r] = multiply_add(scale[r], all_lanes(128.0f), offset[r]);
    }
  }
  for (int v = 0; v < Facts::kCodeVectors; ++v) {
    uint8_t* words[4];
    for (int q = 0; q < 4; ++q) words[q] = out->span[Facts::span_of(v, q)].codes[Facts::first_word(v, q)];
    transpose_words(reinterpret_cast<const uint8_t*>(&codes[0][v]), sizeof codes[0], words);
  }
  if constexpr (Unit::kAffine) transpose_floats(offset, out->offset);
  if constexpr (Facts::kFolds) {
    alignas(64) float scales[16][16];
    transpose_floats(scale, scales);
    for (int r = 0; r < 16; ++r) out->scale[0][r] = f16_to_f32(load_u16(w[r] + Folding<Unit>::kBlockScale));
    // Makes the scales integers again. If d is zero or not finite, any codes will do, because they are only multiplied
    // by d.
    Floats inverse = load_floats_16(out->scale[0]);
    for (int p = 0; p < kParts; ++p) inverse.part[p] = 1 / inverse.part[p];
    for (int span = 0; span < Facts::kSpans; ++span) {
      for (int h = 0; h < 2; ++h) {
        const Floats exact = load_floats_16(scales[Facts::lane_of(span, h)]) * inverse;
        fold_scales<Unit>(out->span[span].codes[4 * h], nearest_ints(exact));
      }
    }
  } else {
    transpose_floats(scale, out->scale);
  }
}

template <class Unit>
void decode_int8_panel(const DecodeJob& job) {
  constexpr int kWeights = Unit::kWeights;
  const int64_t unit_bytes = job.layout.unit_bytes;
  const int64_t first = job.k_begin / kWeights, last = (job.k_end + kWeights - 1) / kWeights;
  PanelUnit<Unit>* out = static_cast<PanelUnit<Unit>*>(job.panel);
  alignas(64) uint8_t copy[kPanelRows][kMaxUnitBytes + 64];
  for (int64_t row = 0; row < job.rows; row += kPanelRows) {
    for (int64_t u = first; u < last; ++u, ++out) {
      const uint8_t* w[kPanelRows];
      for (int r = 0; r < kPanelRows; ++r) {
        // The pieces of the rows are too short for the hardware prefetcher.
        const uint8_t* ahead = job.w + (row + kPanelRows + r) * job.row_bytes + u * unit_bytes;
        for (int64_t b = 0; b < unit_bytes; b += 64) ISQ_PREFETCH(ahead + b);
        const bool there = row + r < job.rows;
        const bool at_end = Unit::kReadsBeyond > 0 && job.w_ends && row + r == job.rows - 1;
        const int64_t left = there ? job.row_bytes - u * unit_bytes : 0;
        const uint8_t* from = job.w + (row + r) * job.row_bytes + u * unit_bytes;
        if (left > unit_bytes || (left == unit_bytes && !at_end)) {
          w[r] = from;
        } else {
          std::memset(copy[r], 0, sizeof copy[r]);
          if (left > 0) std::memcpy(copy[r], from, left);
          w[r] = copy[r];
        }
      }
      decode_panel_unit<Unit>(w, job.layout, out);
    }
  }
}

}  // namespace isqtorch::ISQ_ISA
