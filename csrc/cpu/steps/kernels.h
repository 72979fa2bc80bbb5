// The kernels of a decoding step for one instruction-set level, in namespace isqtorch::ISQ_ISA.
#pragma once

#include "cpu/convert.h"
#include "cpu/steps.h"

namespace isqtorch::ISQ_ISA {

ISQ_INLINE LaneFloats load_lanes(const float* p) {
  LaneFloats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
ISQ_INLINE void save_lanes(LaneFloats v, float* p) { std::memcpy(p, &v, sizeof v); }

// a * b + c, with one rounding where the level has such an instruction.
ISQ_INLINE LaneFloats fused(LaneFloats a, LaneFloats b, LaneFloats c) {
#if ISQ_VECTOR_FLOATS == 16
  return (LaneFloats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif ISQ_VECTOR_FLOATS == 8
  return (LaneFloats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (LaneFloats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

template <int n>
ISQ_INLINE float sum_of_lanes(typename Vector<n>::Float v) {
  typename Vector<n / 2>::Float half[2];
  std::memcpy(half, &v, sizeof half);
  if constexpr (n == 4) {
    half[0] += half[1];
    return half[0][0] + half[0][1];
  } else {
    return sum_of_lanes<n / 2>(half[0] + half[1]);
  }
}
ISQ_INLINE float sum_of(LaneFloats v) { return sum_of_lanes<kWidth>(v); }

// exp with an error below one ulp. torch computes SiLU with this polynomial of SLEEF (expf, 1.0 ulp): exp(r) for
// |r| <= ln 2 / 2, times a power of two, which is split because 2^128 is no f32.
ISQ_INLINE LaneFloats exponential(LaneFloats x) {
  // 1.5 * 2^23 makes the sum an integer, rounded to nearest even. Outside of these bounds the result is 0 or infinite.
  const LaneFloats bounded = clamp(x, -105.0f, 101.0f);
  const LaneFloats q =
      (bounded * 1.442695040888963407359924681001892137426645954152985934135449406931f + 12582912.0f) - 12582912.0f;
  LaneFloats r = fused(q, splat<LaneFloats>(-0.693145751953125f), bounded);
  r = fused(q, splat<LaneFloats>(-1.428606765330187045e-06f), r);
  LaneFloats u = splat<LaneFloats>(0.000198527617612853646278381f);
  constexpr float kPolynomial[] = {0.00139304355252534151077271f, 0.00833336077630519866943359f,
                                   0.0416664853692054748535156f, 0.166666671633720397949219f, 0.5f};
  for (int i = 0; i < 5; ++i) u = fused(u, r, splat<LaneFloats>(kPolynomial[i]));
  u = fused(r * r, u, r) + 1.0f;
  const LaneInts power = truncate(q), half = power >> 1;
  u = u * as_float((half + 127) << 23) * as_float((power - half + 127) << 23);
  u = select(x < -104.0f, 0.0f, u);
  u = select(x > 100.0f, ISQ_INFINITY, u);
  return select(x == x, u, x);  // NaN stays NaN
}

void round_values(float* values, int64_t n, Dtype dtype) {
  if (dtype == Dtype::kF16) {
    for (int64_t i = 0; i < n; ++i) values[i] = f16_to_f32(f32_to_f16(values[i]));
  } else if (dtype == Dtype::kBf16) {
    for (int64_t i = 0; i < n; ++i) values[i] = bf16_to_f32(f32_to_bf16(values[i]));
  }
}

// The sum of squares in the order of torch's `sum` over a contiguous row: four vectors side by side, in steps of
// sixteen or more, whose sums are added on four levels (the cascade keeps rounding errors small). tests/test_steps.py
// compares the bits. Vectors of torch have `lanes` floats, which need not be ours.
template <int lanes>
ISQ_INLINE float sum_of_squares(const float* x, int64_t n) {
  typedef typename Vector<lanes>::Float V;
  constexpr int kBeside = 4, kLevels = 4;
  const auto square = [&](int64_t vector) {
    V v;
    std::memcpy(&v, x + vector * lanes, sizeof v);
    return v * v;
  };
  const int64_t vectors = n / lanes, steps = vectors / kBeside;
  int64_t log = 0;
  while ((int64_t{1} << log) < steps) ++log;
  const int64_t power = log / kLevels > 4 ? log / kLevels : 4, step = int64_t{1} << power;
  V sums[kLevels][kBeside] = {};
  int64_t i = 0;
  while (i + step <= steps) {
    for (int64_t j = 0; j < step; ++j, ++i) {
      for (int b = 0; b < kBeside; ++b) sums[0][b] += square(i * kBeside + b);
    }
    for (int level = 1; level < kLevels; ++level) {
      for (int b = 0; b < kBeside; ++b) {
        sums[level][b] += sums[level - 1][b];
        sums[level - 1][b] = V{};
      }
      if (i & ((step - 1) << (level * power))) break;
    }
  }
  for (; i < steps; ++i) {
    for (int b = 0; b < kBeside; ++b) sums[0][b] += square(i * kBeside + b);
  }
  for (int level = 1; level < kLevels; ++level) {
    for (int b = 0; b < kBeside; ++b) sums[0][b] += sums[level][b];
  }
  for (int64_t v = steps * kBeside; v < vectors; ++v) sums[0][0] += square(v);
  for (int b = 1; b < kBeside; ++b) sums[0][0] += sums[0][b];
  float total = 0;
  for (int64_t j = vectors * lanes; j < n; ++j) total += x[j] * x[j];
  for (int l = 0; l < lanes; ++l) total += sums[0][0][l];
  return total;
}

void norm(const NormJob& job) {
  const int64_t n = job.n;
  const float squares = job.lanes == 16  ? sum_of_squares<16>(job.x, n)
                        : job.lanes == 8 ? sum_of_squares<8>(job.x, n)
                                         : sum_of_squares<4>(job.x, n);
  const float factor = 1.0f / ISQ_SQRT(squares / static_cast<float>(n) + job.eps);
  switch (job.style) {
    case NormStyle::kRounded:
      for (int64_t i = 0; i < n; ++i) job.y[i] = job.x[i] * factor;
      round_values(job.y, n, job.dtype);
      for (int64_t i = 0; i < n; ++i) job.y[i] *= job.weight[i];
      break;
    case NormStyle::kScaled:
      for (int64_t i = 0; i < n; ++i) job.y[i] = job.x[i] * factor * job.weight[i];
      break;
    case NormStyle::kOnePlus:
      for (int64_t i = 0; i < n; ++i) job.y[i] = job.x[i] * factor * (1.0f + job.weight[i]);
      break;
  }
  round_values(job.y, n, job.dtype);
}

void gate(float* gate, const float* up, int64_t n, Dtype dtype) {
  const int64_t whole = n - n % kWidth;
  int64_t i = 0;
  for (; i < whole; i += kWidth) {
    const LaneFloats x = load_lanes(gate + i);
    save_lanes(x / (exponential(-x) + 1.0f), gate + i);
  }
  for (; i < n; ++i) gate[i] = gate[i] / (1.0f + std::exp(-gate[i]));  // as torch does
  round_values(gate, n, dtype);
  for (int64_t j = 0; j < n; ++j) gate[j] *= up[j];
  round_values(gate, n, dtype);
}

void rotate(float* head, const float* cos, const float* sin, int64_t n, Dtype dtype) {
  constexpr int64_t kPiece = 64;
  const int64_t half = n / 2;
  float parts[4 * kPiece];  // the four products, each rounded before two of them are added
  for (int64_t begin = 0; begin < half; begin += kPiece) {
    const int64_t count = half - begin < kPiece ? half - begin : kPiece;
    float *a = head + begin, *b = head + half + begin;
    const float *c = cos + begin, *s = sin + begin;
    for (int64_t i = 0; i < count; ++i) {
      parts[i] = a[i] * c[i];
      parts[kPiece + i] = -b[i] * s[i];
      parts[2 * kPiece + i] = b[i] * c[half + i];
      parts[3 * kPiece + i] = a[i] * s[half + i];
    }
    for (int p = 0; p < 4; ++p) round_values(parts + p * kPiece, count, dtype);
    for (int64_t i = 0; i < count; ++i) {
      a[i] = parts[i] + parts[kPiece + i];
      b[i] = parts[2 * kPiece + i] + parts[3 * kPiece + i];
    }
    round_values(a, count, dtype);
    round_values(b, count, dtype);
  }
}

// Some columns of keys or values as f32 rows [kStepColumns, padded], with zeros behind each. In f32 they are not copied
// if they fill whole vectors.
ISQ_INLINE const float* rows_of(const StepAttendJob& job, const uint8_t* from, int64_t column, int64_t count) {
  const int64_t item = job.dtype == Dtype::kF32 ? 4 : 2;
  const uint8_t* source = from + column * job.dim * item;
  if (job.dim == job.padded) {
    if (job.dtype == Dtype::kF32) return reinterpret_cast<const float*>(source);
    load_floats(source, job.dtype, count * job.dim, job.rows);
  } else {
    for (int64_t c = 0; c < count; ++c) {
      load_floats(source + c * job.dim * item, job.dtype, job.dim, job.rows + c * job.padded);
      for (int64_t i = job.dim; i < job.padded; ++i) job.rows[c * job.padded + i] = 0;
    }
  }
  return job.rows;
}

// Products of a query with `columns` keys. Sums of several columns side by side do not wait for each other.
template <int columns>
ISQ_INLINE void score_columns(const float* q, const float* keys, int64_t padded, float scale, float* scores) {
  LaneFloats sums[columns];
  for (int c = 0; c < columns; ++c) sums[c] = load_lanes(q) * load_lanes(keys + c * padded);
  for (int64_t i = kWidth; i < padded; i += kWidth) {
    const LaneFloats part = load_lanes(q + i);
    for (int c = 0; c < columns; ++c) sums[c] = fused(part, load_lanes(keys + c * padded + i), sums[c]);
  }
  for (int c = 0; c < columns; ++c) scores[c] = sum_of(sums[c]) * scale;
}

// Adds values [count, padded] times their weights to `vectors` vectors of a sum, which stay in registers.
template <int vectors>
ISQ_INLINE void add_values(const float* weights, const uint8_t* mask, const float* values, int64_t count,
                           int64_t padded, float* out) {
  LaneFloats sums[vectors];
  for (int v = 0; v < vectors; ++v) sums[v] = load_lanes(out + v * kWidth);
  for (int64_t c = 0; c < count; ++c) {
    if (mask && !mask[c]) continue;
    const LaneFloats weight = splat<LaneFloats>(weights[c]);
    for (int v = 0; v < vectors; ++v) {
      sums[v] = fused(weight, load_lanes(values + c * padded + v * kWidth), sums[v]);
    }
  }
  for (int v = 0; v < vectors; ++v) save_lanes(sums[v], out + v * kWidth);
}

void attend(const StepAttendJob& job) {
  constexpr int kBeside = 4;
  const int64_t n = job.columns, padded = job.padded, stride = (n + kStepLanes - 1) / kStepLanes * kStepLanes;
  for (int64_t begin = 0; begin < n; begin += kStepColumns) {
    const int64_t count = n - begin < kStepColumns ? n - begin : kStepColumns;
    const float* keys = rows_of(job, job.keys, begin, count);
    for (int64_t h = 0; h < job.heads; ++h) {
      const float* q = job.q + h * padded;
      float* scores = job.scores + h * stride + begin;
      int64_t c = 0;
      for (; c + kBeside <= count; c += kBeside) {
        score_columns<kBeside>(q, keys + c * padded, padded, job.scale, scores + c);
      }
      for (; c < count; ++c) score_columns<1>(q, keys + c * padded, padded, job.scale, scores + c);
      for (int64_t i = 0; job.mask && i < count; ++i) {
        if (!job.mask[begin + i]) scores[i] = -ISQ_INFINITY;
      }
    }
  }
  for (int64_t h = 0; h < job.heads; ++h) {
    float* scores = job.scores + h * stride;
    for (int64_t c = n; c < stride; ++c) scores[c] = -ISQ_INFINITY;
    LaneFloats most = load_lanes(scores);
    for (int64_t c = kWidth; c < stride; c += kWidth) most = max(load_lanes(scores + c), most);
    float largest = most[0];
    for (int l = 1; l < kWidth; ++l) largest = most[l] > largest ? most[l] : largest;
    // A NaN is a result, not a maximum. If nothing is seen, every difference must be -infinity and not NaN.
    const float from = largest == -ISQ_INFINITY ? 0.0f : largest;
    LaneFloats sum = splat<LaneFloats>(0.0f);
    for (int64_t c = 0; c < stride; c += kWidth) {
      const LaneFloats e = exponential(load_lanes(scores + c) - from);
      save_lanes(e, scores + c);
      sum = sum + e;
    }
    job.largest[h] = largest;
    job.sums[h] = sum_of(sum);
  }
  for (int64_t i = 0; i < job.heads * padded; ++i) job.out[i] = 0;
  for (int64_t begin = 0; begin < n; begin += kStepColumns) {
    const int64_t count = n - begin < kStepColumns ? n - begin : kStepColumns;
    const uint8_t* mask = job.mask ? job.mask + begin : nullptr;
    const float* values = rows_of(job, job.values, begin, count);
    for (int64_t h = 0; h < job.heads; ++h) {
      const float* weights = job.scores + h * stride + begin;
      float* out = job.out + h * padded;
      int64_t i = 0;
      for (; i + kBeside * kWidth <= padded; i += kBeside * kWidth) {
        add_values<kBeside>(weights, mask, values + i, count, padded, out + i);
      }
      for (; i < padded; i += kWidth) add_values<1>(weights, mask, values + i, count, padded, out + i);
    }
  }
}

StepKernels step_kernels() { return {norm, gate, rotate, round_values, attend}; }

}  // namespace isqtorch::ISQ_ISA
