// AVX2 with FMA and F16C: x86 from 2013 on.
#if defined(__x86_64__)

#include "cpu/prelude.h"

ISQ_TARGET_REGION("avx,avx2,fma,f16c")

#define ISQ_ISA avx2
#define ISQ_VECTOR_FLOATS 8
#include "cpu/isa/formats_region.h"
#include "cpu/isa/linear_region.h"

ISQ_END_TARGET_REGION

#endif
