// Products with few rows of x, limited by reading the weights. A SIMD-group works on four rows of the weight, and each
// of its lanes on one unit of all four, so that x is read and scaled once for four rows. A threadgroup has two
// SIMD-groups.
#include "metal/formats/format.h"

constant constexpr const int kRows = 4, kSimdgroups = 2;

// Loads the unit's part of x in the order of its codes, times part(i), and its sums by groups.
template <class F, class T>
inline void load_x(const device T* x, int unit, thread float (&v)[F::unit], thread float (&sums)[F::groups]) {
  const device T* from = x + place_of<F>(unit);
  for (int g = 0; g < F::groups; ++g) sums[g] = 0.0f;
  for (int i = 0; i < F::unit; ++i) {
    const float value = float(from[F::offset(i)]);
    sums[i * F::groups / F::unit] += value;
    v[i] = value * F::part(i);
  }
}

// y[r][m] += this lane's share of row first + r of the weight times row m of x. Rows past the end repeat the last one.
template <class F, class T, int tokens>
inline void multiply_rows(const device uchar* weight, const device T* x, int first, int n, int k, uint lane,
                          thread float (&y)[kRows][tokens]) {
  const device uchar* rows[kRows];
  for (int r = 0; r < kRows; ++r) rows[r] = weight + ulong(min(first + r, n - 1)) * row_bytes<F>(k);
  for (int unit = int(lane); unit < k / F::unit; unit += 32) {
    float v[tokens][F::unit], sums[tokens][F::groups];
    for (int m = 0; m < tokens; ++m) load_x<F, T>(x + ulong(m) * ulong(k), unit, v[m], sums[m]);
    for (int r = 0; r < kRows; ++r) {
      const device uchar* block = block_of<F>(rows[r], unit);
      const int u = unit % (F::block / F::unit);
      float q[F::unit];
      F::codes(block, u, q);
      for (int g = 0; g < F::groups; ++g) {
        const Scale s = F::scale(block, u, g);
        const float offset = s.offset - s.zero * s.scale;
        for (int m = 0; m < tokens; ++m) {
          float dot = 0.0f;
          for (int i = g * F::unit / F::groups; i < (g + 1) * F::unit / F::groups; ++i) dot = fma(q[i], v[m][i], dot);
          y[r][m] += fma(s.scale, dot, offset * sums[m][g]);
        }
      }
    }
  }
}

// y [m, n] = x [m, k] weight^T + bias; grid: threadgroups of rows, by groups of `tokens` rows of x. m is a multiple of
// tokens.
template <class F, class T, int tokens>
kernel void gemv(const device uchar* weight [[buffer(0)]], const device T* x [[buffer(1)]],
                 const device T* bias [[buffer(2)]], device T* y [[buffer(3)]], constant int& n [[buffer(4)]],
                 constant int& k [[buffer(5)]], constant int& has_bias [[buffer(6)]],
                 uint2 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                 uint lane [[thread_index_in_simdgroup]]) {
  const int first = (int(group.x) * kSimdgroups + int(simdgroup)) * kRows;
  if (first >= n) return;
  float sums[kRows][tokens] = {};
  multiply_rows<F, T, tokens>(weight, x + ulong(group.y) * tokens * ulong(k), first, n, k, lane, sums);
  for (int r = 0; r < kRows; ++r) {
    for (int m = 0; m < tokens; ++m) {
      const float sum = simd_sum(sums[r][m]);
      if (lane == 0 && first + r < n) {
        const ulong at = (ulong(group.y) * tokens + ulong(m)) * ulong(n) + ulong(first + r);
        y[at] = T(has_bias ? sum + float(bias[first + r]) : sum);
      }
    }
  }
}

// y [pairs, n]: row p, for pair p = (token, slot), is x times the weight of expert ids[p], or zeros if ids[p] is not an
// expert on this device. x has a row per token, or per pair if rows_per_slot.
template <class F, class T, class Id>
kernel void experts_gemv(const device uchar* weight [[buffer(0)]], const device T* x [[buffer(1)]],
                         const device T* bias [[buffer(2)]], const device Id* ids [[buffer(3)]],
                         device T* y [[buffer(4)]], constant int& n [[buffer(5)]], constant int& k [[buffer(6)]],
                         constant int& has_bias [[buffer(7)]], constant int& experts [[buffer(8)]],
                         constant int& slots [[buffer(9)]], constant int& rows_per_slot [[buffer(10)]],
                         uint2 group [[threadgroup_position_in_grid]],
                         uint simdgroup [[simdgroup_index_in_threadgroup]],
                         uint lane [[thread_index_in_simdgroup]]) {
  const int first = (int(group.x) * kSimdgroups + int(simdgroup)) * kRows, pair = int(group.y);
  if (first >= n) return;
  const Id expert = ids[pair];
  const bool here = expert >= 0 && expert < Id(experts);
  float sums[kRows][1] = {};
  if (here) {
    const int row = rows_per_slot ? pair : pair / slots;
    multiply_rows<F, T, 1>(weight + ulong(expert) * ulong(n) * row_bytes<F>(k), x + ulong(row) * ulong(k), first, n, k,
                           lane, sums);
  }
  for (int r = 0; r < kRows; ++r) {
    const float sum = simd_sum(sums[r][0]);
    if (lane == 0 && first + r < n) {
      const float plus = here && has_bias ? float(bias[ulong(expert) * ulong(n) + ulong(first + r)]) : 0.0f;
      y[ulong(pair) * ulong(n) + ulong(first + r)] = T(sum + plus);
    }
  }
}

