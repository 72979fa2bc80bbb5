// NEON with dot products of signed bytes and of unsigned by signed bytes: from 2021 on (Neoverse V1, Graviton3, Apple
// M2).
#if defined(__aarch64__)

#include "cpu/prelude.h"

ISQ_TARGET_REGION(ISQ_GCC_OR_CLANG("arch=armv8.2-a+dotprod+i8mm", "dotprod,i8mm"))

#define ISQ_ISA i8mm
#define ISQ_VECTOR_FLOATS 4
#define ISQ_DOTPROD
#define ISQ_I8MM
#include "cpu/isa/linear_region.h"

ISQ_END_TARGET_REGION

#endif
