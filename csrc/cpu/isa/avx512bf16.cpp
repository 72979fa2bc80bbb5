// AVX-512 with dot products of bytes and of bf16, and matrices of bits: Zen 4, Sapphire Rapids.
#if defined(__x86_64__)

#include "cpu/isa/prelude.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                                   \
    __attribute__((                                                                                             \
        target("avx,avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512bf16,gfni"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx,avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512bf16,gfni")
#endif

#define ISQ_ISA avx512bf16
#define ISQ_VECTOR_FLOATS 16
#define ISQ_VNNI
#define ISQ_VBMI
#define ISQ_BF16
#define ISQ_GFNI
#include "cpu/isa/linear_region.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
