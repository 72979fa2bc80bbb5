// CUDA's words for the machine in simt.h: what csrc/cuda/gpu.h includes where nvcc does not compile it.
//
// Only what the kernels use is here. Everything that C++ cannot say (matrix units, asynchronous copies, permutes) is
// written for both sides in gpu.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

using dim3 = simt::Dim;
using cudaStream_t = void*;

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

#define threadIdx (::simt::self->index)
#define blockIdx (::simt::self->block)
#define blockDim (::simt::self->block_size)
#define gridDim (::simt::self->grid_size)

// A __shared__ variable is the block's own: a block runs on one OS thread.
#define ISQ_SHARED(type, name, ...)                      \
  alignas(16) static thread_local type name __VA_ARGS__; \
  ::simt::poison((void*)&name, sizeof(name))
#define ISQ_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(::simt::self->shared)
#define ISQ_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), ::simt::launch(kernel, grid, block, shared_bytes, __VA_ARGS__))

inline void __syncthreads() { simt::meet_block(); }
inline void __syncwarp(uint32_t mask = ~0u) { simt::meet(simt::Meeting::kWarpBarrier, mask, nullptr, 0, true); }

template <class T>
T __shfl_sync(uint32_t mask, T value, int from, int width = 32) {
  return simt::shuffle(mask, value, (simt::self->lane & ~(width - 1)) | (from & (width - 1)), true);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32) {
  const int lane = simt::self->lane, from = lane ^ bits;
  return simt::shuffle(mask, value, from, (from & ~(width - 1)) == (lane & ~(width - 1)));
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned by, int width = 32) {
  const int lane = simt::self->lane;
  return simt::shuffle(mask, value, lane + (int)by, (lane & (width - 1)) + (int)by < width);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned by, int width = 32) {
  const int lane = simt::self->lane;
  return simt::shuffle(mask, value, lane - (int)by, (lane & (width - 1)) >= (int)by);
}

inline uint32_t __ballot_sync(uint32_t mask, bool vote) { return simt::ballot(mask, vote); }
inline bool __any_sync(uint32_t mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(uint32_t mask, bool vote) { return __ballot_sync(mask, vote) == mask; }

inline float __uint_as_float(uint32_t bits) { return simt::from_word<float>(bits); }
// A GPU's arithmetic has one NaN, with all bits set but the sign.
inline uint32_t __float_as_uint(float value) { return value != value ? 0x7fffffffu : (uint32_t)simt::to_word(value); }
inline int __float_as_int(float value) { return (int)__float_as_uint(value); }
inline float __int_as_float(int bits) { return __uint_as_float((uint32_t)bits); }

// Returns what was there, as CUDA's does.
inline long long atomicMin(long long* address, long long value) {
  long long seen = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (value < seen &&
         !__atomic_compare_exchange_n(address, &seen, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}

template <class T>
T __ldg(const T* address) {
  return *address;
}
