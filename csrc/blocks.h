// The blocks of the formats: how some neighbouring weights of a row lie in memory. At the end, the list of all formats.
//
// Little endian, no padding, and packed so that a block may start at any byte: rows of 34- or 110-byte blocks, shifted
// views and memory-mapped files guarantee no alignment. Field names are ggml's. AFQ and HQQ blocks depend on a group
// size and are defined beside their decoders.
#pragma once

#include <cstdint>

namespace isqtorch {

#pragma pack(push, 1)

// ---- 32 weights ----------------------------------------------------------------------------------------------------

struct BlockQ4_0 {
  uint16_t d;      // f16
  uint8_t qs[16];  // byte j: weight j in the low nibble, weight j + 16 in the high one
};
struct BlockQ4_1 {
  uint16_t d, m;  // f16
  uint8_t qs[16];
};
struct BlockQ5_0 {
  uint16_t d;     // f16
  uint8_t qh[4];  // bit e of this little-endian word is bit 4 of weight e
  uint8_t qs[16];
};
struct BlockQ5_1 {
  uint16_t d, m;  // f16
  uint8_t qh[4];
  uint8_t qs[16];
};
struct BlockQ8_0 {
  uint16_t d;  // f16
  int8_t qs[32];
};
struct BlockQ8_1 {
  uint16_t d, s;  // f16; s = d * sum(qs), for dot products
  int8_t qs[32];
};
struct BlockIq4Nl {
  uint16_t d;      // f16
  uint8_t qs[16];  // as in Q4_0, but a nibble is the number of a level
};
struct BlockMxfp4 {
  uint8_t e;  // w = 2^(e - 128) * level
  uint8_t qs[16];
};

// ---- 128 weights ---------------------------------------------------------------------------------------------------

struct BlockFp8 {
  float scale;
  uint8_t codes[128];  // e4m3fn: sign | exponent (4 bits, bias 7) | mantissa (3 bits)
};

// ---- 256 weights ---------------------------------------------------------------------------------------------------

struct BlockQ2K {
  uint8_t scales[16];  // per 16 weights: scale in the low nibble, min in the high one
  uint8_t qs[64];      // byte 32h + l: weights 128h + l, + 32, + 64, + 96 in bits 0-1, 2-3, 4-5, 6-7
  uint16_t d, dmin;    // f16
};
struct BlockQ3K {
  uint8_t hmask[32];   // bit e / 32 of byte e % 32 is bit 2 of weight e
  uint8_t qs[64];      // bits 0-1, as in Q2K
  uint8_t scales[12];  // sixteen 6-bit numbers, see unpack_scales in cpu/formats/kquants_symmetric.h
  uint16_t d;          // f16
};
struct BlockQ4K {
  uint16_t d, dmin;    // f16
  uint8_t scales[12];  // eight pairs of 6-bit numbers (scale, min)
  uint8_t qs[128];     // byte 32c + l: weight 64c + l in the low nibble, 64c + 32 + l in the high one
};
struct BlockQ5K {
  uint16_t d, dmin;  // f16
  uint8_t scales[12];
  uint8_t qh[32];  // bit e / 32 of byte e % 32 is bit 4 of weight e
  uint8_t qs[128];
};
struct BlockQ6K {
  uint8_t ql[128];    // low nibbles: byte 64h + l holds weights 128h + l and 128h + 64 + l
  uint8_t qh[64];     // byte 32h + l: bits 4-5 of weights 128h + l, + 32, + 64, + 96
  int8_t scales[16];  // per 16 weights
  uint16_t d;         // f16
};
struct BlockIq4Xs {
  uint16_t d;           // f16
  uint8_t scales_h[2];  // per 32 weights: bits 4-5 of the scale plus 32, in order from the lowest bits on
  uint8_t scales_l[4];  // bits 0-3
  uint8_t qs[128];      // byte 16g + l: weight 32g + l in the low nibble, 32g + 16 + l in the high one
};
struct BlockQ8K {
  float d;
  int8_t qs[256];
  int16_t bsums[16];  // sums of 16 qs, for dot products
};

#pragma pack(pop)

static_assert(sizeof(BlockQ4_0) == 18 && sizeof(BlockQ4_1) == 20 && sizeof(BlockQ5_0) == 22 && sizeof(BlockQ5_1) == 24);
static_assert(sizeof(BlockQ8_0) == 34 && sizeof(BlockQ8_1) == 36 && sizeof(BlockQ2K) == 84 && sizeof(BlockQ3K) == 110);
static_assert(sizeof(BlockQ4K) == 144 && sizeof(BlockQ5K) == 176 && sizeof(BlockQ6K) == 210 && sizeof(BlockQ8K) == 292);
static_assert(sizeof(BlockFp8) == 132);
static_assert(sizeof(BlockIq4Nl) == 18 && sizeof(BlockIq4Xs) == 136 && sizeof(BlockMxfp4) == 17);

// The levels of iq4_nl and iq4_xs, and those of mxfp4, by code. The latter are the values of a 4-bit float (sign, 2
// bits of exponent, 1 of mantissa) times two.
#define ISQ_IQ4_LEVELS -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113
#define ISQ_E2M1_LEVELS 0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12

// ---- the list of formats -------------------------------------------------------------------------------------------

// Every format with native kernels, as X(name, struct), family by family. cpu/formats/list.h and cuda/formats/list.cuh
// expand these macros. A new format is one name here and a struct of that name in each of cpu/formats/ and
// cuda/formats/. (Metal takes its list from the registry in Python: isqtorch/ops/metal/formats.py.)

// clang-format off

#define ISQ_GGML32(X) X("q4_0", Q4_0) X("q4_1", Q4_1) X("q5_0", Q5_0) X("q5_1", Q5_1) X("q8_0", Q8_0) X("q8_1", Q8_1)
#define ISQ_KQUANTS(X) X("q2k", Q2K) X("q3k", Q3K) X("q4k", Q4K) X("q5k", Q5K) X("q6k", Q6K) X("q8k", Q8K)
#define ISQ_CODEBOOKS(X) X("iq4_nl", Iq4Nl) X("iq4_xs", Iq4Xs) X("mxfp4", Mxfp4)
#define ISQ_FP8(X) X("fp8", Fp8)

// Afq<bits, group size, type of scale and bias>. The names leave out the defaults, 64 and bf16.
#define ISQ_AFQ_OF(X, suffix, ...)                                              \
  X("afq2" suffix, Afq<2, __VA_ARGS__>) X("afq3" suffix, Afq<3, __VA_ARGS__>)   \
  X("afq4" suffix, Afq<4, __VA_ARGS__>) X("afq5" suffix, Afq<5, __VA_ARGS__>)   \
  X("afq6" suffix, Afq<6, __VA_ARGS__>) X("afq8" suffix, Afq<8, __VA_ARGS__>)
#define ISQ_AFQ(X)                                                                  \
  ISQ_AFQ_OF(X, "", 64, Dtype::kBf16) ISQ_AFQ_OF(X, "g32", 32, Dtype::kBf16)        \
  ISQ_AFQ_OF(X, "g128", 128, Dtype::kBf16) ISQ_AFQ_OF(X, ".f16", 64, Dtype::kF16)   \
  ISQ_AFQ_OF(X, "g32.f16", 32, Dtype::kF16) ISQ_AFQ_OF(X, "g128.f16", 128, Dtype::kF16)

// Hqq<bits, group size>
#define ISQ_HQQ(X)                                                        \
  X("hqq4", Hqq<4, 64>) X("hqq8", Hqq<8, 64>) X("hqq4g32", Hqq<4, 32>)    \
  X("hqq8g32", Hqq<8, 32>) X("hqq4g128", Hqq<4, 128>) X("hqq8g128", Hqq<8, 128>)

#define ISQ_FORMATS(X) ISQ_GGML32(X) ISQ_KQUANTS(X) ISQ_CODEBOOKS(X) ISQ_AFQ(X) ISQ_HQQ(X) ISQ_FP8(X)

// clang-format on

}  // namespace isqtorch
