// Kernels like those of real libraries: y = x w^T, where w has codes of a few bits, and a scale and bias per group.
//
// codes: [n][k * bits / 8] bytes, a little-endian bit stream; scales, biases: [n][k / group]; x: [m][k]; y: [m][n].
#include <metal_stdlib>
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
using namespace metal;

// Eight codes, which are `bits` bytes.
template <int bits>
inline void decode(device const uchar* codes, thread float* q) {
  ulong stream = 0;
  for (int i = 0; i < bits; ++i) stream |= ulong(codes[i]) << (8 * i);
  for (int i = 0; i < 8; ++i) q[i] = float((stream >> (bits * i)) & ((1u << bits) - 1u));
}

// Two SIMD-groups per threadgroup, four rows of w each; threadgroups: [n / 8][m].
template <typename T, int group, int bits>
kernel void gemv(device const uchar* codes [[buffer(0)]], device const T* scales [[buffer(1)]],
                 device const T* biases [[buffer(2)]], device const T* x [[buffer(3)]], device T* y [[buffer(4)]],
                 constant int& n [[buffer(5)]], constant int& k [[buffer(6)]],
                 uint3 at [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                 uint lane [[thread_index_in_simdgroup]]) {
  const int first = int(at.x * 2 + simdgroup) * 4;
  if (first >= n) return;  // the whole SIMD-group, and no barrier follows
  x += at.y * uint(k);
  y += at.y * uint(n);
  float sums[4] = {0, 0, 0, 0};
  for (int i = int(lane) * 8; i < k; i += 32 * 8) {
    float xs[8], q[8], x_sum = 0;
    for (int j = 0; j < 8; ++j) {
      xs[j] = float(x[i + j]);
      x_sum += xs[j];
    }
    for (int r = 0; r < 4; ++r) {
      const int row = min(first + r, n - 1);
      decode<bits>(codes + row * (k / 8 * bits) + i / 8 * bits, q);
      float dot = 0;
      for (int j = 0; j < 8; ++j) dot += q[j] * xs[j];
      sums[r] += float(scales[row * (k / group) + i / group]) * dot + float(biases[row * (k / group) + i / group]) * x_sum;
    }
  }
  for (int r = 0; r < 4; ++r) {
    const float sum = simd_sum(sums[r]);
    if (lane == 0 && first + r < n) y[first + r] = T(sum);
  }
}

// Tiles of 32x32 outputs and 32 of k; four SIMD-groups, 16x16 each; threadgroups: [n / 32][m / 32].
template <typename T, int group, int bits>
kernel void gemm(device const uchar* codes [[buffer(0)]], device const T* scales [[buffer(1)]],
                 device const T* biases [[buffer(2)]], device const T* x [[buffer(3)]], device T* y [[buffer(4)]],
                 constant int& n [[buffer(5)]], constant int& k [[buffer(6)]], constant int& m [[buffer(7)]],
                 uint3 at [[threadgroup_position_in_grid]], uint i [[thread_index_in_threadgroup]],
                 uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup half xs[32 * 40];
  threadgroup half ws[32 * 40];
  threadgroup float ys[32 * 32];
  const int n0 = int(at.x) * 32, m0 = int(at.y) * 32;
  const int row = int(i) / 4, column = int(i) % 4 * 8;  // of the eight elements of both tiles that this thread loads
  const int w_row = min(n0 + row, n - 1);
  const int tile_m = int(simdgroup) / 2 * 16, tile_n = int(simdgroup) % 2 * 16;
  simdgroup_float8x8 sums[2][2];
  for (int a = 0; a < 2; ++a) {
    for (int b = 0; b < 2; ++b) sums[a][b] = make_filled_simdgroup_matrix<float, 8>(0.0);
  }
  for (int k0 = 0; k0 < k; k0 += 32) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float q[8];
    decode<bits>(codes + w_row * (k / 8 * bits) + (k0 + column) / 8 * bits, q);
    const float scale = float(scales[w_row * (k / group) + (k0 + column) / group]);
    const float bias = float(biases[w_row * (k / group) + (k0 + column) / group]);
    for (int j = 0; j < 8; ++j) {
      xs[row * 40 + column + j] = m0 + row < m ? half(float(x[(m0 + row) * k + k0 + column + j])) : half(0);
      ws[row * 40 + column + j] = half(scale * q[j] + bias);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int kk = 0; kk < 32; kk += 8) {
      simdgroup_half8x8 left[2], right[2];
      for (int a = 0; a < 2; ++a) {
        simdgroup_load(left[a], xs + (tile_m + 8 * a) * 40 + kk, 40);
        simdgroup_load(right[a], ws + (tile_n + 8 * a) * 40 + kk, 40, ulong2(0, 0), true);
      }
      for (int a = 0; a < 2; ++a) {
        for (int b = 0; b < 2; ++b) simdgroup_multiply_accumulate(sums[a][b], left[a], right[b], sums[a][b]);
      }
    }
  }
  for (int a = 0; a < 2; ++a) {
    for (int b = 0; b < 2; ++b) simdgroup_store(sums[a][b], ys + (tile_m + 8 * a) * 32 + tile_n + 8 * b, 32);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int j = int(i); j < 1024; j += 128) {
    if (m0 + j / 32 < m && n0 + j % 32 < n) y[(m0 + j / 32) * n + n0 + j % 32] = T(ys[j]);
  }
}
