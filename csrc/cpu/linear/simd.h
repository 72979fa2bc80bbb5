// Vectors of 64 bytes for the dot-product kernels, whatever registers the level has: one 512-bit register, two of 256
// bits or four of 128. The kernels see four quarters of 16 bytes (no operation but the ones named so moves data between
// quarters) and sixteen 32-bit lanes, four to a quarter.
#pragma once

#include "cpu/convert.h"

namespace isqtorch::ISQ_ISA {

constexpr int kNativeBytes = 4 * ISQ_VECTOR_FLOATS, kParts = 64 / kNativeBytes;

typedef uint8_t Quarter __attribute__((vector_size(16)));
typedef uint8_t NativeU8 __attribute__((vector_size(kNativeBytes)));
typedef uint16_t NativeU16 __attribute__((vector_size(kNativeBytes)));
typedef uint64_t NativeU64 __attribute__((vector_size(kNativeBytes)));
typedef int32_t NativeI32 __attribute__((vector_size(kNativeBytes)));
typedef float NativeF32 __attribute__((vector_size(kNativeBytes)));
typedef float FourFloats __attribute__((vector_size(16)));

struct Bytes {
  NativeU8 part[kParts];
};
struct Ints {
  NativeI32 part[kParts];
};
struct Floats {
  NativeF32 part[kParts];
};

// Part by part: GCC keeps a copy of the whole struct in memory.
template <class Wide>
ISQ_INLINE Wide load_wide(const void* from) {
  Wide v;
  for (int p = 0; p < kParts; ++p) {
    std::memcpy(&v.part[p], static_cast<const uint8_t*>(from) + p * kNativeBytes, kNativeBytes);
  }
  return v;
}
ISQ_INLINE Bytes load_64(const void* p) { return load_wide<Bytes>(p); }
ISQ_INLINE Quarter load_16(const void* p) {
#if defined(__aarch64__)
  return (Quarter)vld1q_u8(static_cast<const uint8_t*>(p));  // GCC copies some others through general registers
#else
  Quarter v;
  std::memcpy(&v, p, sizeof v);
  return v;
#endif
}
ISQ_INLINE Quarter load_8_twice(const void* p) {
#if defined(__x86_64__)
  double once;  // bits, not a number; they may lie at any address
  std::memcpy(&once, p, sizeof once);
  return (Quarter)_mm_set1_pd(once);
#elif defined(__aarch64__)
  const uint8x8_t once = vld1_u8(static_cast<const uint8_t*>(p));
  return (Quarter)vcombine_u8(once, once);
#else
  uint64_t once;
  std::memcpy(&once, p, 8);
  const uint64_t twice[2] = {once, once};
  return load_16(twice);
#endif
}

// ---- bytes --------------------------------------------------------------------------------------------------------

ISQ_INLINE Bytes operator&(Bytes a, uint8_t mask) {
  for (int p = 0; p < kParts; ++p) a.part[p] = a.part[p] & mask;
  return a;
}
ISQ_INLINE Bytes operator|(Bytes a, Bytes b) {
  for (int p = 0; p < kParts; ++p) a.part[p] = a.part[p] | b.part[p];
  return a;
}
ISQ_INLINE Bytes operator^(Bytes a, uint8_t mask) {
  for (int p = 0; p < kParts; ++p) a.part[p] = a.part[p] ^ mask;
  return a;
}

// Shifts and products are of 16-bit lanes, because x86 has no shifts of bytes: bits of the neighbour come in, and a
// mask has to follow.
template <int n>
ISQ_INLINE Bytes shift_right(Bytes a) {
  for (int p = 0; p < kParts; ++p) a.part[p] = (NativeU8)((NativeU16)a.part[p] >> n);
  return a;
}
template <int n>
ISQ_INLINE Bytes shift_left(Bytes a) {
  for (int p = 0; p < kParts; ++p) a.part[p] = (NativeU8)((NativeU16)a.part[p] << n);
  return a;
}
ISQ_INLINE Bytes multiply_16(Bytes a, Bytes factors) {
  for (int p = 0; p < kParts; ++p) a.part[p] = (NativeU8)((NativeU16)a.part[p] * (NativeU16)factors.part[p]);
  return a;
}
ISQ_INLINE Bytes shift_right_64(Bytes a, Bytes counts) {
  for (int p = 0; p < kParts; ++p) a.part[p] = (NativeU8)((NativeU64)a.part[p] >> (NativeU64)counts.part[p]);
  return a;
}

ISQ_INLINE Bytes from_quarters(Quarter a, Quarter b, Quarter c, Quarter d) {
#if ISQ_VECTOR_FLOATS == 16
  __m512i v = _mm512_inserti32x4(_mm512_castsi128_si512((__m128i)a), (__m128i)b, 1);
  v = _mm512_inserti32x4(v, (__m128i)c, 2);
  return {{(NativeU8)_mm512_inserti32x4(v, (__m128i)d, 3)}};
#elif ISQ_VECTOR_FLOATS == 8
  return {{(NativeU8)_mm256_inserti128_si256(_mm256_castsi128_si256((__m128i)a), (__m128i)b, 1),
           (NativeU8)_mm256_inserti128_si256(_mm256_castsi128_si256((__m128i)c), (__m128i)d, 1)}};
#else
  return {{a, b, c, d}};
#endif
}
ISQ_INLINE Bytes four_times(Quarter a) {
#if ISQ_VECTOR_FLOATS == 16
  return {{(NativeU8)_mm512_broadcast_i32x4((__m128i)a)}};
#else
  return from_quarters(a, a, a, a);
#endif
}
// 32 bytes from memory, in both halves.
ISQ_INLINE Bytes load_32_twice(const uint8_t* p) {
#if ISQ_VECTOR_FLOATS == 16
  return {{(NativeU8)_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)p))}};
#else
  const Quarter a = load_16(p), b = load_16(p + 16);
  return from_quarters(a, b, a, b);
#endif
}

// From [a0 a1 a2 a3] and [b0 b1 b2 b3], quarters: *even = [a0 a2 b0 b2], *odd = [a1 a3 b1 b3].
ISQ_INLINE void split_quarters(Bytes a, Bytes b, Bytes* even, Bytes* odd) {
#if ISQ_VECTOR_FLOATS == 16
  even->part[0] = (NativeU8)_mm512_shuffle_i32x4((__m512i)a.part[0], (__m512i)b.part[0], 0x88);
  odd->part[0] = (NativeU8)_mm512_shuffle_i32x4((__m512i)a.part[0], (__m512i)b.part[0], 0xdd);
#elif ISQ_VECTOR_FLOATS == 8
  const Bytes in[2] = {a, b};
  for (int p = 0; p < 2; ++p) {
    const __m256i low = (__m256i)in[p].part[0], high = (__m256i)in[p].part[1];
    even->part[p] = (NativeU8)_mm256_permute2x128_si256(low, high, 0x20);
    odd->part[p] = (NativeU8)_mm256_permute2x128_si256(low, high, 0x31);
  }
#else
  *even = {{a.part[0], a.part[2], b.part[0], b.part[2]}};
  *odd = {{a.part[1], a.part[3], b.part[1], b.part[3]}};
#endif
}

// Byte j of each quarter becomes byte index[j] (< 16) of the same quarter.
ISQ_INLINE Quarter shuffle(Quarter a, Quarter index) {
#if ISQ_VECTOR_FLOATS >= 8
  return (Quarter)_mm_shuffle_epi8((__m128i)a, (__m128i)index);
#elif defined(__aarch64__)
  return (Quarter)vqtbl1q_u8((uint8x16_t)a, (uint8x16_t)index);
#else
  Quarter r;
  for (int j = 0; j < 16; ++j) r[j] = a[index[j]];
  return r;
#endif
}
ISQ_INLINE Bytes shuffle(Bytes a, Quarter index) {
#if ISQ_VECTOR_FLOATS == 16
  return {{(NativeU8)_mm512_shuffle_epi8((__m512i)a.part[0], (__m512i)four_times(index).part[0])}};
#elif ISQ_VECTOR_FLOATS == 8
  for (int p = 0; p < 2; ++p) {
    a.part[p] = (NativeU8)_mm256_shuffle_epi8((__m256i)a.part[p], _mm256_broadcastsi128_si256((__m128i)index));
  }
  return a;
#else
  for (int p = 0; p < 4; ++p) a.part[p] = shuffle(a.part[p], index);
  return a;
#endif
}

// Byte i is `value` where bit i is set, else 0.
ISQ_INLINE Bytes spread_bits(uint64_t bits, uint8_t value) {
#if ISQ_VECTOR_FLOATS == 16
  return {{(NativeU8)_mm512_maskz_set1_epi8(bits, (char)value)}};
#else
  constexpr Quarter kByte = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
  constexpr Quarter kBit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  Quarter quarter[4];
  for (int q = 0; q < 4; ++q) {
    const uint16_t word = (uint16_t)(bits >> (16 * q));
    typedef uint16_t Words __attribute__((vector_size(16)));
    const Quarter both = (Quarter)(Words)(word - Words{});
    quarter[q] = (Quarter)((shuffle(both, kByte) & kBit) != 0) & value;
  }
  return from_quarters(quarter[0], quarter[1], quarter[2], quarter[3]);
#endif
}

// ---- sixteen lanes ------------------------------------------------------------------------------------------------

ISQ_INLINE Floats to_floats(Ints a) {
  Floats f;
  for (int p = 0; p < kParts; ++p) f.part[p] = __builtin_convertvector(a.part[p], NativeF32);
  return f;
}
ISQ_INLINE Ints all_lanes(int32_t v) {
  Ints i;
  for (int p = 0; p < kParts; ++p) i.part[p] = v + NativeI32{};
  return i;
}
ISQ_INLINE Bytes word_in_all_lanes(const void* word) {
  int32_t v;
  std::memcpy(&v, word, 4);
  const Ints words = all_lanes(v);
  Bytes bytes;
  for (int p = 0; p < kParts; ++p) bytes.part[p] = (NativeU8)words.part[p];
  return bytes;
}
ISQ_INLINE Floats load_floats_16(const float* p) { return load_wide<Floats>(p); }
ISQ_INLINE Ints load_ints_16(const int32_t* p) { return load_wide<Ints>(p); }
ISQ_INLINE Ints operator-(Ints a, Ints b) {
  for (int p = 0; p < kParts; ++p) a.part[p] = a.part[p] - b.part[p];
  return a;
}
ISQ_INLINE Floats operator*(Floats a, Floats b) {
  for (int p = 0; p < kParts; ++p) a.part[p] = a.part[p] * b.part[p];
  return a;
}
ISQ_INLINE Floats operator*(Floats a, float b) {
  for (int p = 0; p < kParts; ++p) a.part[p] = a.part[p] * b;
  return a;
}
ISQ_INLINE Floats operator-(Floats a) {
  for (int p = 0; p < kParts; ++p) a.part[p] = -a.part[p];
  return a;
}
// a * b + c, in one rounding where the level can. Contraction is off for the quantizers' sake, so it is asked for by
// name.
ISQ_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  for (int p = 0; p < kParts; ++p) {
#if ISQ_VECTOR_FLOATS == 16
    c.part[p] = (NativeF32)_mm512_fmadd_ps((__m512)a.part[p], (__m512)b.part[p], (__m512)c.part[p]);
#elif ISQ_VECTOR_FLOATS == 8
    c.part[p] = (NativeF32)_mm256_fmadd_ps((__m256)a.part[p], (__m256)b.part[p], (__m256)c.part[p]);
#elif defined(__aarch64__)
    c.part[p] = (NativeF32)vfmaq_f32((float32x4_t)c.part[p], (float32x4_t)a.part[p], (float32x4_t)b.part[p]);
#else
    c.part[p] = a.part[p] * b.part[p] + c.part[p];
#endif
  }
  return c;
}
ISQ_INLINE Floats all_lanes(float v) {
  Floats f;
  for (int p = 0; p < kParts; ++p) f.part[p] = v - NativeF32{};
  return f;
}
// Within each quarter of four times the same four values, the ones at kIndex...
template <int kA, int kB, int kC, int kD>
ISQ_INLINE Floats repeat_4(FourFloats v) {
#if ISQ_VECTOR_FLOATS == 16
  return {{(NativeF32)_mm512_permute_ps(_mm512_broadcast_f32x4((__m128)v), kA | kB << 2 | kC << 4 | kD << 6)}};
#else
  const FourFloats mixed = {v[kA], v[kB], v[kC], v[kD]};
  const Bytes all = four_times((Quarter)mixed);
  Floats f;
  for (int p = 0; p < kParts; ++p) f.part[p] = (NativeF32)all.part[p];
  return f;
#endif
}
// Four f16, the first in the lowest bits.
ISQ_INLINE FourFloats four_f16(uint64_t halves) {
#if ISQ_VECTOR_FLOATS >= 8
  return (FourFloats)_mm_cvtph_ps(_mm_cvtsi64_si128((long long)halves));
#elif defined(__aarch64__)
  return (FourFloats)vcvt_f32_f16(vreinterpret_f16_u64(vcreate_u64(halves)));
#else
  FourFloats f;
  for (int i = 0; i < 4; ++i) f[i] = f16_to_f32((uint16_t)(halves >> (16 * i)));
  return f;
#endif
}
ISQ_INLINE float sum(Floats f) {
  NativeF32 total = f.part[0];
  for (int p = 1; p < kParts; ++p) total += f.part[p];
#if ISQ_VECTOR_FLOATS == 16
  return _mm512_reduce_add_ps((__m512)total);
#elif defined(__aarch64__)
  return vaddvq_f32((float32x4_t)total);
#else
  float s = total[0];
  for (int l = 1; l < ISQ_VECTOR_FLOATS; ++l) s += total[l];
  return s;
#endif
}

ISQ_INLINE Floats bytes_to_floats(Quarter bytes) {
#if ISQ_VECTOR_FLOATS == 16
  return {{(NativeF32)_mm512_cvtepi32_ps(_mm512_maskz_cvtepu8_epi32(0xffff, (__m128i)bytes))}};
#elif ISQ_VECTOR_FLOATS == 8
  return {{(NativeF32)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32((__m128i)bytes)),
           (NativeF32)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128((__m128i)bytes, 8)))}};
#elif defined(__aarch64__)
  const uint16x8_t low = vmovl_u8(vget_low_u8((uint8x16_t)bytes)), high = vmovl_high_u8((uint8x16_t)bytes);
  return {{(NativeF32)vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))), (NativeF32)vcvtq_f32_u32(vmovl_high_u16(low)),
           (NativeF32)vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))), (NativeF32)vcvtq_f32_u32(vmovl_high_u16(high))}};
#else
  float f[16];
  for (int l = 0; l < 16; ++l) f[l] = bytes[l];
  return load_floats_16(f);
#endif
}
ISQ_INLINE Floats signed_bytes_to_floats(Quarter bytes) {
#if ISQ_VECTOR_FLOATS == 16
  return {{(NativeF32)_mm512_cvtepi32_ps(_mm512_maskz_cvtepi8_epi32(0xffff, (__m128i)bytes))}};
#elif ISQ_VECTOR_FLOATS == 8
  return {{(NativeF32)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32((__m128i)bytes)),
           (NativeF32)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128((__m128i)bytes, 8)))}};
#elif defined(__aarch64__)
  const int16x8_t low = vmovl_s8(vget_low_s8((int8x16_t)bytes)), high = vmovl_high_s8((int8x16_t)bytes);
  return {{(NativeF32)vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), (NativeF32)vcvtq_f32_s32(vmovl_high_s16(low)),
           (NativeF32)vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), (NativeF32)vcvtq_f32_s32(vmovl_high_s16(high))}};
#else
  float f[16];
  for (int l = 0; l < 16; ++l) f[l] = (int8_t)bytes[l];
  return load_floats_16(f);
#endif
}

#if defined(__aarch64__)
// Eight f16 as eight f32, in the parts p and p + 1.
ISQ_INLINE void widen_f16(uint16x8_t halves, Floats* f, int p) {
  f->part[p] = (NativeF32)vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(halves)));
  f->part[p + 1] = (NativeF32)vcvt_high_f32_f16(vreinterpretq_f16_u16(halves));
}
#endif

// The 16-bit floats in the lower halves of the lanes.
ISQ_INLINE Floats low_f16(Ints words) {
#if ISQ_VECTOR_FLOATS == 16
  return {{(NativeF32)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)words.part[0]))}};
#elif ISQ_VECTOR_FLOATS == 8
  Floats f;
  for (int p = 0; p < 2; ++p) {
    const __m256i low = _mm256_and_si256((__m256i)words.part[p], _mm256_set1_epi32(0xffff));
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    f.part[p] = (NativeF32)_mm256_cvtph_ps(halves);
  }
  return f;
#elif defined(__aarch64__)
  Floats f;
  for (int p = 0; p < 4; p += 2) {
    widen_f16(vuzp1q_u16((uint16x8_t)words.part[p], (uint16x8_t)words.part[p + 1]), &f, p);
  }
  return f;
#else
  int32_t word[16];
  float f[16];
  std::memcpy(word, &words, sizeof word);
  for (int l = 0; l < 16; ++l) f[l] = f16_to_f32((uint16_t)word[l]);
  return load_floats_16(f);
#endif
}
ISQ_INLINE Ints upper_halves(Ints words) {
  for (int p = 0; p < kParts; ++p) words.part[p] = words.part[p] >> 16;
  return words;
}
ISQ_INLINE Floats high_f16(Ints words) {
#if defined(__aarch64__)
  Floats f;
  for (int p = 0; p < 4; p += 2) {
    widen_f16(vuzp2q_u16((uint16x8_t)words.part[p], (uint16x8_t)words.part[p + 1]), &f, p);
  }
  return f;
#else
  return low_f16(upper_halves(words));
#endif
}
ISQ_INLINE Floats low_bf16(Ints words) {
  Floats f;
  for (int p = 0; p < kParts; ++p) f.part[p] = (NativeF32)(words.part[p] << 16);
  return f;
}
ISQ_INLINE Floats high_bf16(Ints words) {
  Floats f;
  for (int p = 0; p < kParts; ++p) f.part[p] = (NativeF32)(words.part[p] & (int32_t)0xffff0000);
  return f;
}

// Sixteen 32-bit words, at offsets from a base.
ISQ_INLINE Ints gather_words(const uint8_t* base, Ints offsets) {
  Ints v;
  for (int p = 0; p < kParts; ++p) {
#if ISQ_VECTOR_FLOATS == 16
    v.part[p] = (NativeI32)_mm512_i32gather_epi32((__m512i)offsets.part[p], base, 1);
#elif ISQ_VECTOR_FLOATS == 8
    v.part[p] = (NativeI32)_mm256_i32gather_epi32((const int*)base, (__m256i)offsets.part[p], 1);
#else
    float word[4];  // as if: for the compiler to keep them in vector registers
    for (int l = 0; l < 4; ++l) std::memcpy(&word[l], base + offsets.part[p][l], 4);
    v.part[p] = (NativeI32)NativeF32{word[0], word[1], word[2], word[3]};
#endif
  }
  return v;
}
// The first four bytes of sixteen blocks of kStride bytes.
template <int kStride>
ISQ_INLINE Ints block_heads(const uint8_t* blocks) {
  constexpr auto kOffsets = [] {
    struct {
      int32_t at[16];
    } all{};
    for (int l = 0; l < 16; ++l) all.at[l] = l * kStride;
    return all;
  }();
  return gather_words(blocks, load_ints_16(kOffsets.at));
}

}  // namespace isqtorch::ISQ_ISA
