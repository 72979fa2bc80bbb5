// The block structs of every ggml format: what one block of K weights looks like in memory.
//
// Little endian, no padding, and packed so that a block may start at any byte: rows of 34- or 110-byte blocks, shifted
// views and memory-mapped files align to nothing. Field names are ggml's. Affine, HQQ and FP8 blocks depend on a group
// size and live with their decoders.
#pragma once

#include <cstdint>

namespace isqtorch {

#pragma pack(push, 1)

// ---- 32 weights ----

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

// ---- 256 weights ----

struct BlockQ2K {
  uint8_t scales[16];  // per 16 weights: scale in the low nibble, min in the high one
  uint8_t qs[64];      // byte 32h + l: weights 128h + l, + 32, + 64, + 96 in bits 0-1, 2-3, 4-5, 6-7
  uint16_t d, dmin;    // f16
};
struct BlockQ3K {
  uint8_t hmask[32];   // bit e / 32 of byte e % 32 is bit 2 of weight e
  uint8_t qs[64];      // bits 0-1, as in Q2K
  uint8_t scales[12];  // sixteen 6-bit numbers, see unpack_scales in formats/kquants_symmetric.h
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
struct BlockQ8K {
  float d;
  int8_t qs[256];
  int16_t bsums[16];  // sums of 16 qs, for dot products
};

#pragma pack(pop)

static_assert(sizeof(BlockQ4_0) == 18 && sizeof(BlockQ4_1) == 20 && sizeof(BlockQ5_0) == 22 && sizeof(BlockQ5_1) == 24);
static_assert(sizeof(BlockQ8_0) == 34 && sizeof(BlockQ8_1) == 36 && sizeof(BlockQ2K) == 84 && sizeof(BlockQ3K) == 110);
static_assert(sizeof(BlockQ4K) == 144 && sizeof(BlockQ5K) == 176 && sizeof(BlockQ6K) == 210 && sizeof(BlockQ8K) == 292);

}  // namespace isqtorch
