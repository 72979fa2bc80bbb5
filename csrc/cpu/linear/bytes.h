// Vectors of 64 bytes for the dot-product kernels, as one register of 512 bits, two of 256 or four of 128. The kernels
// see four quarters of 16 bytes and sixteen 32-bit lanes, four to a quarter. Only operations whose comment says so move
// data between quarters.
#pragma once

#include "cpu/convert.h"

namespace isqtorch::ISQ_ISA {

constexpr int kNativeBytes = 4 * ISQ_VECTOR_FLOATS, kParts = 64 / kNativeBytes;

typedef uint8_t Quarter ISQ_VECTOR(16);
typedef uint8_t NativeU8 ISQ_VECTOR(kNativeBytes);
typedef uint16_t NativeU16 ISQ_VECTOR(kNativeBytes);
typedef uint64_t NativeU64 ISQ_VECTOR(kNativeBytes);
typedef int32_t NativeI32 ISQ_VECTOR(kNativeBytes);
typedef float NativeF32 ISQ_VECTOR(kNativeBytes);
typedef float FourFloats ISQ_VECTOR(16);

struct Bytes {
  NativeU8 part[kParts];
};
struct Ints {
  NativeI32 part[kParts];
};
struct Floats {
  NativeF32 part[kParts];
};

// Part by part: for a copy of the whole struct, GCC would go through memory.
template <class Wide>
ISQ_INLINE Wide load_wide(const void* from) {
  Wide v;
  for (int p = 0; p < kParts; ++p) {
    std::memcpy(&v.part[p], static_cast<const uint8_t*>(from) + p * kNativeBytes, kNativeBytes);
  }
  return v;
}
ISQ_INLINE Bytes load_64(const void* p) { return load_wide<Bytes>(p); }
ISQ_INLINE void store_64(Bytes v, void* to) {
  for (int p = 0; p < kParts; ++p) {
    std::memcpy(static_cast<uint8_t*>(to) + p * kNativeBytes, &v.part[p], kNativeBytes);
  }
}
ISQ_INLINE Quarter load_16(const void* p) {
#if defined(__aarch64__)
  return (Quarter)vld1q_u8(static_cast<const uint8_t*>(p));  // GCC moves a memcpy through general registers
#else
  Quarter v;
  std::memcpy(&v, p, sizeof v);
  return v;
#endif
}
ISQ_INLINE Quarter load_8_twice(const void* p) {
#if defined(__x86_64__)
  double once;  // bits, not a number; p may have any alignment
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
// Bits in `mask` come from a, the others from b.
ISQ_INLINE Bytes select_bits(uint8_t mask, Bytes a, Bytes b) {
#if ISQ_VECTOR_FLOATS == 16
  const __m512i bits = _mm512_set1_epi8((char)mask);
  return {{(NativeU8)_mm512_ternarylogic_epi64(bits, (__m512i)a.part[0], (__m512i)b.part[0], 0xca)}};
#else
  return (a & mask) | (b & (uint8_t)~mask);
#endif
}

// Shifts and products work on 16-bit lanes, because x86 cannot shift bytes. Bits of the neighbour byte come in, so a
// mask must follow.
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
#if defined(ISQ_GFNI)
// Each bit i of a byte becomes the sum modulo 2 of some bits of that byte: those in byte 7 - i of the matrix for its
// group of eight bytes.
ISQ_INLINE __m512i mix_bits(__m512i a, __m512i matrices) { return _mm512_gf2p8affine_epi64_epi8(a, matrices, 0); }

// The matrix that takes bit b0 as the lowest bit, b1 as the next, ...; -1 gives zero.
constexpr uint64_t picks(int b0, int b1, int b2, int b3, int b4, int b5, int b6, int b7) {
  const int from[8] = {b0, b1, b2, b3, b4, b5, b6, b7};
  uint64_t matrix = 0;
  for (int i = 0; i < 8; ++i) matrix = matrix << 8 | (from[i] < 0 ? 0 : 1 << from[i]);
  return matrix;
}
template <uint64_t kMatrix, uint64_t kUpperMatrix = kMatrix>
ISQ_INLINE Bytes pick_bits(Bytes a) {  // kUpperMatrix: for the bytes 8-15 of each quarter
  const __m512i matrices = _mm512_set4_epi64(kUpperMatrix, kMatrix, kUpperMatrix, kMatrix);
  return {{(NativeU8)mix_bits((__m512i)a.part[0], matrices)}};
}
#endif

// Moves kCount bits from kFirst on to the bottom of each byte.
template <int kFirst, int kCount>
ISQ_INLINE Bytes bit_field(Bytes a) {
  if constexpr (kFirst == 0) return a & ((1 << kCount) - 1);
#if defined(ISQ_GFNI)
  constexpr auto kPick = [](int i) { return i < kCount ? kFirst + i : -1; };
  return pick_bits<picks(kPick(0), kPick(1), kPick(2), kPick(3), kPick(4), kPick(5), kPick(6), kPick(7))>(a);
#else
  return shift_right<kFirst>(a) & ((1 << kCount) - 1);
#endif
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

// Every byte becomes that of the table whose number it is; numbers are below 16.
ISQ_INLINE Bytes look_up(Quarter table, Bytes number) {
#if ISQ_VECTOR_FLOATS == 16
  return {{(NativeU8)_mm512_shuffle_epi8((__m512i)four_times(table).part[0], (__m512i)number.part[0])}};
#elif ISQ_VECTOR_FLOATS == 8
  const __m256i twice = _mm256_broadcastsi128_si256((__m128i)table);
  for (int p = 0; p < 2; ++p) number.part[p] = (NativeU8)_mm256_shuffle_epi8(twice, (__m256i)number.part[p]);
  return number;
#else
  for (int p = 0; p < 4; ++p) number.part[p] = shuffle(table, number.part[p]);
  return number;
#endif
}

// Spreads sixteen bytes over 64: byte j becomes byte index.from[j] of them, or zero where that is above 127.
struct Spread {
  uint8_t from[64];
};
ISQ_INLINE Bytes spread(Quarter sixteen, const Spread& index) {
  Bytes bytes = four_times(sixteen);
#if ISQ_VECTOR_FLOATS >= 8
  const Bytes from = load_64(index.from);
  for (int p = 0; p < kParts; ++p) {
#if ISQ_VECTOR_FLOATS == 16
    bytes.part[p] = (NativeU8)_mm512_shuffle_epi8((__m512i)bytes.part[p], (__m512i)from.part[p]);
#else
    bytes.part[p] = (NativeU8)_mm256_shuffle_epi8((__m256i)bytes.part[p], (__m256i)from.part[p]);
#endif
  }
#elif defined(__aarch64__)
  for (int p = 0; p < 4; ++p) bytes.part[p] = shuffle(bytes.part[p], load_16(index.from + 16 * p));
#else
  for (int j = 0; j < 64; ++j) bytes.part[j / 16][j % 16] = index.from[j] < 128 ? sixteen[index.from[j]] : 0;
#endif
  return bytes;
}

// Adds `value` to byte j of quarter q where bit j of the 16-bit word at from[q] is set: one more bit of a code.
ISQ_INLINE Bytes add_where(Bytes code, const uint8_t* const* from, uint8_t value) {
#if ISQ_VECTOR_FLOATS == 16
  uint64_t bits = 0;
  for (int q = 0; q < 4; ++q) bits |= (uint64_t)load_u16(from[q]) << (16 * q);
  const __m512i u = (__m512i)code.part[0];
  return {{(NativeU8)_mm512_mask_add_epi8(u, bits, u, _mm512_set1_epi8((char)value))}};
#else
  typedef uint16_t Words ISQ_VECTOR(16);
  constexpr Quarter kByte = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
  constexpr Quarter kBit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  const auto word = [&](int q) { return (Quarter)(Words)(load_u16(from[q]) - Words{}); };
  const Bytes bits = shuffle(from_quarters(word(0), word(1), word(2), word(3)), kByte), one = four_times(kBit);
  for (int p = 0; p < kParts; ++p) {
    code.part[p] = code.part[p] | ((NativeU8)((bits.part[p] & one.part[p]) == one.part[p]) & value);
  }
  return code;
#endif
}

}  // namespace isqtorch::ISQ_ISA
