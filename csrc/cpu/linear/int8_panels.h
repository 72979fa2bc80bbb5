// `linear` for many rows of x without AMX: weights decoded to one affine int8 form that fits every format, times x in
// int8 per 32.
//
// A panel keeps sixteen weight rows side by side, a row to a lane: for each group of a unit the codes, four neighbours
// of each row at a time, then the scales and the offsets of the sixteen rows. So an activation word meets sixteen rows
// at once, and a group's integer sums become f32 by one conversion and two products for sixteen rows. x is packed as in
// rows.h; groups come in the order of the lanes there.
#pragma once

#include "cpu/linear/rows.h"
#include "cpu/linear/transpose.h"

namespace isqtorch::ISQ_ISA {

constexpr int kPanelRows = 16;
// The product takes kRowBlocks * 16 rows times kPanelTokens rows of x at a time: as many sums as there are registers
// for.
constexpr int kRowBlocks = ISQ_VECTOR_FLOATS == 16 ? 2 : 1;
constexpr int kPanelTokens = ISQ_VECTOR_FLOATS == 16 ? 6 : ISQ_VECTOR_FLOATS == 8 ? 2 : 4;

// One unit of sixteen rows.
template <class Unit>
struct alignas(64) PanelUnit {
  static constexpr int kWords = Unit::kWeights / 16 / 4;  // of a row, in a group
  struct {
    uint8_t codes[kWords][64];  // word w of the rows 0 .. 15
  } group[16];
  float scale[16][16], offset[16][16];  // [group][row]
};

template <class Unit>
int64_t int8_panel_bytes(int64_t rows, int64_t weights) {
  const int64_t units = (weights + Unit::kWeights - 1) / Unit::kWeights;
  return rows / kPanelRows * units * (int64_t)sizeof(PanelUnit<Unit>);
}

// One unit of sixteen rows; w[r] is where that of row r begins.
template <class Unit>
void decode_panel_unit(const uint8_t* const* w, const UnitLayout& layout, PanelUnit<Unit>* out) {
  using Facts = UnitFacts<Unit>;
  alignas(64) Bytes codes[kPanelRows][Facts::kVectors];
  alignas(64) Floats scale[kPanelRows], offset[kPanelRows];
  for (int r = 0; r < kPanelRows; ++r) {
    Unit::load(w[r], layout, codes[r], &scale[r], &offset[r]);
    if constexpr (Unit::kAffine && Facts::kSigned) {
      offset[r] = multiply_add(scale[r], all_lanes(128.0f), offset[r]);
    }
  }
  for (int v = 0; v < Facts::kVectors; ++v) {
    alignas(64) uint8_t words[16][64];  // word 4q + c of vector v belongs to group 4q + i
    transpose_words(reinterpret_cast<const uint8_t*>(&codes[0][v]), sizeof codes[0], words[0], 64);
    const int i = v / Facts::kDots, d = v % Facts::kDots;
    for (int q = 0; q < 4; ++q) std::memcpy(out->group[4 * q + i].codes[4 * d], words[4 * q], sizeof words / 4);
  }
  transpose_words(reinterpret_cast<const uint8_t*>(scale), 64, reinterpret_cast<uint8_t*>(out->scale), 64);
  if constexpr (Unit::kAffine) {
    transpose_words(reinterpret_cast<const uint8_t*>(offset), 64, reinterpret_cast<uint8_t*>(out->offset), 64);
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

// kRowBlocks times sixteen rows, row_stride units apart, times kPanelTokens rows of x, token_stride units apart. The
// sums [tokens][16] of the row blocks are sum_stride floats apart.
template <class Unit>
void multiply_panel_block(const PanelUnit<Unit>* w, int64_t row_stride, const UnitActivations<Unit>* x,
                          int64_t token_stride, int64_t units, float* sums, int64_t sum_stride, bool first) {
  using Facts = UnitFacts<Unit>;
  [[maybe_unused]] constexpr int kTogether = kDotsTogether<Unit::kMaxCode>;
  Floats acc[kRowBlocks][kPanelTokens];
  for (int r = 0; r < kRowBlocks; ++r) {
    for (int t = 0; t < kPanelTokens; ++t) {
      acc[r][t] = first ? all_lanes(0.0f) : load_floats_16(sums + r * sum_stride + 16 * t);
    }
  }
  for (int64_t u = 0; u < units; ++u) {
    for (int lane = 0; lane < 16; ++lane) {
      const int group = lane % 4 * Facts::kDots * 64 + lane / 4 * 16;  // where its activations begin
      Ints dots[kRowBlocks][kPanelTokens];
      for (int t = 0; t < kPanelTokens; ++t) {
        const Ints start = all_lanes(Unit::kAffine ? 0 : -x[t * token_stride + u].center[lane]);
        for (int r = 0; r < kRowBlocks; ++r) dots[r][t] = start;
      }
#if defined(ISQ_DOTPROD)
      // The instruction picks the word: four words of x cost one load.
      static_assert(kRowBlocks == 1);
      for (int word = 0; word < PanelUnit<Unit>::kWords; word += 4) {
        const uint8_t* codes = w[u].group[lane].codes[word];
        Quarter a[kPanelTokens];
        for (int t = 0; t < kPanelTokens; ++t) a[t] = load_16(x[t * token_stride + u].q + group + word * 16);
        add_dots_of_word<0, kPanelTokens, Unit::kMaxCode>(dots[0], codes, a);
        add_dots_of_word<1, kPanelTokens, Unit::kMaxCode>(dots[0], codes + 64, a);
        add_dots_of_word<2, kPanelTokens, Unit::kMaxCode>(dots[0], codes + 128, a);
        add_dots_of_word<3, kPanelTokens, Unit::kMaxCode>(dots[0], codes + 192, a);
      }
#else
      for (int word = 0; word < PanelUnit<Unit>::kWords; word += kTogether) {
        Bytes codes[kRowBlocks][kTogether];
        for (int r = 0; r < kRowBlocks; ++r) {
          for (int c = 0; c < kTogether; ++c) {
            codes[r][c] = load_64(w[r * row_stride + u].group[lane].codes[word + c]);
          }
        }
        for (int t = 0; t < kPanelTokens; ++t) {
          Bytes a[kTogether];
          const int8_t* words = x[t * token_stride + u].q + group + word / 4 * 64 + word % 4 * 4;
          for (int c = 0; c < kTogether; ++c) a[c] = word_in_all_lanes(words + 4 * c);
          for (int r = 0; r < kRowBlocks; ++r) {
            dots[r][t] = add_dot_products<kTogether, Unit::kMaxCode>(dots[r][t], codes[r], a);
          }
        }
      }
#endif
      for (int r = 0; r < kRowBlocks; ++r) {
        const PanelUnit<Unit>& rows = w[r * row_stride + u];
        const Floats scale = load_floats_16(rows.scale[lane]);
        for (int t = 0; t < kPanelTokens; ++t) {
          const UnitActivations<Unit>& a = x[t * token_stride + u];
          acc[r][t] = multiply_add(to_floats(dots[r][t]) * all_lanes(a.step[lane]), scale, acc[r][t]);
          if constexpr (Unit::kAffine) {
            acc[r][t] = multiply_add(load_floats_16(rows.offset[lane]), all_lanes(a.offset[lane]), acc[r][t]);
          }
        }
      }
    }
  }
  for (int r = 0; r < kRowBlocks; ++r) {
    for (int t = 0; t < kPanelTokens; ++t) std::memcpy(sums + r * sum_stride + 16 * t, &acc[r][t], 64);
  }
}

template <class Unit>
void multiply_int8_panel(const ProductJob& job) {
  constexpr int kWeights = Unit::kWeights;
  const auto units_of = [](int64_t weights) { return (weights + kWeights - 1) / kWeights; };
  const int64_t units = units_of(job.k_end - job.k_begin), all_units = units_of(job.k);
  const int64_t blocks = (job.tokens + kPanelTokens - 1) / kPanelTokens, sum_stride = blocks * kPanelTokens * 16;
  const PanelUnit<Unit>* w = static_cast<const PanelUnit<Unit>*>(job.panel);
  const UnitActivations<Unit>* x = static_cast<const UnitActivations<Unit>*>(job.x) + job.k_begin / kWeights;
  for (int64_t r = 0; r < job.rows / kPanelRows; r += kRowBlocks) {
    for (int64_t b = 0; b < blocks; ++b) {
      multiply_panel_block<Unit>(w + r * units, units, x + b * kPanelTokens * all_units, all_units, units,
                                 job.sums + r * sum_stride + b * kPanelTokens * 16, sum_stride, job.first);
    }
  }
}

inline void unpack_int8_sums(const float* sums, int64_t rows, int64_t tokens, float* y, int64_t ldy) {
  const int64_t padded = (tokens + kPanelTokens - 1) / kPanelTokens * kPanelTokens;
  for (int64_t r = 0; r < rows; r += kPanelRows) {
    for (int64_t t = 0; t < tokens; ++t) std::memcpy(y + t * ldy + r, sums + r * padded + 16 * t, 64);
  }
}

template <class Unit>
int64_t int8_packed_bytes(int64_t k) {
  return kPanelTokens * packed_activation_bytes<Unit>(k);
}

template <class Unit>
void pack_int8_tokens(const float* x, int tokens, int64_t k, void* packed) {
  const int64_t bytes = packed_activation_bytes<Unit>(k);
  uint8_t* out = static_cast<uint8_t*>(packed);
  for (int t = 0; t < tokens; ++t) pack_activations<Unit>(x + t * k, k, out + t * bytes);
  std::memset(out + tokens * bytes, 0, (kPanelTokens - tokens) * bytes);
}

struct Int8Panels {
  template <class Unit>
  static PanelKernels get(const UnitLayout& layout) {
    return {"int8 panels",           kRowBlocks * kPanelRows,   kPanelTokens,           128,
            int8_panel_bytes<Unit>,  int8_packed_bytes<Unit>,   pack_int8_tokens<Unit>, layout,
            decode_int8_panel<Unit>, multiply_int8_panel<Unit>, unpack_int8_sums};
  }
  static PanelKernels fp8() { return {}; }
};

}  // namespace isqtorch::ISQ_ISA
