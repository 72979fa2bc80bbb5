// AVX2 with the dot products of bytes of AVX-VNNI: desktop processors from 2021 on (Alder Lake, Zen 5).
#if defined(__x86_64__)

#include "cpu/isa/prelude.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx,avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx,avx2,fma,f16c,avxvnni")
#endif

#define ISQ_ISA avxvnni
#define ISQ_VECTOR_FLOATS 8
#define ISQ_VNNI
#include "cpu/isa/linear_region.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
