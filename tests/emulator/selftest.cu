// Kernels that are right, and kernels with one planted fault each, for the tests of the emulator itself.
#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "buffers.h"
#include "cuda/gpu.h"

namespace {

using namespace isqtorch::gpu;

// y[block] = sum of 256 numbers: through shared memory, with or without its barrier.
template <bool barrier>
__global__ void block_sum(const float* x, float* y) {
  ISQ_SHARED(float, partial, [256]);
  partial[threadIdx.x] = x[blockIdx.x * 256 + threadIdx.x];
  if (barrier) __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int i = 0; i < 256; ++i) sum += partial[i];
    y[blockIdx.x] = sum;
  }
}

// Turns a tile around, twice, through one shared array: without the second barrier, values of the second round
// overwrite what others have not read yet.
template <bool second_barrier>
__global__ void reverse_twice(const float* x, float* y) {
  ISQ_SHARED(float, tile, [64]);
  const int i = threadIdx.x;
  tile[i] = x[i];
  __syncthreads();
  const float once = tile[63 - i];
  if (second_barrier) __syncthreads();
  tile[i] = once + 1.0f;
  __syncthreads();
  y[i] = tile[63 - i];
}

__global__ void warp_sum(const float* x, float* y) {
  float sum = x[threadIdx.x];
  for (int bits = 16; bits; bits /= 2) sum += __shfl_xor_sync(kAllLanes, sum, bits);
  y[threadIdx.x] = sum;
}

// Lanes exchange through shared memory without a warp barrier.
template <bool barrier>
__global__ void neighbour(const float* x, float* y) {
  ISQ_SHARED(float, values, [32]);
  values[threadIdx.x] = x[threadIdx.x];
  if (barrier) __syncwarp();
  y[threadIdx.x] = values[(threadIdx.x + 1) % 32] + values[(threadIdx.x + 31) % 32];
}

__global__ void diverge(const float* x, float* y) {
  const float v = x[threadIdx.x];
  y[threadIdx.x] = threadIdx.x < 16 ? __shfl_xor_sync(kAllLanes, v, 1) : (float)__ballot_sync(kAllLanes, v > 0);
}
__global__ void leave_before_barrier(const float* x, float* y) {
  if (threadIdx.x >= 32) return;
  y[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
}
__global__ void wait_apart(const float* x, float* y) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    if (threadIdx.x % 2) __syncwarp(0xaaaaaaaau);
    if (threadIdx.x == 33) __syncwarp(kAllLanes);  // the others never come
    __syncthreads();
  }
  y[threadIdx.x] = x[threadIdx.x];
}
__global__ void past_the_end(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x + 1]; }
__global__ void overflow_stack(const float* x, float* y) {
  volatile char large[264 << 10];  // simt::kStackBytes is 256 KB
  large[0] = (char)x[0];
  y[threadIdx.x] = large[0];
}
__global__ void masked_out(const float* x, float* y) { y[threadIdx.x] = __shfl_sync(0x0000ffffu, x[threadIdx.x], 0); }

// Copies 16 bytes a thread through shared memory.
template <bool wait, bool barrier>
__global__ void copy_through(const float* x, float* y) {
  ISQ_SHARED(float, values, [128]);
  copy_async(SharedAddress(values), 16 * (int)threadIdx.x, x + 4 * threadIdx.x);
  end_copies();
  if (wait) wait_for_copies<0>();
  if (barrier) __syncthreads();
  for (int i = 0; i < 4; ++i) y[4 * threadIdx.x + i] = values[127 - 4 * threadIdx.x - i];
}

// y[16][8] = a[16][16] b[16][8], a and b as bf16 in shared memory, loaded as matrices.
__global__ void small_product(const float* x, float* y) {
  ISQ_SHARED(uint16_t, a, [16 * 16]);
  ISQ_SHARED(uint16_t, b, [16 * 16]);  // [column][k]; columns 8 .. 15 unused
  for (int i = threadIdx.x; i < 256; i += 32) {
    a[i] = f32_to_bf16(x[i]);
    b[i] = i < 128 ? f32_to_bf16(x[256 + i]) : 0;
  }
  __syncwarp();
  uint32_t ra[4], rb[4];
  const int lane = threadIdx.x;
  load_matrices(ra, a + (lane % 16) * 16 + lane / 16 * 8);
  load_matrices(rb, b + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8);
  float d[4] = {};
  multiply_add<Element::kBf16>(d, ra, {rb[0], rb[1]});
  for (int i = 0; i < 4; ++i) y[(lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2] = d[i];
}

struct Case {
  void (*kernel)(const float*, float*);
  unsigned blocks, threads;
  size_t in, out;  // floats
};

const std::map<std::string, Case> kCases = {
    {"block_sum", {block_sum<true>, 3, 256, 768, 3}},
    {"block_sum without barrier", {block_sum<false>, 3, 256, 768, 3}},
    {"reverse_twice", {reverse_twice<true>, 1, 64, 64, 64}},
    {"reverse_twice without barrier", {reverse_twice<false>, 1, 64, 64, 64}},
    {"warp_sum", {warp_sum, 1, 32, 32, 32}},
    {"neighbour", {neighbour<true>, 1, 32, 32, 32}},
    {"neighbour without barrier", {neighbour<false>, 1, 32, 32, 32}},
    {"diverge", {diverge, 1, 32, 32, 32}},
    {"leave_before_barrier", {leave_before_barrier, 1, 64, 64, 64}},
    {"wait_apart", {wait_apart, 1, 64, 64, 64}},
    {"past_the_end", {past_the_end, 1, 32, 32, 32}},
    {"overflow_stack", {overflow_stack, 1, 32, 32, 32}},
    {"masked_out", {masked_out, 1, 32, 32, 32}},
    {"copy_through", {copy_through<true, true>, 1, 32, 128, 128}},
    {"copy_through without wait", {copy_through<false, true>, 1, 32, 128, 128}},
    {"copy_through without barrier", {copy_through<true, false>, 1, 32, 128, 128}},
    {"small_product", {small_product, 1, 32, 384, 128}},
};

}  // namespace

// Runs a case on x[i] = (i * 7 % 31 - 15) / 4 and copies its output to `out`. The error, or "", stays valid until the
// next call.
extern "C" __attribute__((visibility("default"))) const char* selftest(const char* name, float* out) {
  static std::string error;
  const Case& c = kCases.at(name);
  float* const x = static_cast<float*>(simt::new_buffer(c.in * 4, 16, "x"));
  float* const y = static_cast<float*>(simt::new_buffer(c.out * 4, 16, "y"));
  for (size_t i = 0; i < c.in; ++i) x[i] = ((int)(i * 7 % 31) - 15) / 4.0f;
  ISQ_LAUNCH(c.kernel, {c.blocks}, {c.threads}, 0, nullptr, x, y);
  std::memcpy(out, y, c.out * 4);
  simt::delete_buffer(x);
  simt::delete_buffer(y);
  error = simt::take_error();
  return error.c_str();
}
