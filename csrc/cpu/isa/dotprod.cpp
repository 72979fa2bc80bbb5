// NEON with dot products of signed bytes: ARMv8.2 and later, from 2018 on (Cortex-A76, Graviton2, every Apple M).
#if defined(__aarch64__)

#include "cpu/prelude.h"

ISQ_TARGET_REGION(ISQ_GCC_OR_CLANG("arch=armv8.2-a+dotprod", "dotprod"))

#define ISQ_ISA dotprod
#define ISQ_VECTOR_FLOATS 4
#define ISQ_DOTPROD
#include "cpu/isa/linear_region.h"

ISQ_END_TARGET_REGION

#endif
