// AVX2 with FMA and F16C: x86 from 2013 on.
#if defined(__x86_64__)

#include "cpu/isa/prelude.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx,avx2,fma,f16c")
#endif

#define ISQ_ISA avx2
#define ISQ_VECTOR_FLOATS 8
#include "cpu/isa/formats_region.h"
#include "cpu/isa/linear_region.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
