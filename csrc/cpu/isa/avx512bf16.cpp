// AVX-512 with dot products of bytes and of bf16, and with matrices of bits (GFNI): Zen 4, Sapphire Rapids.
#if defined(__x86_64__)

#include "cpu/prelude.h"

ISQ_TARGET_REGION(
    "avx,avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,"
    "avx512vnni,avx512vbmi,avx512bf16,gfni")

#define ISQ_ISA avx512bf16
#define ISQ_VECTOR_FLOATS 16
#define ISQ_VNNI
#define ISQ_VBMI
#define ISQ_BF16
#define ISQ_GFNI
#include "cpu/isa/linear_region.h"

ISQ_END_TARGET_REGION

#endif
