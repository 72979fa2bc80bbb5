// AVX-512 with dot products of bytes: Cascade Lake, Ice Lake.
#if defined(__x86_64__)

#include "cpu/prelude.h"

ISQ_TARGET_REGION("avx,avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

#define ISQ_ISA avx512vnni
#define ISQ_VECTOR_FLOATS 16
#define ISQ_VNNI
#include "cpu/isa/linear_region.h"

ISQ_END_TARGET_REGION

#endif
