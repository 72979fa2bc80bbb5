// Metal for clang++: what translate.py's output includes. Not all of metal_stdlib: what compute kernels use.
#pragma once

#include "atomic.h"
#include "entry.h"
#include "math.h"
#include "simdgroup.h"
#include "types.h"

// `threadgroup T name[n];`, once translated.
#define EMULATOR_THREADGROUP(name, ...)           \
  using name##_type = __VA_ARGS__;                \
  static char name##_id;                          \
  name##_type& name = *static_cast<name##_type*>( \
      ::simt::metal::threadgroup_memory(&name##_id, #name, sizeof(name##_type), alignof(name##_type)))

// The run pass knows no address spaces; check.h does.
#define kernel
#define device
#define thread
#define threadgroup
#define constant const
