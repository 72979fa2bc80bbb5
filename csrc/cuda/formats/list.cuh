// The formats by family, for the files that instantiate a launcher (launchers.cuh) for one family's structs:
//
//   #define ISQ_INSTANTIATE(F) template void launch_decode<F>(const DecodeJob&, const Shape&, Stream);
//   ISQ_GGML32_STRUCTS(ISQ_INSTANTIATE)
//
// and all of them by name, X(name, struct, block, header), for the table. A new format is a name here.
#pragma once

#include "cuda/formats/fp8.cuh"
#include "cuda/formats/ggml32.cuh"
#include "cuda/formats/kquants.cuh"
#include "cuda/formats/stream.cuh"

// clang-format off

#define ISQ_GGML32_STRUCTS(X) X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0) X(Q8_1)
#define ISQ_KQUANT_STRUCTS(X) X(Q2K) X(Q3K) X(Q4K) X(Q5K) X(Q6K) X(Q8K)
#define ISQ_STREAM_STRUCTS(X) X(BitStream<2>) X(BitStream<3>) X(BitStream<4>) X(BitStream<5>) X(BitStream<6>) X(BitStream<8>)
#define ISQ_FP8_STRUCTS(X) X(Fp8)

#define ISQ_FIXED(X, name, F) X(name, F, F::kBlock, Header::kNone)
#define ISQ_AFQ(X, suffix, block, header)                                                       \
  X("afq2" suffix, BitStream<2>, block, header) X("afq3" suffix, BitStream<3>, block, header)   \
  X("afq4" suffix, BitStream<4>, block, header) X("afq5" suffix, BitStream<5>, block, header)   \
  X("afq6" suffix, BitStream<6>, block, header) X("afq8" suffix, BitStream<8>, block, header)
#define ISQ_HQQ(X, suffix, block) \
  X("hqq4" suffix, BitStream<4>, block, Header::kScaleZeroF16) X("hqq8" suffix, BitStream<8>, block, Header::kScaleZeroF16)

#define ISQ_ALL_FORMATS(X)                                                                            \
  ISQ_FIXED(X, "q4_0", Q4_0) ISQ_FIXED(X, "q4_1", Q4_1) ISQ_FIXED(X, "q5_0", Q5_0)                    \
  ISQ_FIXED(X, "q5_1", Q5_1) ISQ_FIXED(X, "q8_0", Q8_0) ISQ_FIXED(X, "q8_1", Q8_1)                    \
  ISQ_FIXED(X, "q2k", Q2K) ISQ_FIXED(X, "q3k", Q3K) ISQ_FIXED(X, "q4k", Q4K)                          \
  ISQ_FIXED(X, "q5k", Q5K) ISQ_FIXED(X, "q6k", Q6K) ISQ_FIXED(X, "q8k", Q8K)                          \
  ISQ_AFQ(X, "", 64, Header::kScaleBiasBf16) ISQ_AFQ(X, ".f16", 64, Header::kScaleBiasF16)            \
  ISQ_AFQ(X, "g32", 32, Header::kScaleBiasBf16) ISQ_AFQ(X, "g32.f16", 32, Header::kScaleBiasF16)      \
  ISQ_AFQ(X, "g128", 128, Header::kScaleBiasBf16) ISQ_AFQ(X, "g128.f16", 128, Header::kScaleBiasF16)  \
  ISQ_HQQ(X, "", 64) ISQ_HQQ(X, "g32", 32) ISQ_HQQ(X, "g128", 128)                                    \
  ISQ_FIXED(X, "fp8", Fp8)

// clang-format on
