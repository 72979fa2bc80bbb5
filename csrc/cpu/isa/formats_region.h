// Decoders, quantizers and attention in namespace isqtorch::ISQ_ISA, for the levels that make a difference to them.
// Included once per isa/*.cpp: each of these is one translation unit for one level.
#pragma once

#include "cpu/prelude.h"

#include "cpu/attention/attend.h"
#include "cpu/formats/affine.h"
#include "cpu/formats/codebook.h"
#include "cpu/formats/fp8.h"
#include "cpu/formats/ggml.h"
#include "cpu/formats/hqq.h"
#include "cpu/formats/kquants_affine.h"
#include "cpu/formats/kquants_symmetric.h"
#include "cpu/formats/list.h"
#include "cpu/quantize/feedback.h"

namespace isqtorch::ISQ_ISA {

FormatTable format_table() {
#define ISQ_ENTRY(name, ...) KernelsOf<__VA_ARGS__>::get(name),
  static const FormatKernels formats[] = {ISQ_FORMATS(ISQ_ENTRY)};
#undef ISQ_ENTRY
  return {formats, sizeof formats / sizeof *formats, load_floats, store_floats, add_squares, attention_kernels()};
}

}  // namespace isqtorch::ISQ_ISA
