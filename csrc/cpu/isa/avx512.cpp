// AVX-512 with the byte, word and short-vector extensions: x86 servers from 2017 on.
#if defined(__x86_64__)

#include "cpu/isa/prelude.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx,avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx,avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif

#define ISQ_ISA avx512
#define ISQ_VECTOR_FLOATS 16
#include "cpu/isa/formats_region.h"
#include "cpu/isa/linear_region.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
