// The numbers that a format's struct gives to a product, written as the weights they stand for
// (tests/test_cuda_formats.py).
#include <cstring>
#include <string>

#include "cuda/formats/list.cuh"
#include "simt.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace isqtorch;
using namespace isqtorch::cuda;

namespace {

template <Element element>
ISQ_DEVICE float number(uint32_t half) {
  return element == Element::kBf16 ? bf16_to_f32((uint16_t)half) : f16_to_f32((uint16_t)half);
}

// The place in a slice of the weight in one half of a pair, by Order.
constexpr int place(Order order, int t, int pair, int half) {
  return order == Order::kQuads ? 16 * (pair / 2) + 4 * t + pair % 2 + 2 * half : 8 * t + pair + 4 * half;
}

// One block of threads per chunk. Its bytes go to shared memory as in a product, at the same distance from a multiple
// of 16. codes[i] is the sum of the pieces minus their zero. Scale and offset are written for groups of 16 or 32.
template <class F, Element element>
__global__ void take_apart(const uint8_t* row, int64_t k, Shape shape, float* codes, Affine* affine) {
  ISQ_SHARED(uint8_t, bytes, [16 + F::kMaxChunkBytes]);
  const int64_t first = (int64_t)blockIdx.x * kChunk;
  const int weights = k - first < kChunk ? (int)(k - first) : kChunk, count = weights / shape.block * shape.block_bytes;
  const uint8_t* const chunk = row + first / shape.block * shape.block_bytes;
  uint8_t* const local = bytes + reinterpret_cast<uintptr_t>(chunk) % 16;
  for (int i = threadIdx.x; i < count; i += blockDim.x) local[i] = chunk[i];
  __syncthreads();
  const typename F::Row opened = F::open(local, shape);
  const int t = threadIdx.x % 4;
  for (int slice = 0; slice < weights / kSlice; ++slice) {
    if ((int)threadIdx.x / 4 != slice) continue;
    uint32_t pairs[F::template kPieces<element>][4];
    F::template codes<element>(local, slice, t, shape, pairs);
    for (int i = 0; i < 8; ++i) {
      float code = -F::template kZero<element>;
      for (const auto& piece : pairs) code += number<element>(piece[i / 2] >> 16 * (i % 2));
      codes[first + slice * kSlice + place(F::kOrder, t, i / 2, i % 2)] = code;
    }
    for (int group = slice * kSlice / F::kGroup; group < (slice + 1) * kSlice / F::kGroup; ++group) {
      if (t == 0) affine[first / F::kGroup + group] = F::affine(opened, local, group, shape);
    }
  }
}

template <class Instance>
int run(const uint8_t* row, int64_t k, bool bf16, float* codes, Affine* affine) {
  using F = typename Instance::Struct;
  const auto kernel = bf16 ? take_apart<F, Element::kBf16> : take_apart<F, Element::kF16>;
  ISQ_LAUNCH(kernel, {(unsigned)((k + kChunk - 1) / kChunk)}, {32}, 0, nullptr, row, k, Instance::kShape, codes,
             affine);
  return F::kGroup;
}

template <class F>
bool sums_of(bool bf16) {
  return bf16 ? F::template kSums<Element::kBf16> : F::template kSums<Element::kF16>;
}

}  // namespace

// Unpacks a row into codes [k] and (scale, offset) per group. Returns the size of a group, or 0 for an unknown format.
EXPORT int take_row_apart(const char* format, const uint8_t* row, int64_t k, bool bf16, float* codes, Affine* affine) {
#define ISQ_ENTRY(name, ...) \
  if (!std::strcmp(format, name)) return run<Instance<__VA_ARGS__>>(row, k, bf16, codes, affine);
  ISQ_FORMATS(ISQ_ENTRY)
  return 0;
}
// Whether a product needs the sums of x.
EXPORT bool needs_sums(const char* format, bool bf16) {
#define ISQ_SUMS(name, ...) \
  if (!std::strcmp(format, name)) return sums_of<Instance<__VA_ARGS__>::Struct>(bf16);
  ISQ_FORMATS(ISQ_SUMS)
  return true;
}
