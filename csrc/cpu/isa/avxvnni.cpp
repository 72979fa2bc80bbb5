// AVX2 with AVX-VNNI, dot products of bytes: desktop processors from 2021 on (Alder Lake, Zen 5).
#if defined(__x86_64__)

#include "cpu/prelude.h"

ISQ_TARGET_REGION("avx,avx2,fma,f16c,avxvnni")

#define ISQ_ISA avxvnni
#define ISQ_VECTOR_FLOATS 8
#define ISQ_VNNI
#include "cpu/isa/linear_region.h"

ISQ_END_TARGET_REGION

#endif
