// The kernels of a decoding step for AVX2 with FMA.
#if defined(__x86_64__)

#include "cpu/prelude.h"

ISQ_TARGET_REGION("avx,avx2,fma,f16c")

#define ISQ_ISA steps_avx2
#define ISQ_VECTOR_FLOATS 8
#include "cpu/steps/kernels.h"

ISQ_END_TARGET_REGION

#endif
