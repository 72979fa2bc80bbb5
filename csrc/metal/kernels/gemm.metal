// Products with many rows of x, limited by arithmetic. A threadgroup computes a tile of y, 32 rows of the weight wide.
// Each of its 128 threads decodes a unit of the weight into threadgroup memory. Its four SIMD-groups multiply that by a
// tile of x with their matrix units, 8 x 8 at a time.
#include "metal/formats/format.h"

constant constexpr const int kTileN = 32, kThreads = 128;

// The element type of the tiles: half for half, otherwise float, because not every GPU multiplies bfloat matrices.
// Float tiles have half the height, so that both fit into 32 KB.
template <class T>
struct Tile {
  using Element = float;
  static constant constexpr const int rows = 16;
};
template <>
struct Tile<half> {
  using Element = half;
  static constant constexpr const int rows = 32;
};

// Columns per step: four units of the weight's rows. Rows of a tile are padded to spread them over the memory banks.
template <class F>
struct Step {
  static constant constexpr const int columns = 4 * F::unit, stride = columns + 8;
};

// Multiplies `count` rows of x, from row `first` on; if `sorted`, row order[first + i] / divisor.
template <class F, class T, bool sorted>
inline void multiply_tile(const device uchar* weight, const device T* x, const device T* bias, device T* y,
                          const device int* order, int first, int count, int divisor, int n0, int n, int k,
                          bool has_bias, threadgroup typename Tile<T>::Element* ws,
                          threadgroup typename Tile<T>::Element* xs, threadgroup float* out, uint thread_at,
                          uint simdgroup) {
  using E = typename Tile<T>::Element;
  constexpr int rows = Tile<T>::rows, columns = Step<F>::columns, stride = Step<F>::stride;
  const int row = int(thread_at) / 4, part = int(thread_at) % 4;  // this thread loads a quarter of a row of each tile
  const device uchar* from = weight + ulong(min(n0 + row, n - 1)) * row_bytes<F>(k);
  const device T* x_row = x;
  if (row < count) x_row += ulong(sorted ? order[first + row] / divisor : first + row) * ulong(k);

  const int m = int(simdgroup) / 2 * (rows / 2), c = int(simdgroup) % 2 * (kTileN / 2);  // this SIMD-group's quarter of y
  simdgroup_float8x8 sums[rows / 16][2];
  for (int i = 0; i < rows / 16; ++i) {
    for (int j = 0; j < 2; ++j) sums[i][j] = make_filled_simdgroup_matrix<float, 8>(0.0f);
  }
  for (int k0 = 0; k0 < k; k0 += columns) {
    const int unit = k0 / F::unit + part;
    const bool inside = unit < k / F::unit;
    float w[F::unit];
    if (inside) {
      decode<F>(from, unit, w);
    } else {
      for (int i = 0; i < F::unit; ++i) w[i] = 0.0f;
    }
    // Past the end of the row, the unit's place would be in a block that does not exist. Any free place will do.
    const int place = inside ? place_of<F>(unit) - k0 : 0;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (!inside) {
      for (int i = 0; i < F::unit; ++i) ws[row * stride + part * F::unit + i] = E(0);
    } else {
      for (int i = 0; i < F::unit; ++i) ws[row * stride + place + F::offset(i)] = E(w[i]);
    }
    if (row < rows) {
      for (int i = part * F::unit; i < (part + 1) * F::unit; ++i) {
        xs[row * stride + i] = row < count && k0 + i < k ? E(float(x_row[k0 + i])) : E(0);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int at = 0; at < columns; at += 8) {
      simdgroup_matrix<E, 8, 8> a[rows / 16], b[2];
      for (int i = 0; i < rows / 16; ++i) simdgroup_load(a[i], xs + (m + 8 * i) * stride + at, stride);
      for (int j = 0; j < 2; ++j) simdgroup_load(b[j], ws + (c + 8 * j) * stride + at, stride, ulong2(0, 0), true);
      for (int i = 0; i < rows / 16; ++i) {
        for (int j = 0; j < 2; ++j) simdgroup_multiply_accumulate(sums[i][j], a[i], b[j], sums[i][j]);
      }
    }
  }
  for (int i = 0; i < rows / 16; ++i) {
    for (int j = 0; j < 2; ++j) simdgroup_store(sums[i][j], out + (m + 8 * i) * kTileN + c + 8 * j, kTileN);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = int(thread_at); i < rows * kTileN; i += kThreads) {
    const int of_tile = i / kTileN, column = n0 + i % kTileN;
    if (of_tile < count && column < n) {
      const ulong to = ulong(sorted ? order[first + of_tile] : first + of_tile);
      y[to * ulong(n) + ulong(column)] = T(has_bias ? out[i] + float(bias[column]) : out[i]);
    }
  }
}

// y [m, n] = x [m, k] weight^T + bias; grid: threadgroups by n and m.
template <class F, class T>
kernel void gemm(const device uchar* weight [[buffer(0)]], const device T* x [[buffer(1)]],
                 const device T* bias [[buffer(2)]], device T* y [[buffer(3)]], constant int& m [[buffer(4)]],
                 constant int& n [[buffer(5)]], constant int& k [[buffer(6)]], constant int& has_bias [[buffer(7)]],
                 uint2 group [[threadgroup_position_in_grid]], uint thread_at [[thread_index_in_threadgroup]],
                 uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  using E = typename Tile<T>::Element;
  threadgroup E ws[kTileN * Step<F>::stride];
  threadgroup E xs[Tile<T>::rows * Step<F>::stride];
  threadgroup float out[Tile<T>::rows * kTileN];
  const int first = int(group.y) * Tile<T>::rows;
  multiply_tile<F, T, false>(weight, x, bias, y, (const device int*)weight, first, min(m - first, Tile<T>::rows), 1,
                             int(group.x) * kTileN, n, k, has_bias != 0, ws, xs, out, thread_at, simdgroup);
}

// y [pairs, n]: row p is x (of token p / slots, or of pair p) times the weight of pair p's expert. order [pairs] lists
// the pairs expert by expert. Tile t takes counts[t] of them from firsts[t] on, all of expert experts[t]. Only the GPU
// knows how many tiles there are, so tiles without pairs return at once. Rows of y whose pair is in no tile are
// unchanged.
template <class F, class T>
kernel void experts_gemm(const device uchar* weight [[buffer(0)]], const device T* x [[buffer(1)]],
                         const device T* bias [[buffer(2)]], device T* y [[buffer(3)]],
                         const device int* order [[buffer(4)]], const device int* experts [[buffer(5)]],
                         const device int* firsts [[buffer(6)]], const device int* counts [[buffer(7)]],
                         constant int& n [[buffer(8)]], constant int& k [[buffer(9)]],
                         constant int& has_bias [[buffer(10)]], constant int& divisor [[buffer(11)]],
                         uint2 group [[threadgroup_position_in_grid]],
                         uint thread_at [[thread_index_in_threadgroup]],
                         uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  using E = typename Tile<T>::Element;
  threadgroup E ws[kTileN * Step<F>::stride];
  threadgroup E xs[Tile<T>::rows * Step<F>::stride];
  threadgroup float out[Tile<T>::rows * kTileN];
  if (counts[group.y] <= 0) return;
  const ulong expert = ulong(experts[group.y]);
  multiply_tile<F, T, true>(weight + expert * ulong(n) * row_bytes<F>(k), x,
                            has_bias ? bias + expert * ulong(n) : bias, y, order, firsts[group.y], counts[group.y],
                            divisor, int(group.x) * kTileN, n, k, has_bias != 0, ws, xs, out, thread_at, simdgroup);
}
