// ISQ_TARGET_REGION(features) ... ISQ_END_TARGET_REGION: functions between these are compiled for a processor with the
// given features, whatever the command line says. All foreign headers are included here, before any region opens, so
// that nothing in them is compiled for instructions that the machine may lack.
#pragma once

#include "cpu/prelude.h"

#define ISQ_PRAGMA(...) _Pragma(#__VA_ARGS__)
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
