// NEON with dot products of signed bytes: ARMv8.2 and later, from 2018 on (Cortex-A76, Graviton2, every Apple M).
#if defined(__aarch64__)

#include "cpu/isa/prelude.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#define ISQ_ISA dotprod
#define ISQ_VECTOR_FLOATS 4
#define ISQ_DOTPROD
#include "cpu/isa/linear_region.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
