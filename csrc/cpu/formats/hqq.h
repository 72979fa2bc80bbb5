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
struct Hqq : BlockwiseFormat {
#pragma pack(push, 1)
  struct Block {
    uint16_t scale, zero;  // f16
    uint8_t codes[kGroup * kBits / 8];
  };
#pragma pack(pop)
  static constexpr int kBlock = kGroup, kMax = (1 << kBits) - 1;
  static constexpr bool kTakesImportance = false;
  static constexpr uint8_t kRules = rule_bit(Rule::kSearch);

  static void decode(const Block& block, float* w) {
    const float scale = f16_to_f32(block.scale), zero = f16_to_f32(block.zero);
    load_stream<kBits>(block.codes, kGroup, w, [=](F8 codes) { return (codes - zero) * scale; });
  }

  struct Chosen {
    LaneInts codes[kGroup];
    Halves scale, zero;
    LaneInts overflow() const { return scale.overflow | zero.overflow; }
    LaneFloats value(int, LaneInts code) const { return (to_float(code) - zero.value) * scale.value; }
  };
  static constexpr int kLastRank = kMax;

  static QuantizeResult quantize(const QuantizeJob& job) {
    Matrix matrix(job);
    matrix.solve();
    matrix.store();
    return matrix.result;
  }

  static int count_steps(const QuantizeJob& job) { return Matrix(job).solve(); }

  // Takes in.steps steps.
  static void choose(const LaneBlocks<kGroup>& in, Chosen* out) {
    Line line(in);
    LaneDoubles size;
    for (int step = 0; step < in.steps; ++step) line.move(in, &size);
    line.finish(in, out);
  }

  static void store(const Chosen& chosen, Block* out) {
    for (int l = 0; l < kWidth; ++l) {
      out[l].scale = chosen.scale.bits[l];
      out[l].zero = chosen.zero.bits[l];
      store_stream<kBits>(chosen.codes, l, kGroup, out[l].codes);
    }
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

  // The state of the solver for a unit of groups: the inverse scale, and the zero point.
  struct Line {
    LaneFloats inverse, zero;

    Line() = default;
    explicit Line(const LaneBlocks<kGroup>& in) {
      LaneFloats low, high;
      first_min_max(in.x, kGroup, &low, &high);
      const LaneFloats span = high - low;
      const LaneFloats exact = select(span <= kFlat, 1.0f, (float)kMax / span);
      inverse = select(exact > kLargestInverse, kLargestInverse, exact);
      zero = -low * inverse;
      if (kBits == 4) zero = round_even(zero);  // the hqq package's default for 4 bits
    }

    // One step. *size is the sum of |error| before it.
    void move(const LaneBlocks<kGroup>& in, LaneDoubles* size) {
      LaneDoubles moved = {}, sum = {};
      for (int i = 0; i < kGroup; ++i) {
        const LaneFloats q = integer_for(in.x[i], inverse, zero);
        const LaneFloats e = in.x[i] - (q - zero) / inverse;
        moved += to_double(q - (in.x[i] - shrink(e)) * inverse);
        sum += to_double(abs(e));
      }
      zero = to_float(moved / (double)kGroup);
      *size = sum;
    }

    // Rounds scale and zero to f16 and computes the codes with the rounded ones. A zero beyond f16 (a narrow group far
    // from 0) is never stored as infinity: such a group gets a coarser scale that puts the zero at +-2000. A group of
    // small weights gets a finer scale than the solver's steps, if its zero stays within +-2000.
    void finish(const LaneBlocks<kGroup>& in, Chosen* out) const {
      const LaneFloats exact_scale = 1.0f / inverse;
      const LaneFloats offset = zero * exact_scale;
      const LaneInts far = abs(zero) > kLargestF16;
      LaneFloats low, high;
      first_min_max(in.x, kGroup, &low, &high);
      const LaneFloats least = max(abs(low) / kExact, splat<LaneFloats>(kSmallestF16));
      const LaneFloats fine = scale_to_f16(max((high - low) / (float)kMax, least)).value;
      const LaneInts small = (low < high) & (fine < kSmallestStep);
      out->scale = to_f16(select(small, fine, select(far, abs(offset) / kExact, exact_scale)));
      const LaneFloats scale = out->scale.value;
      const LaneFloats solved = select(far, round_even(offset / scale), zero);
      out->zero = to_f16(select(small, round_even(-low / scale), solved));
      for (int i = 0; i < kGroup; ++i) {
        out->codes[i] = truncate(clamp(round_even(in.x[i] / scale + out->zero.value), 0.0f, (float)kMax));
      }
      if (in.rule != Rule::kSearch) return;
      HqqLine line = {scale, out->zero.value};
      fit_lines(in, kMax, true, &line, out->codes);
      out->scale = to_f16(line.scale);
      out->zero = to_f16(line.second);
    }
  };

  // The matrix and the state of its solver, one Line for every unit of groups.
  struct Matrix {
    const QuantizeJob& job;
    const int64_t groups, units;
    Line* lines;          // [units]
    LaneDoubles* errors;  // [units]: sums of |e|, to be added in an order that does not depend on threads
    QuantizeResult result;

    explicit Matrix(const QuantizeJob& j)
        : job(j),
          groups(j.rows * (j.k / kGroup)),
          units((groups + kWidth - 1) / kWidth),
          lines(new Line[units]),
          errors(new LaneDoubles[units]) {}
    ~Matrix() {
      delete[] lines;
      delete[] errors;
    }
    Matrix(const Matrix&) = delete;
    Matrix& operator=(const Matrix&) = delete;

    template <class Body>
    void for_units(const Body& body, bool weighted = false) {
      for_range(job, units, 1 + (1 << 14) / (kWidth * kGroup), [&](int64_t begin, int64_t end) {
        LaneBlocks<kGroup> lanes;
        lanes.weighted = weighted;
        lanes.rule = job.rule;
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t left = groups - unit * kWidth, count = left < kWidth ? left : kWidth;
          load_blocks(job, unit * kWidth, count, lanes, &result.bad_weight);
          body(unit, count, lanes);
        }
      });
    }

    // Returns the number of steps.
    int solve() {
      for_units([&](int64_t unit, int64_t, const LaneBlocks<kGroup>& in) { lines[unit] = Line(in); });
      double best = ISQ_INFINITY;
      for (int step = 1; step <= kSteps; ++step) {
        const double error = move_zeros();
        if (!(error < best)) return step;  // the last move is kept, as in the hqq package
        best = error;
      }
      return kSteps;
    }

    // One step for every group. Returns the mean |error| before it.
    double move_zeros() {
      for_units([&](int64_t unit, int64_t, const LaneBlocks<kGroup>& in) { lines[unit].move(in, &errors[unit]); });
      double sum = 0;
      for (int64_t first = 0; first < groups; first += 16) {  // sixteen at a time on every ISA level
        double part = 0;
        for (int64_t g = first; g < first + 16 && g < groups; ++g) part += errors[g / kWidth][g % kWidth];
        sum += part;
      }
      return sum / ((double)groups * kGroup);
    }

    void store() {
      for_units(
          [&](int64_t unit, int64_t count, const LaneBlocks<kGroup>& in) {
            Chosen chosen;
            lines[unit].finish(in, &chosen);
            Block packed[kWidth];
            Hqq::store(chosen, packed);
            const LaneInts overflow = chosen.overflow() | (in.largest > kLargestWithF16Scales);
            for (int l = 0; l < count; ++l) {
              if (overflow[l]) lower_to(&result.overflow_at, (unit * kWidth + l) * kGroup);
            }
            std::memcpy(job.out + unit * kWidth * sizeof(Block), packed, count * sizeof(Block));
          },
          job.rule == Rule::kSearch && job.importance);
    }
  };
};

template <int kBits, int kGroup>
struct KernelsOf<Hqq<kBits, kGroup>> {
  using Format = Hqq<kBits, kGroup>;
  static constexpr FormatKernels get(const char* name) {
    return {name,
            kGroup,
            sizeof(typename Format::Block),
            Format::kRules,
            decode_blocks<Format>,
            Format::quantize,
            quantize_feedback<Format>};
  }
};

}  // namespace isqtorch::ISQ_ISA
