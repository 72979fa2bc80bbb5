// `linear` for few rows of x: int8 dot products straight from the packed blocks.
//
// Weights are processed in units: 16 groups of 32 weights (of 16, for formats with scales per 16), from as many blocks
// as that takes. A format defines how the bytes of a unit become vectors of codes, one vector of scales and one of
// offsets. Everything else is common to all formats and is here. With u the codes of group g and x_b ~ step_b * q_b the
// activations, integers with one step per 32:
//
//   y = sum_g scale_g * step_b * sum(u * q) + offset_g * step_b * sum(q)        b: the 32 activations of group g
//
// The integer sums are exact. The sums of sixteen groups share one vector, one lane each, so that the float part costs
// three or four instructions per unit. A unit of weights is decoded once and used for up to eight rows of x.
//
// For one row of x, the four words of a quarter are multiplied side by side, and their sums are added afterwards
// (sum_quarters). For several rows it is cheaper to bring the codes themselves into lanes, once: word j of every
// quarter moves to vector j, so that all words of a group lie in its lane and their products simply add up. The sums
// are the same integers, so a row of x has the same result in either way.
//
// What a format provides (see units_*.h):
//   kWeights           512 or 256 weights per unit
//   kBytes             packed bytes per unit; 0: known at run time, in the layout
//   kReadsBeyond       bytes that loads may touch beyond the unit
//   kMaxCode, kCenter  codes are 0 .. kMaxCode; w = scale * (u - kCenter), or, with kAffine, scale * u + offset
//   weight_at(v, j)    which weight of the unit byte j of code vector v holds. Vectors come in four runs of
//                      kWeights / 256; quarter q of every vector in run i belongs to one group, that of lane 4q + i
//   load(...)          the code vectors, the scales and the offsets
#pragma once

#include <algorithm>

#include "cpu/linear/activations.h"
#include "cpu/linear/transpose.h"

namespace isqtorch::ISQ_ISA {

template <class Unit>
struct UnitFacts {
  static constexpr int kWeights = Unit::kWeights;
  static constexpr int kVectors = Unit::kWeights / 64, kDots = kVectors / 4;
  static constexpr bool kSigned = kSignedCodes<Unit>, kWide = kActivationBytes<Unit> == 2;
  static constexpr int kCenter = Unit::kCenter - (kSigned ? 128 : 0);
  static constexpr int kLargestSum = kDots * 4 * (kSigned ? 128 : Unit::kMaxCode) * 127;  // in a lane

  // kOrder.at[position in the unit's vectors] is the weight of the unit.
  static constexpr auto kOrder = [] {
    struct {
      uint16_t at[Unit::kWeights];
    } order{};
    for (int p = 0; p < Unit::kWeights; ++p) order.at[p] = (uint16_t)Unit::weight_at(p / 64, p % 64);
    return order;
  }();
  // Whether each quarter holds sixteen neighbouring weights in order.
  static constexpr bool kPlainQuarters = [] {
    for (int p = 0; p < Unit::kWeights; ++p) {
      if (kOrder.at[p] != kOrder.at[p / 16 * 16] + p % 16) return false;
    }
    return true;
  }();
  // Which 32 activations of the unit are multiplied with the weights of a lane.
  static constexpr int group_of_lane(int lane) { return kOrder.at[lane % 4 * kDots * 64 + lane / 4 * 16] / 32; }
};

// Brings the activations of a unit into the order of its code vectors.
template <class Unit, class Integer>
ISQ_INLINE void order_activations(const Integer* natural, Integer* ordered) {
  using Facts = UnitFacts<Unit>;
  if constexpr (Facts::kPlainQuarters) {
    for (int p = 0; p < Unit::kWeights; p += 16) {
      std::memcpy(ordered + p, natural + Facts::kOrder.at[p], 16 * sizeof(Integer));
    }
  } else {
    for (int p = 0; p < Unit::kWeights; ++p) ordered[p] = natural[Facts::kOrder.at[p]];
  }
}

// The activations of one unit in the order of its code vectors, and per lane the step and the sum of its group.
template <class Unit>
struct alignas(64) UnitActivations {
  uint8_t q[kActivationBytes<Unit>][Unit::kWeights];
  float step[16];
  union {
    float offset[16];    // kAffine: step * sum(q)
    int32_t center[16];  // otherwise: kCenter * sum(q)
  };
};

template <class Unit>
void pack_activations(const float* x, int64_t k, void* packed) {
  using Facts = UnitFacts<Unit>;
  using Integer = std::conditional_t<Facts::kWide, int16_t, int8_t>;
  constexpr int kWeights = Unit::kWeights;
  UnitActivations<Unit>* out = static_cast<UnitActivations<Unit>*>(packed);
  for (int64_t begin = 0; begin < k; begin += kWeights, ++out) {
    Integer q[kWeights], ordered[kWeights];
    float step[kWeights / 32];
    for (int b = 0; b < kWeights / 32; ++b) {
      const bool there = begin + 32 * b < k;
      step[b] = 0.0f;
      if (there) step[b] = quantize_activations<Facts::kWide ? kLargestWide : 127>(x + begin + 32 * b, q + 32 * b);
      if (!there) std::memset(q + 32 * b, 0, 32 * sizeof(Integer));
    }
    order_activations<Unit>(q, ordered);
    if constexpr (Facts::kWide) {
      store_wide<kWeights>(ordered, out->q[0], out->q[1]);
    } else {
      std::memcpy(out->q, ordered, kWeights);
    }
    for (int lane = 0; lane < 16; ++lane) {
      const Integer* group = ordered + lane % 4 * Facts::kDots * 64 + lane / 4 * 16;
      int sum = 0;
      for (int d = 0; d < Facts::kDots; ++d) {
        for (int j = 0; j < 16; ++j) sum += group[64 * d + j];
      }
      out->step[lane] = step[Facts::group_of_lane(lane)];
      if constexpr (Unit::kAffine) {
        out->offset[lane] = out->step[lane] * (float)sum;
      } else {
        out->center[lane] = Facts::kCenter * sum;
      }
    }
  }
}

template <class Unit>
int64_t packed_activation_bytes(int64_t k) {
  return (k + Unit::kWeights - 1) / Unit::kWeights * (int64_t)sizeof(UnitActivations<Unit>);
}

// ---- several rows of x ----------------------------------------------------------------------------------------------

// Whether the codes are brought into lanes for so many rows of x. That takes two instructions for each register of
// codes; the sums that it spares take six per row of x and 512 bits on x86, and three per 128 bits on arm64. Beside the
// multiplications of activations as 16-bit numbers, the sums hardly count.
template <class Unit>
constexpr bool in_lanes(int tokens) {
  return tokens >= (ISQ_VECTOR_FLOATS == 4 ? 8 : 4) && !(kActivationBytes<Unit> == 2 && kWideWords);
}

// Codes or activations of a unit: from runs of vectors whose quarters belong to lanes to vectors whose words do.
template <class Unit>
ISQ_INLINE void quarters_to_lanes(Bytes* v) {
  constexpr int kDots = UnitFacts<Unit>::kDots;
  for (int d = 0; d < kDots; ++d) {
    transpose_quarters({v + d, v + kDots + d, v + 2 * kDots + d, v + 3 * kDots + d});
  }
}

// Copies a packed row of x to row `token` of `tokens` rows that are multiplied together. They are unit by unit, so that
// the rows of a unit are neighbours in memory.
template <class Unit>
void place_activations(const void* row, int64_t k, int tokens, int token, void* together) {
  const UnitActivations<Unit>* from = static_cast<const UnitActivations<Unit>*>(row);
  UnitActivations<Unit>* to = static_cast<UnitActivations<Unit>*>(together) + token;
  for (int64_t begin = 0; begin < k; begin += Unit::kWeights, ++from, to += tokens) {
    *to = *from;
    if (!in_lanes<Unit>(tokens)) continue;
    for (int part = 0; part < kActivationBytes<Unit>; ++part) {
      Bytes q[UnitFacts<Unit>::kVectors];
      for (int v = 0; v < UnitFacts<Unit>::kVectors; ++v) q[v] = load_64(from->q[part] + 64 * v);
      quarters_to_lanes<Unit>(q);
      for (int v = 0; v < UnitFacts<Unit>::kVectors; ++v) store_64(q[v], to->q[part] + 64 * v);
    }
  }
}

// How many rows of x are multiplied side by side, and how many sums each of them has meanwhile: as many as there are
// registers for. An instruction waits for the one before it in the same sum.
constexpr int kSideBySide = ISQ_VECTOR_FLOATS == 16 ? 8 : 2;
template <int kTokens>
constexpr int kSumsOfRow = kTokens <= 4 ? 2 : 1;

// Per lane, the sum of the products of its group, for each row of x; codes and activations are in lanes.
template <class Unit, int kTokens>
ISQ_INLINE void lane_dots(const Bytes* codes, const UnitActivations<Unit>* x, Ints* sums) {
  using Facts = UnitFacts<Unit>;
  constexpr int kSums = kSumsOfRow<kTokens>;
  Ints part_sums[kSums][kTokens];
  ISQ_UNROLL
  for (int s = 0; s < kSums; ++s) {
    ISQ_UNROLL
    for (int m = 0; m < kTokens; ++m) part_sums[s][m] = all_lanes(0);
  }
  if constexpr (Facts::kWide && kSums == 2) {  // a sum for each term
    ISQ_UNROLL
    for (int v = 0; v < Facts::kVectors; ++v) {
      ISQ_UNROLL
      for (int m = 0; m < kTokens; ++m) {
        ISQ_UNROLL
        for (int part = 0; part < 2; ++part) {
          const Bytes q = load_64(x[m].q[part] + 64 * v);
          part_sums[part][m] = add_dot_products<1, Unit::kMaxCode>(part_sums[part][m], codes + v, &q);
        }
      }
    }
    ISQ_UNROLL
    for (int m = 0; m < kTokens; ++m) part_sums[0][m] = shift_left(part_sums[0][m], kTermBits);
  } else {
    constexpr int kTogether = std::min(kDotsTogether<Unit::kMaxCode>, Facts::kVectors);
    ISQ_UNROLL
    for (int part = 0; part < kActivationBytes<Unit>; ++part) {
      ISQ_UNROLL
      for (int m = 0; part > 0 && m < kTokens; ++m) part_sums[0][m] = shift_left(part_sums[0][m], kTermBits);
      ISQ_UNROLL
      for (int v = 0; v < Facts::kVectors; v += kTogether) {
        ISQ_UNROLL
        for (int m = 0; m < kTokens; ++m) {
          Bytes q[kTogether];
          for (int d = 0; d < kTogether; ++d) q[d] = load_64(x[m].q[part] + 64 * (v + d));
          Ints& to = part_sums[v / kTogether % kSums][m];
          to = add_dot_products<kTogether, Unit::kMaxCode>(to, codes + v, q);
        }
      }
    }
  }
  ISQ_UNROLL
  for (int m = 0; m < kTokens; ++m) {
    sums[m] = part_sums[0][m];
    ISQ_UNROLL
    for (int s = 1; s < kSums; ++s) sums[m] = sums[m] + part_sums[s][m];
  }
}

// The same where codes and activations are in quarters.
template <class Unit>
ISQ_INLINE Ints quarter_dots(const Bytes* codes, const UnitActivations<Unit>& a) {
  using Facts = UnitFacts<Unit>;
  Ints t[4];
  for (int i = 0; i < 4; ++i) {
    Bytes q[kActivationBytes<Unit>][Facts::kDots];
    for (int part = 0; part < kActivationBytes<Unit>; ++part) {
      for (int d = 0; d < Facts::kDots; ++d) q[part][d] = load_64(a.q[part] + (i * Facts::kDots + d) * 64);
    }
    if constexpr (Facts::kWide) {
      t[i] = wide_dots<Facts::kDots>(codes + i * Facts::kDots, q[0], q[1]);
    } else {
      t[i] = dot_products<Facts::kDots, Unit::kMaxCode>(codes + i * Facts::kDots, q[0]);
    }
  }
  return sum_quarters<Facts::kLargestSum>(t);
}

// ---- the product ----------------------------------------------------------------------------------------------------

// Multiplies one unit by kTokens rows of x.
template <class Unit, int kTokens>
ISQ_INLINE void multiply_unit(const uint8_t* unit, const UnitLayout& layout, const UnitActivations<Unit>* x,
                              Floats* acc) {
  using Facts = UnitFacts<Unit>;
  Bytes codes[Facts::kVectors];
  Floats scale, offset;
  Unit::load(unit, layout, codes, &scale, &offset);
  constexpr bool kInLanes = in_lanes<Unit>(kTokens);
  if constexpr (kInLanes) quarters_to_lanes<Unit>(codes);
  if constexpr (Unit::kAffine && Facts::kSigned) offset = multiply_add(scale, all_lanes(128.0f), offset);
  constexpr int kAtOnce = kInLanes ? std::min(kTokens, kSideBySide) : 1;
  static_assert(kTokens % kAtOnce == 0);
  for (int first = 0; first < kTokens; first += kAtOnce) {
    Ints sums[kAtOnce];
    if constexpr (kInLanes) {
      lane_dots<Unit, kAtOnce>(codes, x + first, sums);
    } else {
      sums[0] = quarter_dots<Unit>(codes, x[first]);
    }
    for (int t = 0; t < kAtOnce; ++t) {
      const UnitActivations<Unit>& a = x[first + t];
      Floats& total = acc[first + t];
      if constexpr (!Unit::kAffine && Facts::kCenter != 0) sums[t] = sums[t] - load_ints_16(a.center);
      total = multiply_add(to_floats(sums[t]), scale * load_floats_16(a.step), total);
      if constexpr (Unit::kAffine) total = multiply_add(offset, load_floats_16(a.offset), total);
    }
  }
}

// Weights needed soon go to the first-level cache, later ones to the second-level cache. With the hardware prefetchers
// alone, a fifth of the bandwidth of memory is unused, and a third of that of the third-level cache.
constexpr int64_t kSoon = 1024, kLater = 8192;
ISQ_INLINE void prefetch_weights(const uint8_t* w, int64_t bytes, int64_t later = kLater) {
  for (int64_t b = 0; b < bytes; b += 64) {
    ISQ_PREFETCH(w + kSoon + b);
    ISQ_PREFETCH(w + later + b, 0, 2);
  }
}

// More than two rows of x do not fit into the first-level cache as a whole. So a part of them is multiplied by a few
// rows of weights before its next part is read.
constexpr int64_t kPartBytes = 24576;
constexpr int kPartRows = 32;

// Where the weights needed later lie, from those of `unit` on: in the next part of the same row, or in the first part
// of a row to come.
inline int64_t later_weights(int64_t unit, int64_t units, int64_t part, int64_t unit_bytes, int64_t row_bytes) {
  if (part >= units) return kLater;
  return unit + part < units ? part * unit_bytes : kPartRows * row_bytes - unit * unit_bytes;
}

// Computes y of all rows of a job. multiply(row, begin, end, later, acc) adds the products of the units begin .. end
// - 1 of a row of weights. x_bytes: of a unit of one row of x.
template <int kTokens, class Multiply>
ISQ_INLINE void multiply_in_parts(const RowsJob& job, int64_t units, int64_t unit_bytes, int64_t x_bytes,
                                  const Multiply& multiply) {
  const int64_t part = kTokens <= 2 ? units : std::max<int64_t>(kPartBytes / (kTokens * x_bytes), 1);
  for (int64_t first = 0; first < job.rows; first += kPartRows) {
    const int64_t last = std::min(first + kPartRows, job.rows);
    Floats sums[kPartRows][kTokens];
    for (int64_t begin = 0; begin < units; begin += part) {
      const int64_t end = std::min(begin + part, units);
      const int64_t later = later_weights(begin, units, part, unit_bytes, job.row_bytes);
      for (int64_t row = first; row < last; ++row) {
        Floats acc[kTokens];
        for (int m = 0; m < kTokens; ++m) acc[m] = begin == 0 ? all_lanes(0.0f) : sums[row - first][m];
        multiply(row, begin, end, later, acc);
        for (int m = 0; m < kTokens; ++m) {
          if (end < units) {
            sums[row - first][m] = acc[m];
          } else {
            job.y[m * job.ldy + row] = sum(acc[m]);
          }
        }
      }
    }
  }
}

template <class Unit, int kTokens>
void multiply_rows_of(const RowsJob& job) {
  const int64_t units = (job.k + Unit::kWeights - 1) / Unit::kWeights;
  const int64_t unit_bytes = Unit::kBytes ? Unit::kBytes : job.layout.unit_bytes;
  const UnitActivations<Unit>* x = static_cast<const UnitActivations<Unit>*>(job.x);
  alignas(64) uint8_t copy[kMaxUnitBytes + 64] = {};
  multiply_in_parts<kTokens>(job, units, unit_bytes, sizeof *x,
                             [&](int64_t row, int64_t begin, int64_t end, int64_t later, Floats* acc) ISQ_INLINE_BODY {
                               const uint8_t* w = job.w + row * job.row_bytes;
                               // Whole units are read in place. The rest of a row is read from a copy padded with
                               // zeros, and so is the last unit of all if loads may read beyond it and memory may end
                               // there. The last row may copy more than the rows before it, never less, so what follows
                               // the copied bytes stays zero.
                               const bool at_end = Unit::kReadsBeyond > 0 && job.w_ends && row == job.rows - 1;
                               const int64_t whole =
                                   at_end ? (job.row_bytes - 1) / unit_bytes : job.row_bytes / unit_bytes;
                               for (int64_t u = begin; u < std::min(end, whole); ++u) {
                                 prefetch_weights(w + u * unit_bytes, unit_bytes, later);
                                 multiply_unit<Unit, kTokens>(w + u * unit_bytes, job.layout, x + u * kTokens, acc);
                               }
                               if (whole < end) {
                                 std::memcpy(copy, w + whole * unit_bytes, job.row_bytes - whole * unit_bytes);
                                 multiply_unit<Unit, kTokens>(copy, job.layout, x + whole * kTokens, acc);
                               }
                             });
}

// For a single row of x there is little work per unit, so a branch on the header in each unit would be noticeable.
template <class Unit, int kTokens>
void multiply_rows(const RowsJob& job) {
  if constexpr (kTokens == 1 && Unit::kBytes == 0) {
    switch (job.layout.header) {
      case UnitHeader::kScaleBiasBf16:
        return multiply_rows_of<typename Unit::template With<UnitHeader::kScaleBiasBf16>, 1>(job);
      case UnitHeader::kScaleBiasF16:
        return multiply_rows_of<typename Unit::template With<UnitHeader::kScaleBiasF16>, 1>(job);
      default:
        return multiply_rows_of<typename Unit::template With<UnitHeader::kScaleZeroF16>, 1>(job);
    }
  } else {
    multiply_rows_of<Unit, kTokens>(job);
  }
}

}  // namespace isqtorch::ISQ_ISA
