// The formats of this backend, from the list in blocks.h.
//
// The files of instances/ instantiate the kernels for the structs of one family. They are compiled once for each
// family, with ISQ_FAMILY defined as ISQ_GGML32, ISQ_KQUANTS, ISQ_CODEBOOKS, ISQ_STREAM or ISQ_FP8
// (csrc/cuda/build.py).
#pragma once

#include "blocks.h"
#include "cuda/formats/codebook.cuh"
#include "cuda/formats/fp8.cuh"
#include "cuda/formats/ggml32.cuh"
#include "cuda/formats/kquants.cuh"
#include "cuda/formats/stream.cuh"

// AFQ and HQQ are one family, with a struct for each number of bits instead of each format.
// clang-format off
#define ISQ_STREAM(X)                                                              \
  X("2 bits", BitStream<2>) X("3 bits", BitStream<3>) X("4 bits", BitStream<4>)    \
  X("5 bits", BitStream<5>) X("6 bits", BitStream<6>) X("8 bits", BitStream<8>)
// clang-format on

namespace isqtorch::cuda {

// A format's struct, for which kernels are instantiated, and its Shape, which they get at run time.
template <class Format>
struct Instance {
  using Struct = Format;
  static constexpr Shape kShape = {Format::kBlock, sizeof(typename Format::Block), Header::kNone};
};
template <int kBits, int kGroup, Header kHeader>
struct Instance<StreamFormat<kBits, kGroup, kHeader>> {
  using Struct = BitStream<kBits>;
  static constexpr Shape kShape = {kGroup, BitStream<kBits>::block_bytes(kGroup), kHeader};
};

}  // namespace isqtorch::cuda
