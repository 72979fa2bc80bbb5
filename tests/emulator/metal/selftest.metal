// Kernels that are right, and kernels with one planted fault each, for the tests of the emulator itself.
#include <metal_stdlib>
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
using namespace metal;

// ---- right, or wrong without a barrier

// y[group] = sum of 256 numbers, through threadgroup memory.
template <bool barrier>
kernel void group_sum(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                      uint group [[threadgroup_position_in_grid]], uint i [[thread_index_in_threadgroup]]) {
  threadgroup float partial[256];
  partial[i] = x[group * 256 + i];
  if (barrier) threadgroup_barrier(mem_flags::mem_threadgroup);
  if (i == 0) {
    float sum = 0;
    for (int j = 0; j < 256; ++j) sum += partial[j];
    y[group] = sum;
  }
}
template [[host_name("group_sum")]] [[kernel]] decltype(group_sum<true>) group_sum<true>;
template [[host_name("group_sum_without_barrier")]] [[kernel]] decltype(group_sum<false>) group_sum<false>;

// Without the second barrier, a SIMD-group that is ahead overwrites what the other has not read yet.
template <bool barrier>
kernel void reverse_twice(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                          uint i [[thread_index_in_threadgroup]]) {
  threadgroup float tile[64];
  tile[i] = x[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const float once = tile[63 - i];
  if (barrier) threadgroup_barrier(mem_flags::mem_threadgroup);
  tile[i] = once + 1.0;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = tile[63 - i];
}
template [[host_name("reverse_twice")]] [[kernel]] decltype(reverse_twice<true>) reverse_twice<true>;
template [[host_name("reverse_twice_without_barrier")]] [[kernel]] decltype(reverse_twice<false>) reverse_twice<false>;

// Lanes of a SIMD-group exchange through threadgroup memory.
template <bool barrier>
kernel void neighbour(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                      uint i [[thread_index_in_simdgroup]]) {
  threadgroup float values[32];
  values[i] = x[i];
  if (barrier) simdgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = values[(i + 1) % 32] + values[(i + 31) % 32];
}
template [[host_name("neighbour")]] [[kernel]] decltype(neighbour<true>) neighbour<true>;
template [[host_name("neighbour_without_barrier")]] [[kernel]] decltype(neighbour<false>) neighbour<false>;

// ---- right

// Row r of y: what function r gives in each lane.
kernel void simd_functions(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                           uint i [[thread_index_in_simdgroup]]) {
  const float v = x[i];
  const float results[] = {simd_sum(v),
                           simd_min(v),
                           simd_max(v),
                           simd_prefix_exclusive_sum(v),
                           simd_prefix_inclusive_sum(v),
                           simd_shuffle(v, 5),
                           simd_shuffle_xor(v, 3),
                           simd_shuffle_down(v, 4),
                           simd_shuffle_up(v, 4),
                           simd_shuffle_rotate_down(v, 4),
                           simd_broadcast_first(v),
                           float(ulong(simd_ballot(v > 0))),
                           float(simd_any(v > 3)),
                           float(simd_all(v > 3)),
                           quad_sum(v),
                           quad_max(v),
                           quad_shuffle_xor(v, 1),
                           quad_broadcast(v, 2)};
  for (int row = 0; row < 18; ++row) y[32 * row + i] = results[row];
}

// Quads do not wait for each other.
kernel void some_quads(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                       uint quad [[quadgroup_index_in_threadgroup]], uint i [[thread_index_in_threadgroup]]) {
  float sum = x[i];
  if (quad % 2 == 0) sum = quad_sum(sum);
  y[i] = sum;
}

// What threads are told of their place, where a grid ends inside a threadgroup.
kernel void places(device int* y [[buffer(0)]], constant int& width [[buffer(1)]],
                   uint3 at [[thread_position_in_grid]], ushort2 in_group [[thread_position_in_threadgroup]],
                   uint3 group [[threadgroup_position_in_grid]], uint3 size [[threads_per_threadgroup]],
                   uint3 whole [[dispatch_threads_per_threadgroup]], uint3 threads [[threads_per_grid]],
                   uint2 groups [[threadgroups_per_grid]], uint lane [[thread_index_in_simdgroup]],
                   uint simdgroup [[simdgroup_index_in_threadgroup]], uint simdgroups [[simdgroups_per_threadgroup]],
                   uint lanes [[threads_per_simdgroup]], uint index [[thread_index_in_threadgroup]]) {
  const uint told[] = {at.x,   at.y,    in_group.x, in_group.y, group.x,  group.y, size.x,    size.y,     whole.x,
                       whole.y, threads.x, threads.y,  groups.x,   groups.y, lane,    simdgroup, simdgroups, lanes, index};
  device int* mine = y + 19 * (at.y * uint(width) + at.x);
  for (int i = 0; i < 19; ++i) mine[i] = int(told[i]);
}

// Vectors, half and bfloat: conversions, swizzles, rounding after every operation.
kernel void arithmetic(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                       device const half4* h [[buffer(2)]], device const bfloat* b [[buffer(3)]]) {
  float4 v = float4(x[0], x[1], x[2], x[3]);
  v.xy = v.yx;
  const half4 doubled = h[0] + h[0];
  const float4 w = float4(doubled) + float4(v.zw, float2(1.0));
  for (int i = 0; i < 4; ++i) y[i] = w[i];
  y[4] = float(half(x[0]) * 2.5h);
  y[5] = float(b[0] + b[1]);
  y[6] = float(b[0]) + float(b[1]);
  y[7] = dot(v, float4(1, 2, 3, 4));
  y[8] = float(as_type<uint>(x[1]) >> 23);
  y[9] = float(extract_bits(0xabcdu, 4, 8));
  y[10] = float(uchar4(1, 2, 3, 200).w);
  y[11] = clamp(x[2], -1.0, 1.0);
  y[12] = float(bfloat(x[3]));
  y[13] = any(v > float4(2.0)) ? rint(2.5) : 0.0;
}

// c = a b^T, a and b 8x32 half.
kernel void product(device const half* a [[buffer(0)]], device const half* b [[buffer(1)]],
                    device float* c [[buffer(2)]]) {
  simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8>(0.0);
  for (int k = 0; k < 32; k += 8) {
    simdgroup_half8x8 left, right;
    simdgroup_load(left, a + k, 32);
    simdgroup_load(right, b + k, 32, ulong2(0, 0), true);
    simdgroup_multiply_accumulate(sum, left, right, sum);
  }
  simdgroup_store(sum, c, 8);
}

// Which element a lane holds is Apple's: y[row][column] = 2 * lane + element.
kernel void matrix_lanes(device float* y [[buffer(0)]], uint lane [[thread_index_in_simdgroup]]) {
  simdgroup_float8x8 m;
  m.thread_elements() = float2(2.0 * float(lane), 2.0 * float(lane) + 1.0);
  simdgroup_store(m, y, 8);
}

kernel void count(device atomic_uint* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  atomic_fetch_add_explicit(y + i % 3, 1, memory_order_relaxed);
}

// A list of tensors: their addresses.
kernel void gather(device const float* constant* x [[buffer(0)]], device float* y [[buffer(1)]],
                   constant int* indices [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  y[i] = x[indices[i]][i];
}

kernel void scale(device float* x [[buffer(0)]], constant float& by [[buffer(1)]],
                  uint i [[thread_position_in_grid]]) {
  x[i] *= by;
}

[[max_total_threads_per_threadgroup(64)]] kernel void small_groups(device float* y [[buffer(0)]],
                                                                   uint i [[thread_position_in_grid]]) {
  y[i] = float(i);
}

// ---- wrong

kernel void diverge(device float* y [[buffer(0)]], uint i [[thread_index_in_simdgroup]]) {
  float v = float(i);
  if (i < 16) {
    v = simd_sum(v);
  } else {
    v = simd_max(v);
  }
  y[i] = v;
}
kernel void some_lanes(device float* y [[buffer(0)]], uint i [[thread_index_in_simdgroup]]) {
  if (i >= 20) return;
  y[i] = simd_sum(1.0);
}
kernel void leave_before_barrier(device float* y [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  if (i >= 32) return;
  y[i] = 0;
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
kernel void two_barriers(device float* y [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  if (i < 32) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  } else {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  y[i] = 0;
}
kernel void past_the_end(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i + 1] = 0; }
kernel void past_the_tile(device float* y [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  threadgroup float tile[64];
  threadgroup float* mine = tile + i;
  mine[1] = 1;
  y[i] = mine[0];
}
kernel void past_the_array(device float* y [[buffer(0)]], constant int& at [[buffer(1)]]) {
  float values[4] = {1, 2, 3, 4};
  y[0] = values[at];
}
kernel void too_much_memory(device float* y [[buffer(0)]]) {
  threadgroup float a[4096];
  threadgroup float b[4097];
  a[0] = 1;
  b[0] = 2;
  y[0] = a[0] + b[0];
}
kernel void unwritten(device float* y [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  threadgroup float tile[64];
  float sum[2];
  if (i > 1000) sum[1] = tile[i] = 0;
  y[i] = i % 2 ? tile[i] : sum[i % 2];
}
kernel void misaligned(device const uchar* x [[buffer(0)]], device uint* y [[buffer(1)]]) {
  y[0] = *(device const uint*)(x + 2);
}
kernel void long_shift(device uint* y [[buffer(0)]], constant uint& by [[buffer(1)]]) { y[0] = 1u << by; }
kernel void to_uchar(device const float* x [[buffer(0)]], device uchar* y [[buffer(1)]]) { y[0] = uchar(x[0]); }
kernel void lane_addresses(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                           uint lane [[thread_index_in_simdgroup]]) {
  simdgroup_float8x8 m;
  simdgroup_load(m, x + lane, 8);
  simdgroup_store(m, y, 8);
}
kernel void half_simdgroup(device float* y [[buffer(0)]]) { simdgroup_store(simdgroup_float8x8(1.0), y, 8); }
