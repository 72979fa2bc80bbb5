// The parts of an NVIDIA GPU that work on behalf of a warp: matrix products, matrix loads, asynchronous copies; and its
// conversions. csrc/cuda/gpu.h describes each function.
#pragma once

#include <cstdint>

namespace simt {

void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bf16);
void load_matrices(uint32_t (&r)[4], const void* row, bool transposed);

void copy_async(void* to, const void* from, int bytes);
void end_copies();
void wait_for_copies(int newest);

float f16_to_f32(uint16_t h);
uint16_t f32_to_f16(float f);
float bf16_to_f32(uint16_t h);
uint16_t f32_to_bf16(float f);

}  // namespace simt
