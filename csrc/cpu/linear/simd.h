// The sixteen 32-bit lanes of a vector of 64 bytes (bytes.h) as numbers, and conversions from bytes.
#pragma once

#include "cpu/linear/bytes.h"

namespace isqtorch::ISQ_ISA {

ISQ_INLINE Floats to_floats(Ints a) {
  Floats f;
  for (int p = 0; p < kParts; ++p) f.part[p] = ISQ_CONVERT(a.part[p], NativeF32);
  return f;
}
ISQ_INLINE Ints all_lanes(int32_t v) {
  Ints i;
  for (int p = 0; p < kParts; ++p) i.part[p] = v + NativeI32{};
  return i;
}
ISQ_INLINE Bytes bytes_of(Ints words) {
  Bytes bytes;
  for (int p = 0; p < kParts; ++p) bytes.part[p] = (NativeU8)words.part[p];
  return bytes;
}
ISQ_INLINE Ints words_of(Bytes bytes) {
  Ints words;
  for (int p = 0; p < kParts; ++p) words.part[p] = (NativeI32)bytes.part[p];
  return words;
}
ISQ_INLINE Bytes word_in_all_lanes(const void* word) {
  int32_t v;
  std::memcpy(&v, word, 4);
  return bytes_of(all_lanes(v));
}
ISQ_INLINE Floats load_floats_16(const float* p) { return load_wide<Floats>(p); }
ISQ_INLINE Ints load_ints_16(const int32_t* p) { return load_wide<Ints>(p); }
ISQ_INLINE Ints operator+(Ints a, Ints b) {
  for (int p = 0; p < kParts; ++p) a.part[p] = a.part[p] + b.part[p];
  return a;
}
ISQ_INLINE Ints operator-(Ints a, Ints b) {
  for (int p = 0; p < kParts; ++p) a.part[p] = a.part[p] - b.part[p];
  return a;
}
ISQ_INLINE Ints operator&(Ints a, int32_t mask) {
  for (int p = 0; p < kParts; ++p) a.part[p] = a.part[p] & mask;
  return a;
}
ISQ_INLINE Ints shift_left(Ints a, int n) {
  for (int p = 0; p < kParts; ++p) a.part[p] = a.part[p] << n;
  return a;
}
ISQ_INLINE Ints shift_right(Ints a, int n) {
  for (int p = 0; p < kParts; ++p) a.part[p] = a.part[p] >> n;
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
// a * b + c with one rounding where the level has such an instruction. The compiler may not contract expressions,
// because quantizers must not change, so this is explicit.
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
// Four times the same quarter: its four lanes are v[kA], v[kB], v[kC], v[kD].
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
ISQ_INLINE FourFloats load_four_f16(const uint8_t* p) {
#if ISQ_VECTOR_FLOATS >= 8
  return (FourFloats)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p));
#else
  return four_f16(load_u64(p));
#endif
}
// Four numbers, each of which can be broadcast to all lanes. They go through memory, because a broadcast from there
// needs no shuffle.
struct alignas(16) Factors {
  explicit Factors(FourFloats f) {
    std::memcpy(at, &f, sizeof at);
#if defined(__x86_64__)
    ISQ_THROUGH_MEMORY(at);
#endif
  }
  float at[4];
};
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
// Eight f16 become f32, in the parts p and p + 1.
ISQ_INLINE void widen_f16(uint16x8_t halves, Floats* f, int p) {
  f->part[p] = (NativeF32)vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(halves)));
  f->part[p + 1] = (NativeF32)vcvt_high_f32_f16(vreinterpretq_f16_u16(halves));
}
#endif

#if ISQ_VECTOR_FLOATS == 16
// The lower halves of all lanes, then the upper halves.
ISQ_INLINE __m512i halves_of(__m512i words) {
  constexpr auto kOrder = [] {
    struct {
      uint16_t at[32];
    } order{};
    for (int i = 0; i < 32; ++i) order.at[i] = (uint16_t)(i % 16 * 2 + i / 16);
    return order;
  }();
  return _mm512_permutexvar_epi16(_mm512_loadu_si512(kOrder.at), words);
}
#endif

// The 16-bit floats in the lower halves of the lanes.
ISQ_INLINE Floats low_f16(Ints words) {
#if ISQ_VECTOR_FLOATS == 16
  return {{(NativeF32)_mm512_cvtph_ps(_mm512_castsi512_si256(halves_of((__m512i)words.part[0])))}};
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
ISQ_INLINE Floats high_f16(Ints words) {
#if ISQ_VECTOR_FLOATS == 16
  return {{(NativeF32)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves_of((__m512i)words.part[0]), 1))}};
#elif defined(__aarch64__)
  Floats f;
  for (int p = 0; p < 4; p += 2) {
    widen_f16(vuzp2q_u16((uint16x8_t)words.part[p], (uint16x8_t)words.part[p + 1]), &f, p);
  }
  return f;
#else
  return low_f16(shift_right(words, 16));
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
    float word[4];  // not floats, but declared so to stay in vector registers
    for (int l = 0; l < 4; ++l) std::memcpy(&word[l], base + offsets.part[p][l], 4);
    v.part[p] = (NativeI32)NativeF32{word[0], word[1], word[2], word[3]};
#endif
  }
  return v;
}
#if ISQ_VECTOR_FLOATS == 16
// Four 32-bit words, at offsets from a base.
ISQ_INLINE Quarter four_words(const uint8_t* base, const int32_t* offsets) {
  const auto word = [&](int l) { return (int)load_u32(base + offsets[l]); };
  return (Quarter)_mm_setr_epi32(word(0), word(1), word(2), word(3));
}

// How the first kBytes of sixteen blocks are picked from windows of 128 bytes. No window goes beyond the blocks.
template <int kStride, int kBytes>
struct HeadWindows {
  static constexpr int kBlocks = 7 * kStride + kBytes <= 128 ? 8 : 4, kCount = 16 / kBlocks;
  static_assert((kBlocks - 1) * kStride + kBytes <= 128 && 16 * kStride >= 128);
  static constexpr int begin(int window) {
    const int first = window * kBlocks * kStride, most = 16 * kStride - 128;
    return first < most ? first : most;
  }
  // In the units of kSize bytes that an instruction moves.
  template <class Index, int kSize>
  struct Picks {
    Index at[kCount][64 / kSize];
  };
  template <class Index, int kSize>
  static constexpr auto kPicks = [] {
    Picks<Index, kSize> picks{};
    for (int w = 0; w < kCount; ++w) {
      for (int i = 0; i < 64 / kSize; ++i) {
        picks.at[w][i] = (Index)((i * kSize / 4 * kStride - begin(w)) / kSize + i % (4 / kSize));
      }
    }
    return picks;
  }();
};

// Blocks of an even number of bytes.
template <class Windows>
ISQ_INLINE Ints pick_heads_by_halves(const uint8_t* blocks) {
  constexpr uint64_t kOfWindow = (uint64_t{1} << (2 * Windows::kBlocks)) - 1;
  __m512i heads = _mm512_setzero_si512();
  ISQ_UNROLL
  for (int w = 0; w < Windows::kCount; ++w) {
    const uint8_t* from = blocks + Windows::begin(w);
    const __m512i pick = _mm512_loadu_si512(Windows::template kPicks<uint16_t, 2>.at[w]);
    const __m512i picked =
        _mm512_maskz_permutex2var_epi16((__mmask32)(kOfWindow << (2 * Windows::kBlocks * w)), _mm512_loadu_si512(from),
                                        pick, _mm512_loadu_si512(from + 64));
    heads = _mm512_or_si512(heads, picked);
  }
  return {{(NativeI32)heads}};
}

#if defined(ISQ_VBMI)
template <class Windows>
ISQ_INLINE Ints pick_heads_by_bytes(const uint8_t* blocks) {
  static_assert(Windows::kCount == 2);
  __m512i heads = _mm512_setzero_si512();
  ISQ_UNROLL
  for (int w = 0; w < 2; ++w) {
    const uint8_t* from = blocks + Windows::begin(w);
    const __m512i pick = _mm512_loadu_si512(Windows::template kPicks<uint8_t, 1>.at[w]);
    const __m512i picked = _mm512_maskz_permutex2var_epi8(uint64_t{0xffffffff} << (32 * w), _mm512_loadu_si512(from),
                                                          pick, _mm512_loadu_si512(from + 64));
    heads = _mm512_or_si512(heads, picked);
  }
  return {{(NativeI32)heads}};
}
#endif
#endif

// The first kBytes of sixteen blocks of kStride bytes, each in the lower bytes of a lane. Its other bytes may be
// anything.
template <int kStride, int kBytes>
ISQ_INLINE Ints block_heads(const uint8_t* blocks) {
  // Permutations, because processors of AMD take dozens of instructions for a gather.
#if ISQ_VECTOR_FLOATS == 16
  if constexpr (kStride % 2 == 0) return pick_heads_by_halves<HeadWindows<kStride, kBytes>>(blocks);
#if defined(ISQ_VBMI)
  if constexpr (kStride % 2 != 0) return pick_heads_by_bytes<HeadWindows<kStride, kBytes>>(blocks);
#endif
#endif
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
