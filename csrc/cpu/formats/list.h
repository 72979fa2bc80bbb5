// The list of formats in blocks.h as types, declared but not defined, which is all that the kernels of `linear` need.
// The other files of this folder define them.
#pragma once

#include "blocks.h"
#include "dtype.h"

namespace isqtorch::ISQ_ISA {

#define ISQ_DECLARE(name, Format) struct Format;
ISQ_GGML32(ISQ_DECLARE)
ISQ_KQUANTS(ISQ_DECLARE)
ISQ_CODEBOOKS(ISQ_DECLARE)
ISQ_FP8(ISQ_DECLARE)
#undef ISQ_DECLARE
template <int kBits, int kGroup, Dtype kScale>
struct Afq;
template <int kBits, int kGroup>
struct Hqq;

template <class... Format>
struct Formats {};

// Every entry begins with a comma, so the list begins with a type that is dropped.
template <class, class... Format>
using WithoutFirst = Formats<Format...>;
#define ISQ_NEXT(name, ...) , __VA_ARGS__
using AllFormats = WithoutFirst<void ISQ_FORMATS(ISQ_NEXT)>;
#undef ISQ_NEXT

}  // namespace isqtorch::ISQ_ISA
