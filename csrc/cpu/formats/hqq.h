// HQQ, half-quadratic quantization: w = (code - zero) * scale with f16 scale and zero.
//
// The scale comes from the group's range. The zero point is moved in steps to where the p-norm of the error is least (p
// = 0.7, so that outliers count less). The steps end when the mean error of the whole matrix no longer falls, so all
// groups take each step together (mobiusml/hqq, core/optimize.py: optimize_weights_proximal_legacy). Afterwards
// Rule::kSearch looks for a better scale and zero point in each group.
//
// The package allows no step below 5e-5. A group of small weights takes part in the steps as in the package, so that
// the other groups get the package's bytes. What is stored for it is the line from its smallest to its largest weight.
#pragma once

#include "cpu/formats/affine.h"
#include "cpu/formats/bitstream.h"
#include "cpu/formats/list.h"
#include "cpu/quantize/line_fit.h"
#include "searches/power.h"

namespace isqtorch::ISQ_ISA {

template <int kBits, int kGroup>
struct Hqq {
#pragma pack(push, 1)
  struct Block {
    uint16_t scale, zero;  // f16
    uint8_t codes[kGroup * kBits / 8];
  };
#pragma pack(pop)
  static constexpr int kBlock = kGroup, kMax = (1 << kBits) - 1;

  static void decode(const Block& block, float* w) {
    const float scale = f16_to_f32(block.scale), zero = f16_to_f32(block.zero);
    load_stream<kBits>(block.codes, kGroup, w, [=](F8 codes) { return (codes - zero) * scale; });
  }

  static QuantizeResult quantize(const QuantizeJob& job) {
    Matrix matrix(job);
    matrix.start();
    double best = __builtin_inf();
    for (int step = 0; step < kSteps; ++step) {
      const double error = matrix.move_zeros();
      if (!(error < best)) break;  // the last move is kept, as in the hqq package
      best = error;
    }
    matrix.store();
    return matrix.result;
  }

 private:
  static constexpr int kSteps = 20;
  static constexpr float kBeta = 10.0f, kPower = 0.7f - 1.0f;
  static constexpr float kLargestInverse = 2e4f, kSmallestStep = 5e-5f;
  static constexpr float kFlat = 1e-4f;  // a group of smaller range counts as constant
  static constexpr float kLargestF16 = 65504.0f, kSmallestF16 = 0x1p-24f;
  static constexpr float kExact = 2000.0f;     // integers up to 2048 are exact in f16
  static constexpr float kShrinkFrom = 0.17f;  // for |e| < 0.1^(1/1.3) = 0.1701 the result is 0

  static LaneFloats integer_for(LaneFloats x, LaneFloats inverse, LaneFloats zero) {
    return clamp(round_even(x * inverse + zero), 0.0f, (float)kMax);
  }

  // sign(e) * max(0, |e| - |e|^(p - 1) / beta)
  static LaneFloats shrink(LaneFloats e) {
    const LaneFloats zero = splat<LaneFloats>(0.0f), size = abs(e);
    const LaneInts large = size >= kShrinkFrom;
    if (!any(large)) return zero;
    const LaneFloats rest = size - power(max(size, splat<LaneFloats>(kShrinkFrom)), kPower) / kBeta;
    const LaneFloats with_sign = as_float(as_int(rest) | (as_int(e) & (int32_t)0x80000000));
    return select(large & (rest > 0.0f), with_sign, zero);
  }

  // The matrix and the state of its solver: the inverse scale and the zero point of every group, as vectors with one
  // group per lane.
  struct Matrix {
    const QuantizeJob& job;
    const int64_t groups, units;
    LaneFloats *inverse, *zero;  // [units]
    LaneDoubles* errors;         // [units]: sums of |e|, to be added in an order that does not depend on threads
    QuantizeResult result;

    explicit Matrix(const QuantizeJob& j)
        : job(j),
          groups(j.rows * (j.k / kGroup)),
          units((groups + kWidth - 1) / kWidth),
          inverse(new LaneFloats[units]),
          zero(new LaneFloats[units]),
          errors(new LaneDoubles[units]) {}
    ~Matrix() {
      delete[] inverse;
      delete[] zero;
      delete[] errors;
    }
    Matrix(const Matrix&) = delete;
    Matrix& operator=(const Matrix&) = delete;

    template <class Body>
    void for_units(const Body& body, bool weighted = false) {
      for_range(job, units, 1 + (1 << 14) / (kWidth * kGroup), [&](int64_t begin, int64_t end) {
        LaneBlocks<kGroup> lanes;
        lanes.weighted = weighted;
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t left = groups - unit * kWidth, count = left < kWidth ? left : kWidth;
          load_blocks(job, unit * kWidth, count, lanes, &result.bad_weight);
          body(unit, count, lanes);
        }
      });
    }

    void start() {
      for_units([&](int64_t unit, int64_t, const LaneBlocks<kGroup>& in) {
        LaneFloats low, high;
        first_min_max(in.x, kGroup, &low, &high);
        const LaneFloats span = high - low;
        const LaneFloats exact = select(span <= kFlat, 1.0f, (float)kMax / span);
        inverse[unit] = select(exact > kLargestInverse, kLargestInverse, exact);
        zero[unit] = -low * inverse[unit];
        if (kBits == 4) zero[unit] = round_even(zero[unit]);  // the hqq package's default for 4 bits
      });
    }

    // One step for every group. Returns the mean |error| before it.
    double move_zeros() {
      for_units([&](int64_t unit, int64_t, const LaneBlocks<kGroup>& in) {
        const LaneFloats s = inverse[unit], z = zero[unit];
        LaneDoubles moved = {}, size = {};
        for (int i = 0; i < kGroup; ++i) {
          const LaneFloats q = integer_for(in.x[i], s, z);
          const LaneFloats e = in.x[i] - (q - z) / s;
          moved += to_double(q - (in.x[i] - shrink(e)) * s);
          size += to_double(abs(e));
        }
        zero[unit] = to_float(moved / (double)kGroup);
        errors[unit] = size;
      });
      double sum = 0;
      for (int64_t first = 0; first < groups; first += 16) {  // sixteen at a time on every ISA level
        double part = 0;
        for (int64_t g = first; g < first + 16 && g < groups; ++g) part += errors[g / kWidth][g % kWidth];
        sum += part;
      }
      return sum / ((double)groups * kGroup);
    }

    // Rounds scale and zero to f16 and computes the codes with the rounded ones. A zero beyond f16 (a narrow group far
    // from 0) is never stored as infinity: such a group gets a coarser scale that puts the zero at +-2000. A group of
    // small weights gets a finer scale than the solver's steps, if its zero stays within +-2000.
    void store() {
      const bool search = job.rule == Rule::kSearch;
      for_units(
          [&](int64_t unit, int64_t count, const LaneBlocks<kGroup>& in) {
            const LaneFloats exact_scale = 1.0f / inverse[unit];
            const LaneFloats offset = zero[unit] * exact_scale;
            const LaneInts far = abs(zero[unit]) > kLargestF16;
            LaneFloats low, high;
            first_min_max(in.x, kGroup, &low, &high);
            const LaneFloats least = max(abs(low) / kExact, splat<LaneFloats>(kSmallestF16));
            const LaneFloats fine = scale_to_f16(max((high - low) / (float)kMax, least)).value;
            const LaneInts small = (low < high) & (fine < kSmallestStep);
            Halves scale = to_f16(select(small, fine, select(far, abs(offset) / kExact, exact_scale)));
            const LaneFloats solved = select(far, round_even(offset / scale.value), zero[unit]);
            Halves zero_point = to_f16(select(small, round_even(-low / scale.value), solved));
            LaneInts codes[kGroup];
            for (int i = 0; i < kGroup; ++i) {
              codes[i] = truncate(clamp(round_even(in.x[i] / scale.value + zero_point.value), 0.0f, (float)kMax));
            }
            if (search) {
              HqqLine line = {scale.value, zero_point.value};
              fit_lines(in, kMax, true, &line, codes);
              scale = to_f16(line.scale);
              zero_point = to_f16(line.second);
            }
            const LaneInts overflow = scale.overflow | zero_point.overflow | (in.largest > kLargestWithF16Scales);
            Block packed[kWidth];
            for (int l = 0; l < count; ++l) {
              packed[l].scale = scale.bits[l];
              packed[l].zero = zero_point.bits[l];
              store_stream<kBits>(codes, l, kGroup, packed[l].codes);
              if (overflow[l]) lower_to(&result.overflow_at, (unit * kWidth + l) * kGroup);
            }
            std::memcpy(job.out + unit * kWidth * sizeof(Block), packed, count * sizeof(Block));
          },
          search && job.importance);
    }
  };
};

template <int kBits, int kGroup>
struct KernelsOf<Hqq<kBits, kGroup>> {
  using Format = Hqq<kBits, kGroup>;
  static constexpr FormatKernels get(const char* name) {
    return {
        name, kGroup, sizeof(typename Format::Block), rule_bit(Rule::kSearch), decode_blocks<Format>, Format::quantize};
  }
};

}  // namespace isqtorch::ISQ_ISA
