// What the searches are written in: numbers with one lane per block, whose types and functions the backend provides.
//
// A backend includes its own lanes before any file of searches/: vectors on a CPU (cpu/lanes.h), one lane per thread on
// a GPU (cuda/kernels/quantize/lanes.cuh). The searches include no file of a backend. In namespace isqtorch::ISQ_ISA
// there must be:
//
//   LaneFloats LaneInts LaneDoubles           a float, an int32_t, a double per lane, with C++'s operators; comparisons
//                                             give LaneInts, -1 for true and 0 for false
//   FloatOf<V> IntOf<V> ScalarOf<V>           by specializing Like<V>, which twin.h does for its own type
//   splat<V> select any min max clamp abs sqrt
//   as_float as_int                           the same bits as another type
//   to_float to_double truncate               the same value as another type
//   nearest_int nearest_float nearest_small   ggml's rounding
//   rounded_to_f16 rounded_to_bf16            the nearest 16-bit number, as a float
//
// and the macros ISQ_INLINE, ISQ_GPU_INLINE, ISQ_GPU_UNROLL and ISQ_GPU_ROLLED.
#pragma once

#if !defined(ISQ_ISA) || !defined(ISQ_INLINE) || !defined(ISQ_GPU_INLINE)
#error "Include cpu/lanes.h or cuda/kernels/quantize/lanes.cuh before any file of searches/."
#endif

namespace isqtorch::ISQ_ISA {

static_assert(std::is_same_v<FloatOf<LaneInts>, LaneFloats> && std::is_same_v<IntOf<LaneFloats>, LaneInts>);
static_assert(std::is_same_v<ScalarOf<LaneFloats>, float> && std::is_same_v<ScalarOf<LaneInts>, int32_t>);
static_assert(std::is_same_v<decltype(LaneFloats{} < LaneFloats{}), LaneInts>);
static_assert(sizeof(LaneInts) == sizeof(LaneFloats) && sizeof(LaneDoubles) == 2 * sizeof(LaneFloats));

}  // namespace isqtorch::ISQ_ISA
