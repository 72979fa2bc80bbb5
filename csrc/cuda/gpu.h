// What C++ has no words for on a GPU, as functions: with the hardware's instructions for nvcc, and in plain C++ for the
// emulator of the tests (tests/emulator). Kernels include this file and no header of CUDA.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define ISQ_SHARED(type, name, ...) __shared__ __align__(16) type name __VA_ARGS__
#define ISQ_DYNAMIC_SHARED(type, name)          \
  extern __shared__ uint4 isq_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(isq_dynamic_shared)
#define ISQ_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)   \
  (::isqtorch::gpu::allow_shared((const void*)kernel, shared_bytes), \
   kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__))
// Checked even with NDEBUG, because it checks ids, which come from users.
#define ISQ_ASSERT(condition, message) ((condition) ? (void)0 : __assert_fail(message, __FILE__, __LINE__, __func__))
#else
#include "cuda.h"
#include "tensor_core.h"
#define ISQ_ASSERT(condition, message) ((condition) ? (void)0 : ::simt::fail(message))
#endif

#define ISQ_DEVICE __device__ __forceinline__

namespace isqtorch::gpu {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

// ---- launches -------------------------------------------------------------------------------------------------------

// The most dynamic shared memory that a block may ask for on the current device.
inline int64_t shared_limit() {
#if defined(__CUDACC__)
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) {
    bytes = 48 << 10;
  }
  return bytes;
#else
  return (int64_t)simt::shared_limit;
#endif
}

#if defined(__CUDACC__)
// More than 48 KB must be requested. The request is no operation of the stream, so it may be made during a graph
// capture.
inline void allow_shared(const void* kernel, int64_t bytes) {
  if (bytes > 48 << 10) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
}
#endif

// ---- bits -----------------------------------------------------------------------------------------------------------

// Any function of three bits, bit by bit: bit 4a + 2b + c of `table` is its value.
template <int table>
ISQ_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDACC__)
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(table));
  return d;
#else
  uint32_t d = 0;
  for (int i = 0; i < 8; ++i) {
    if (table >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return d;
#endif
}

// Selects four of eight bytes, those of a (0 .. 3) and b (4 .. 7): nibble i of `choice` selects byte i of the result.
ISQ_DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t choice) {
#if defined(__CUDACC__)
  return __byte_perm(a, b, choice);
#else
  const uint64_t bytes = a | (uint64_t)b << 32;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) d |= (uint32_t)(bytes >> 8 * (choice >> 4 * i & 7) & 255) << 8 * i;
  return d;
#endif
}

ISQ_DEVICE int count_bits(uint32_t bits) {
#if defined(__CUDACC__)
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

// The larger and the smaller number; NaN if either is NaN; +0 counts as larger than -0.
ISQ_DEVICE float max_or_nan(float a, float b) {
#if defined(__CUDACC__)
  float d;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
#else
  return a != a || a > b ? a : a == b ? __uint_as_float(__float_as_uint(a) & __float_as_uint(b)) : b;
#endif
}
ISQ_DEVICE float min_or_nan(float a, float b) {
#if defined(__CUDACC__)
  float d;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
#else
  return a != a || a < b ? a : a == b ? __uint_as_float(__float_as_uint(a) | __float_as_uint(b)) : b;
#endif
}

// ---- 16-bit floats --------------------------------------------------------------------------------------------------

ISQ_DEVICE float f16_to_f32(uint16_t h) {
#if defined(__CUDACC__)
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
#else
  return simt::f16_to_f32(h);
#endif
}
ISQ_DEVICE uint16_t f32_to_f16(float f) {
#if defined(__CUDACC__)
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
#else
  return simt::f32_to_f16(f);
#endif
}
ISQ_DEVICE float bf16_to_f32(uint16_t h) { return __uint_as_float((uint32_t)h << 16); }
ISQ_DEVICE uint16_t f32_to_bf16(float f) {
#if defined(__CUDACC__)
  uint16_t h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
#else
  return simt::f32_to_bf16(f);
#endif
}

// Two floats as two 16-bit ones, the first in the low half.
ISQ_DEVICE uint32_t pack_bf16(float low, float high) {
#if defined(__CUDACC__)
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
#else
  return simt::f32_to_bf16(low) | (uint32_t)simt::f32_to_bf16(high) << 16;
#endif
}
ISQ_DEVICE uint32_t pack_f16(float low, float high) {
#if defined(__CUDACC__)
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
#else
  return simt::f32_to_f16(low) | (uint32_t)simt::f32_to_f16(high) << 16;
#endif
}

// The products of two pairs of bf16, with subnormal numbers. (Before sm_90, fma is the only multiplication.)
ISQ_DEVICE uint32_t multiply_bf16(uint32_t a, uint32_t b) {
#if defined(__CUDACC__)
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));  // adding -0 changes nothing
  return d;
#else
  return pack_bf16(bf16_to_f32((uint16_t)a) * bf16_to_f32((uint16_t)b),
                   bf16_to_f32((uint16_t)(a >> 16)) * bf16_to_f32((uint16_t)(b >> 16)));
#endif
}
ISQ_DEVICE uint32_t multiply_f16(uint32_t a, uint32_t b) {
#if defined(__CUDACC__)
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
#else
  return pack_f16(f16_to_f32((uint16_t)a) * f16_to_f32((uint16_t)b),
                  f16_to_f32((uint16_t)(a >> 16)) * f16_to_f32((uint16_t)(b >> 16)));
#endif
}

// ---- matrix units ---------------------------------------------------------------------------------------------------

enum class Element : int { kF16, kBf16 };

// d[16][8] += a[16][16] b[16][8], distributed over the warp as in the m16n8k16 instruction. With g = lane / 4 and t =
// lane % 4: a[i] holds rows g + 8 (i % 2) and columns 2 t, 2 t + 1 (+ 8 for i >= 2); b[i] holds rows 2 t, 2 t + 1 (+ 8
// i) of column g; d[i] is row g + 8 (i / 2) and column 2 t + i % 2.
template <Element element>
ISQ_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  if constexpr (element == Element::kF16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  simt::multiply_add(d, a, b, element == Element::kBf16);
#endif
}

// Loads four 8 x 8 matrices of 16-bit numbers from shared memory. Lane l gives the address of row l % 8 of matrix l /
// 8, which is 16 bytes long and aligned to 16. It gets columns 2 (l % 4), + 1 of row l / 4 of each matrix, or of each
// transposed matrix if `transposed`.
template <bool transposed = false>
ISQ_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
#if defined(__CUDACC__)
  const uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
#else
  simt::load_matrices(r, row, transposed);
#endif
}

// ---- asynchronous copies --------------------------------------------------------------------------------------------

// An address in shared memory, converted once and used for copies at constant offsets from it.
struct SharedAddress {
#if defined(__CUDACC__)
  uint32_t at;
  __device__ explicit SharedAddress(const void* p) : at((uint32_t)__cvta_generic_to_shared(p)) {}
#else
  uint8_t* at;
  explicit SharedAddress(void* p) : at(static_cast<uint8_t*>(p)) {}
#endif
};

// Copies 16 bytes from global to shared memory, both 16-byte aligned. Only the first `bytes` are read; the rest is
// zeros.
ISQ_DEVICE void copy_async(SharedAddress to, int offset, const void* from, int bytes = 16) {
#if defined(__CUDACC__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.at + offset), "l"(from), "r"(bytes) : "memory");
#else
  simt::copy_async(to.at + offset, from, bytes);
#endif
}
ISQ_DEVICE void copy_async(uint8_t* to, int offset, const void* from, int bytes = 16) {
  copy_async(SharedAddress(to + offset), 0, from, bytes);
}
// Ends a group of copies.
ISQ_DEVICE void end_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simt::end_copies();
#endif
}
// Waits for this thread's copies except its newest `newest` groups. Other threads may read the copied bytes only after
// a barrier of the block.
template <int newest>
ISQ_DEVICE void wait_for_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
#else
  simt::wait_for_copies(newest);
#endif
}

}  // namespace isqtorch::gpu
