// Every foreign header that code inside an ISA region uses. Included before the region opens, so that nothing in them
// is compiled for instructions the machine may lack.
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
#include "cpu/kernels.h"
