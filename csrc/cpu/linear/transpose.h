// Transposes 32-bit words: sixteen rows of sixteen, or four of four within quarters.
#pragma once

#include "cpu/linear/simd.h"

namespace isqtorch::ISQ_ISA {

// Words, or pairs of words, of the first or second half of every quarter of a and b, alternating.
#if ISQ_VECTOR_FLOATS == 16
#define ISQ_INTERLEAVE(name, instruction, ...) \
  ISQ_INLINE NativeU8 name(NativeU8 a, NativeU8 b) { return (NativeU8)_mm512_##instruction((__m512i)a, (__m512i)b); }
#elif ISQ_VECTOR_FLOATS == 8
#define ISQ_INTERLEAVE(name, instruction, ...) \
  ISQ_INLINE NativeU8 name(NativeU8 a, NativeU8 b) { return (NativeU8)_mm256_##instruction((__m256i)a, (__m256i)b); }
#else
#define ISQ_INTERLEAVE(name, instruction, ...)                             \
  ISQ_INLINE NativeU8 name(NativeU8 a, NativeU8 b) {                       \
    return (NativeU8)ISQ_SHUFFLE((NativeI32)a, (NativeI32)b, __VA_ARGS__); \
  }
#endif
ISQ_INTERLEAVE(first_words, unpacklo_epi32, 0, 4, 1, 5)
ISQ_INTERLEAVE(second_words, unpackhi_epi32, 2, 6, 3, 7)
ISQ_INTERLEAVE(first_pairs, unpacklo_epi64, 0, 1, 4, 5)
ISQ_INTERLEAVE(second_pairs, unpackhi_epi64, 2, 3, 6, 7)
#undef ISQ_INTERLEAVE

// Word j of quarter q of *v[i] and word i of quarter q of *v[j] change places.
ISQ_INLINE void transpose_quarters(Bytes* const (&v)[4]) {
  for (int p = 0; p < kParts; ++p) {
    const NativeU8 a = v[0]->part[p], b = v[1]->part[p], c = v[2]->part[p], d = v[3]->part[p];
    const NativeU8 first_ab = first_words(a, b), first_cd = first_words(c, d);
    const NativeU8 second_ab = second_words(a, b), second_cd = second_words(c, d);
    v[0]->part[p] = first_pairs(first_ab, first_cd);
    v[1]->part[p] = second_pairs(first_ab, first_cd);
    v[2]->part[p] = first_pairs(second_ab, second_cd);
    v[3]->part[p] = second_pairs(second_ab, second_cd);
  }
}

#if ISQ_VECTOR_FLOATS == 16
// Sixteen rows of sixteen 32-bit words become columns.
ISQ_INLINE void transpose_16(__m512i* row) {
  __m512i pair[16], four[16];
  for (int i = 0; i < 16; i += 2) {
    pair[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    pair[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // four[i + c]: words 4q + c of the rows i .. i + 3, in quarter q
    four[i] = _mm512_unpacklo_epi64(pair[i], pair[i + 2]);
    four[i + 1] = _mm512_unpackhi_epi64(pair[i], pair[i + 2]);
    four[i + 2] = _mm512_unpacklo_epi64(pair[i + 1], pair[i + 3]);
    four[i + 3] = _mm512_unpackhi_epi64(pair[i + 1], pair[i + 3]);
  }
  for (int c = 0; c < 4; ++c) {
    const __m512i low01 = _mm512_shuffle_i32x4(four[c], four[4 + c], 0x88);  // quarters 0 2 0 2
    const __m512i high01 = _mm512_shuffle_i32x4(four[c], four[4 + c], 0xdd);
    const __m512i low23 = _mm512_shuffle_i32x4(four[8 + c], four[12 + c], 0x88);
    const __m512i high23 = _mm512_shuffle_i32x4(four[8 + c], four[12 + c], 0xdd);
    row[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    row[4 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    row[8 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    row[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
}
#endif

// Columns 4q .. 4q + 3, sixteen words each, go one after the other to columns[q]; rows are row_bytes apart.
ISQ_INLINE void transpose_words(const uint8_t* rows, int64_t row_bytes, uint8_t* const* columns) {
#if ISQ_VECTOR_FLOATS == 16
  __m512i words[16];
  for (int r = 0; r < 16; ++r) words[r] = _mm512_loadu_si512(rows + r * row_bytes);
  transpose_16(words);
  for (int c = 0; c < 16; ++c) _mm512_storeu_si512(columns[c / 4] + c % 4 * 64, words[c]);
#else
  typedef int32_t Four ISQ_VECTOR(16);
  for (int r = 0; r < 16; r += 4) {
    for (int q = 0; q < 4; ++q) {
      Four in[4], out[4];
      for (int i = 0; i < 4; ++i) std::memcpy(&in[i], rows + (r + i) * row_bytes + 16 * q, 16);
      const Four low01 = ISQ_SHUFFLE(in[0], in[1], 0, 4, 1, 5);
      const Four low23 = ISQ_SHUFFLE(in[2], in[3], 0, 4, 1, 5);
      const Four high01 = ISQ_SHUFFLE(in[0], in[1], 2, 6, 3, 7);
      const Four high23 = ISQ_SHUFFLE(in[2], in[3], 2, 6, 3, 7);
      out[0] = ISQ_SHUFFLE(low01, low23, 0, 1, 4, 5);
      out[1] = ISQ_SHUFFLE(low01, low23, 2, 3, 6, 7);
      out[2] = ISQ_SHUFFLE(high01, high23, 0, 1, 4, 5);
      out[3] = ISQ_SHUFFLE(high01, high23, 2, 3, 6, 7);
      for (int i = 0; i < 4; ++i) std::memcpy(columns[q] + i * 64 + 4 * r, &out[i], 16);
    }
  }
#endif
}
// The same for a square of floats.
ISQ_INLINE void transpose_floats(const Floats* rows, float (*columns)[16]) {
  uint8_t* to = reinterpret_cast<uint8_t*>(columns);
  uint8_t* const quarters[4] = {to, to + 256, to + 512, to + 768};
  transpose_words(reinterpret_cast<const uint8_t*>(rows), 64, quarters);
}

}  // namespace isqtorch::ISQ_ISA
