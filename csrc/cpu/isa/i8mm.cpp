// NEON with dot products of unsigned by signed bytes, too: from 2021 on (Neoverse V1, Graviton3, Apple M2).
#if defined(__aarch64__)

#include "cpu/isa/prelude.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod,i8mm"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm")
#endif

#define ISQ_ISA i8mm
#define ISQ_VECTOR_FLOATS 4
#define ISQ_DOTPROD
#define ISQ_I8MM
#include "cpu/isa/linear_region.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
