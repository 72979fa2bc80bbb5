// AVX-512 with the byte, word and short-vector extensions: x86 servers from 2017 on.
#if defined(__x86_64__)

#include "cpu/prelude.h"

ISQ_TARGET_REGION("avx,avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")

#define ISQ_ISA avx512
#define ISQ_VECTOR_FLOATS 16
#include "cpu/isa/formats_region.h"
#include "cpu/isa/linear_region.h"

ISQ_END_TARGET_REGION

#endif
