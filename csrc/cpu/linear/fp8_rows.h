// `linear` for few rows of x with fp8 weights, whose codes are floats and so cannot use the int8 dot products of
// rows.h.
//
// The product is in f32. Weights reach it through bf16 or f16, both of which hold every e4m3 value. A block of 128
// weights is summed before its scale is applied.
#pragma once

#include "cpu/linear/rows.h"

namespace isqtorch::ISQ_ISA {

constexpr int kFp8Block = sizeof(BlockFp8::codes);

// Sixteen codes as f32, divided by kSixteenFp8Factor. They go through f16: shifted into place, the exponent (bias 7) is
// an exponent of f16 (bias 15), hence the factor. Subnormal codes become subnormal f16. NaN would become 480, so the
// rest of its exponent is set.
constexpr float kSixteenFp8Factor = 256.0f;
ISQ_INLINE Floats sixteen_fp8(const uint8_t* codes) {
#if defined(__aarch64__)
  const uint8x16_t code = vld1q_u8(codes);
  Floats f;
  for (int h = 0; h < 2; ++h) {
    const NativeU16 wide = (NativeU16)(h ? vmovl_high_u8(code) : vmovl_u8(vget_low_u8(code)));
    const NativeU16 magnitude = (wide & 0x7f) << 7;
    widen_f16((uint16x8_t)(magnitude | (wide & 0x80) << 8 | ((NativeU16)(magnitude == 0x3f80) & 0x4000)), &f, 2 * h);
  }
  return f;
#else
  typedef uint16_t Wide ISQ_VECTOR(32);
  const Wide code = ISQ_CONVERT(load_16(codes), Wide);
  const Wide magnitude = (code & 0x7f) << 7;
  const Wide bits = magnitude | (code & 0x80) << 8 | ((Wide)(magnitude == 0x3f80) & 0x4000);
  uint16_t half[16];
  std::memcpy(half, &bits, sizeof half);
#if ISQ_VECTOR_FLOATS == 16
  return {{(NativeF32)_mm512_cvtph_ps((__m256i)bits)}};
#elif ISQ_VECTOR_FLOATS == 8
  return {{(NativeF32)_mm256_cvtph_ps((__m128i)load_16(half)), (NativeF32)_mm256_cvtph_ps((__m128i)load_16(half + 8))}};
#else
  float f[16];
  for (int l = 0; l < 16; ++l) f[l] = f16_to_f32(half[l]);
  return load_floats_16(f);
#endif
#endif
}

#if defined(ISQ_BF16)

// 64 codes as 2 x 32 bf16: bytes 0-7 of the four quarters, then bytes 8-15. One shift or mask makes f32 of them.
// Measured, that costs less than the dot products of bf16, and x needs no rounding.
struct Fp8Step {
  static constexpr const char* kName = "f32 dot products";
  static constexpr int kWeights = 64;
  struct alignas(64) Activations {
    float x[4][16];  // [v]: for lower and upper halves of the first 32 bf16, then of the others
  };

  static void pack(const float* x, Activations* out) {
    for (int v = 0; v < 4; ++v) {
      for (int l = 0; l < 16; ++l) out->x[v][l] = x[l / 4 * 16 + v / 2 * 8 + l % 4 * 2 + v % 2];
    }
  }

  // Upper and lower bytes of the bf16 for each of the 128 magnitudes.
  static constexpr auto kTable = [] {
    struct {
      uint8_t high[128], low[128];
    } table{};
    for (int code = 0; code < 128; ++code) {
      int exponent = code >> 3, mantissa = code & 7;
      unsigned bits = 0;
      if (code == 127) {
        bits = 0x7fc0;
      } else if (exponent > 0) {
        bits = (unsigned)(exponent + 120) << 7 | mantissa << 4;
      } else if (mantissa > 0) {  // mantissa * 2^-9, normalized
        for (exponent = 121; mantissa < 8; mantissa *= 2) --exponent;
        bits = (unsigned)exponent << 7 | (mantissa & 7) << 4;
      }
      table.high[code] = (uint8_t)(bits >> 8);
      table.low[code] = (uint8_t)bits;
    }
    return table;
  }();

  static constexpr float kFactor = 1.0f;
  ISQ_INLINE static void load(const uint8_t* codes, Floats* w) {
    const __m512i code = _mm512_loadu_si512(codes);
#if defined(ISQ_GFNI)
    // A normal code c is the bf16 (c & 127) * 16 + (120 << 7). The addition carries only through the uppermost bit of
    // the exponent: this bit moves up, and its complement fills four bits.
    constexpr uint64_t kHigh = picks(4, 5, 6, 6, 6, 6, 6, 7), kLow = picks(-1, -1, -1, -1, 0, 1, 2, 3);
    // Maps the magnitudes one to one such that 0-7 (subnormal) stay and 127 (NaN) becomes 8: both are found by one
    // comparison.
    constexpr uint64_t kRare = picks(0, 1, 2, 3, 4, 5, 6, -1) ^ picks(3, 3, 3, -1, 3, 4, 5, -1);
    const __m512i rare = mix_bits(code, _mm512_set1_epi64(kRare));
    if (ISQ_LIKELY(_mm512_cmple_epu8_mask(rare, _mm512_set1_epi8(8)) == 0)) {
      const __m512i high = _mm512_gf2p8affine_epi64_epi8(code, _mm512_set1_epi64(kHigh), 0x3c);
      const __m512i low = mix_bits(code, _mm512_set1_epi64(kLow));
      return widen(low, high, w);
    }
#endif
    const auto look_up = [&](const uint8_t* table) {
      return _mm512_permutex2var_epi8(_mm512_loadu_si512(table), code, _mm512_loadu_si512(table + 64));
    };
    const __m512i sign = _mm512_and_si512(code, _mm512_set1_epi8((char)0x80));
    const __m512i high = _mm512_or_si512(look_up(kTable.high), sign), low = look_up(kTable.low);
    widen(low, high, w);
  }

 private:
  // f32 from the lower and upper bytes of bf16.
  ISQ_INLINE static void widen(__m512i low, __m512i high, Floats* w) {
    const __m512i half[2] = {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
    for (int h = 0; h < 2; ++h) {
      w[2 * h] = {{(NativeF32)_mm512_slli_epi32(half[h], 16)}};
      w[2 * h + 1] = {{(NativeF32)_mm512_and_si512(half[h], _mm512_set1_epi32((int)0xffff0000))}};
    }
  }
};

#else

struct Fp8Step {
  static constexpr const char* kName = "f32 dot products";
  static constexpr int kWeights = 16;
  struct alignas(64) Activations {
    float x[1][kWeights];
  };

  static void pack(const float* x, Activations* out) { std::memcpy(out->x, x, sizeof out->x); }

  static constexpr float kFactor = kSixteenFp8Factor;
  ISQ_INLINE static void load(const uint8_t* codes, Floats* w) { *w = sixteen_fp8(codes); }
};

#endif

inline int64_t packed_fp8_activation_bytes(int64_t k) {
  return k / Fp8Step::kWeights * (int64_t)sizeof(Fp8Step::Activations);
}

inline void pack_fp8_activations(const float* x, int64_t k, void* packed) {
  Fp8Step::Activations* out = static_cast<Fp8Step::Activations*>(packed);
  for (int64_t i = 0; i < k; i += Fp8Step::kWeights) Fp8Step::pack(x + i, out++);
}

// As place_activations of rows.h.
inline void place_fp8_activations(const void* row, int64_t k, int tokens, int token, void* together) {
  const Fp8Step::Activations* from = static_cast<const Fp8Step::Activations*>(row);
  Fp8Step::Activations* to = static_cast<Fp8Step::Activations*>(together) + token;
  for (int64_t i = 0; i < k; i += Fp8Step::kWeights, to += tokens) *to = *from++;
}

// Multiplies a block by kTokens rows of x.
template <int kTokens>
ISQ_INLINE void multiply_fp8_block(const uint8_t* block, const Fp8Step::Activations* x, Floats* total) {
  constexpr int kVectors = Fp8Step::kWeights / 16;
  Floats acc[kTokens];
  for (int m = 0; m < kTokens; ++m) acc[m] = all_lanes(0.0f);
  for (int s = 0; s < kFp8Block / Fp8Step::kWeights; ++s, x += kTokens) {
    Floats w[kVectors];
    Fp8Step::load(block + offsetof(BlockFp8, codes) + s * Fp8Step::kWeights, w);
    for (int m = 0; m < kTokens; ++m) {
      for (int v = 0; v < kVectors; ++v) acc[m] = multiply_add(w[v], load_floats_16(x[m].x[v]), acc[m]);
    }
  }
  const Floats scale = all_lanes(load_f32(block) * Fp8Step::kFactor);
  for (int m = 0; m < kTokens; ++m) total[m] = multiply_add(acc[m], scale, total[m]);
}

template <int kTokens>
void multiply_fp8_rows(const RowsJob& job) {
  constexpr int64_t kBytes = sizeof(BlockFp8), kSteps = kFp8Block / Fp8Step::kWeights;
  const Fp8Step::Activations* x = static_cast<const Fp8Step::Activations*>(job.x);
  multiply_in_parts<kTokens>(job, job.k / kFp8Block, kBytes, kSteps * sizeof *x,
                             [&](int64_t row, int64_t begin, int64_t end, int64_t later, Floats* total)
                                 ISQ_INLINE_BODY {
                                   const uint8_t* w = job.w + row * job.row_bytes;
                                   for (int64_t b = begin; b < end; ++b) {
                                     prefetch_weights(w + b * kBytes, kBytes, later);
                                     multiply_fp8_block<kTokens>(w + b * kBytes, x + b * kSteps * kTokens, total);
                                   }
                                 });
}

}  // namespace isqtorch::ISQ_ISA
