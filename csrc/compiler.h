// What GCC and Clang have beyond C++, under names of ours. No other file of the CPU's kernels and of the operators
// spells it out (tests/test_compiler.py), so another compiler takes an edit here. On Windows that can only be clang-cl,
// which has all of it: MSVC has no vectors with operators. The kernels for NVIDIA GPUs have cuda/gpu.h in place of this
// file.
#pragma once

// ---- functions and symbols

#define ISQ_ALWAYS_INLINE inline __attribute__((always_inline))
#define ISQ_ALWAYS_INLINE_BODY __attribute__((always_inline))  // after the parameters of a lambda
#define ISQ_NOINLINE __attribute__((noinline))
#define ISQ_WEAK __attribute__((weak))  // null where no library has it

#define ISQ_PRAGMA(...) _Pragma(#__VA_ARGS__)

// ISQ_TARGET_REGION(features) ... ISQ_END_TARGET_REGION: functions between these are compiled for a processor with the
// given features, whatever the command line says. cpu/prelude.h has to be included before.
#if defined(__clang__)
#define ISQ_TARGET_REGION(features) \
  ISQ_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define ISQ_END_TARGET_REGION ISQ_PRAGMA(clang attribute pop)
#define ISQ_GCC_OR_CLANG(gcc, clang) clang
#else
#define ISQ_TARGET_REGION(features) ISQ_PRAGMA(GCC push_options) ISQ_PRAGMA(GCC target(features))
#define ISQ_END_TARGET_REGION ISQ_PRAGMA(GCC pop_options)
#define ISQ_GCC_OR_CLANG(gcc, clang) gcc
#endif

// ---- loops

// ISQ_UNROLL is for loops whose index selects a register. Unless told to unroll them, GCC keeps the arrays in memory.
#if defined(__clang__)
#define ISQ_UNROLL ISQ_PRAGMA(unroll)
#define ISQ_UNROLL_BY(count) ISQ_PRAGMA(unroll count)
#else
#define ISQ_UNROLL ISQ_PRAGMA(GCC unroll 8)
#define ISQ_UNROLL_BY(count) ISQ_PRAGMA(GCC unroll count)
#endif

#define ISQ_LIKELY(condition) __builtin_expect(condition, 1)
#define ISQ_PREFETCH(...) __builtin_prefetch(__VA_ARGS__)  // address; 0; how near to the core it stays, from 0 to 3

// ---- vectors and numbers

#define ISQ_VECTOR(bytes) __attribute__((vector_size(bytes)))  // typedef float Four ISQ_VECTOR(16);
#define ISQ_CONVERT(vector, To) __builtin_convertvector(vector, To)

// Picks elements of a followed by b, two vectors of one type, by index. GCC has __builtin_shufflevector from 12 on.
#if defined(__clang__)
#define ISQ_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define ISQ_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype((a) == (b)){__VA_ARGS__})
#endif

// Functions of <cmath> may set errno, or call the C library where an instruction does.
#define ISQ_INFINITY __builtin_inff()
#define ISQ_NAN __builtin_nanf("")
#define ISQ_SQRT(x) __builtin_sqrtf(x)
#define ISQ_TRAILING_ZEROS(bits) __builtin_ctz(bits)

// ---- the processor

#if defined(__x86_64__)
#define ISQ_CPU_FIND() __builtin_cpu_init()                   // before ISQ_CPU_HAS
#define ISQ_CPU_HAS(feature) __builtin_cpu_supports(feature)  // and the operating system allows it
#elif defined(__aarch64__)
#define ISQ_GET_FPCR(bits) asm volatile("mrs %0, fpcr" : "=r"(bits))
#define ISQ_SET_FPCR(bits) asm volatile("msr fpcr, %0" : : "r"(bits))
#define ISQ_WAIT() asm volatile("isb" ::: "memory")  // "yield" does nothing on most of these processors
#endif

// For instructions of which a compiler does not know what they read: all that was written is in memory, with the second
// macro also what is at `address`.
#define ISQ_WRITE_ALL() asm volatile("" : : : "memory")
#define ISQ_IN_MEMORY(address) asm volatile("" : : "r"(address) : "memory")
#define ISQ_THROUGH_MEMORY(variable) asm("" : "+m"(variable))  // written there, and read again from there
