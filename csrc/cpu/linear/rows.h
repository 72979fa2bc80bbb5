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
// What a format provides (see units_*.h):
//   kWeights           512 or 256 weights per unit
//   kBytes             packed bytes per unit; 0: known at run time, in the layout
//   kReadsBeyond       bytes that loads may touch beyond the unit
//   kMaxCode, kCenter  codes are 0 .. kMaxCode; w = scale * (u - kCenter), or, with kAffine, scale * u + offset
//   weight_at(v, j)    which weight of the unit byte j of code vector v holds. Vectors come in four runs of
//                      kWeights / 256; quarter q of every vector in run i belongs to one group, that of lane 4q + i
//   load(...)          the code vectors, the scales and the offsets
#pragma once

#include "cpu/linear/activations.h"

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

// Multiplies one unit by kTokens rows of x, which are token_stride units apart.
template <class Unit, int kTokens>
ISQ_INLINE void multiply_unit(const uint8_t* unit, const UnitLayout& layout, const UnitActivations<Unit>* x,
                              int64_t token_stride, Floats* acc) {
  using Facts = UnitFacts<Unit>;
  Bytes codes[Facts::kVectors];
  Floats scale, offset;
  Unit::load(unit, layout, codes, &scale, &offset);
  if constexpr (Unit::kAffine && Facts::kSigned) offset = multiply_add(scale, all_lanes(128.0f), offset);
  for (int m = 0; m < kTokens; ++m) {
    const UnitActivations<Unit>& a = x[m * token_stride];
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
    Ints sums = sum_quarters<Facts::kLargestSum>(t);
    if constexpr (!Unit::kAffine && Facts::kCenter != 0) sums = sums - load_ints_16(a.center);
    acc[m] = multiply_add(to_floats(sums), scale * load_floats_16(a.step), acc[m]);
    if constexpr (Unit::kAffine) acc[m] = multiply_add(offset, load_floats_16(a.offset), acc[m]);
  }
}

// Weights needed soon go to the first-level cache, later ones to the second-level cache. With the hardware prefetchers
// alone, a fifth of the bandwidth of memory is unused, and a third of that of the third-level cache.
ISQ_INLINE void prefetch_weights(const uint8_t* w, int64_t bytes) {
  constexpr int64_t kSoon = 1024, kLater = 8192;
  for (int64_t b = 0; b < bytes; b += 64) {
    ISQ_PREFETCH(w + kSoon + b);
    ISQ_PREFETCH(w + kLater + b, 0, 2);
  }
}

template <class Unit, int kTokens>
void multiply_rows_of(const RowsJob& job) {
  constexpr int kWeights = Unit::kWeights;
  const int64_t units = (job.k + kWeights - 1) / kWeights;
  const int64_t unit_bytes = Unit::kBytes ? Unit::kBytes : job.layout.unit_bytes;
  const UnitActivations<Unit>* x = static_cast<const UnitActivations<Unit>*>(job.x);
  alignas(64) uint8_t copy[kMaxUnitBytes + 64] = {};
  for (int64_t row = 0; row < job.rows; ++row) {
    const uint8_t* w = job.w + row * job.row_bytes;
    // Whole units are read in place. The rest of a row is read from a copy padded with zeros, and so is the last unit
    // of all if loads may read beyond it and memory may end there. The last row may copy more than the rows before it,
    // never less, so what follows the copied bytes stays zero.
    const bool at_end = Unit::kReadsBeyond > 0 && job.w_ends && row == job.rows - 1;
    const int64_t whole = at_end ? (job.row_bytes - 1) / unit_bytes : job.row_bytes / unit_bytes;
    Floats acc[kTokens];
    for (int m = 0; m < kTokens; ++m) acc[m] = all_lanes(0.0f);
    for (int64_t u = 0; u < whole; ++u) {
      prefetch_weights(w + u * unit_bytes, unit_bytes);
      multiply_unit<Unit, kTokens>(w + u * unit_bytes, job.layout, x + u, units, acc);
    }
    if (whole < units) {
      std::memcpy(copy, w + whole * unit_bytes, job.row_bytes - whole * unit_bytes);
      multiply_unit<Unit, kTokens>(copy, job.layout, x + whole, units, acc);
    }
    for (int m = 0; m < kTokens; ++m) job.y[m * job.ldy + row] = sum(acc[m]);
  }
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
