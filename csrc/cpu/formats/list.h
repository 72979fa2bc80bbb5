// The formats as types, from the list in blocks.h, declared and not defined: the kernels of `linear` need no more. The
// other files of this folder define them.
#pragma once

#include "blocks.h"
#include "dtype.h"

namespace isqtorch::ISQ_ISA {

#define ISQ_DECLARE(name, Format) struct Format;
ISQ_GGML32(ISQ_DECLARE)
ISQ_KQUANTS(ISQ_DECLARE)
ISQ_FP8(ISQ_DECLARE)
#undef ISQ_DECLARE
template <int kBits, int kGroup, Dtype kScale>
struct Afq;
template <int kBits, int kGroup>
struct Hqq;

template <class... Format>
struct Formats {};

// Every entry brings its own comma, so the list starts with a type that does not count.
template <class, class... Format>
using FormatsBehind = Formats<Format...>;
#define ISQ_NEXT(name, ...) , __VA_ARGS__
using AllFormats = FormatsBehind<void ISQ_FORMATS(ISQ_NEXT)>;
#undef ISQ_NEXT

}  // namespace isqtorch::ISQ_ISA
