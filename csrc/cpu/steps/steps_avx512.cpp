// The kernels of a decoding step for AVX-512.
#if defined(__x86_64__)

#include "cpu/prelude.h"

ISQ_TARGET_REGION("avx,avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")

#define ISQ_ISA steps_avx512
#define ISQ_VECTOR_FLOATS 16
#include "cpu/steps/kernels.h"

ISQ_END_TARGET_REGION

#endif
