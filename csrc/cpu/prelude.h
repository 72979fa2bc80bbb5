// Every foreign header that the code of an instruction-set level uses. It is included before the target region opens,
// so that nothing in these headers is compiled for instructions that the machine may lack.
#pragma once

#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic ignored "-Wuninitialized"  // of the undefined vectors inside its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "blocks.h"
#include "compiler.h"
#include "cpu/kernels.h"
