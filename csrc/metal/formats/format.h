// What the shaders know of a format. Each format has one struct (ggml32.h, kquants.h, stream.h, fp8.h), and only that
// knows the format's bytes. Everything else is generic: multiplying, decoding, gathering.
//
// A lane takes a unit: 16 or 32 weights of a block whose codes lie together in memory. Codes are masked out of 16-bit
// words but not shifted down, so code i comes as code * 2^s, and part(i) is 2^-s. A product multiplies x by part(i)
// once and uses it for many rows.
//
// The members of a format's struct, called F:
//
//   block, bytes           weights and bytes of a block
//   unit, groups           weights in a unit; groups of unit / groups weights with a scale of their own in it
//   span                   weights in a row that whole units make up: offset(i) < span
//   at(u)                  place in the block of the first weight of unit u
//   offset(i)              place of weight i of a unit behind its first one; runs of at least 8 lie together
//   part(i)                a power of two, see above
//   codes(b, u, q)         the codes of unit u of the block at b, times 1 / part
//   scale(b, u, g)         of group g of unit u: w = (code - zero) * scale + offset, each operation rounded
//
// Blocks are aligned to two bytes, or to four if their size is a multiple of four.
#pragma once

#include <metal_stdlib>
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
using namespace metal;

struct Scale {
  float scale, zero, offset;
};

inline ushort load_u16(const device uchar* p) { return *(const device ushort*)p; }
inline float load_f16(const device uchar* p) { return float(*(const device half*)p); }
inline float load_bf16(const device uchar* p) { return as_type<float>(uint(load_u16(p)) << 16); }
inline float load_f32(const device uchar* p) { return as_type<float>(uint(load_u16(p)) | uint(load_u16(p + 2)) << 16); }

// Sixteen signed bytes.
inline void signed_bytes(const device uchar* p, thread float (&q)[16]) {
  for (int j = 0; j < 8; ++j) {
    const char2 pair = as_type<char2>(load_u16(p + 2 * j));
    q[2 * j] = float(pair.x);
    q[2 * j + 1] = float(pair.y);
  }
}

// By the unit's number in a row of blocks: the place of its first weight, and the bytes of its block.
template <class F>
inline int place_of(int unit) {
  constexpr int per_block = F::block / F::unit;
  return unit / per_block * F::block + F::at(unit % per_block);
}
template <class F>
inline const device uchar* block_of(const device uchar* row, int unit) {
  return row + ulong(unit / (F::block / F::unit)) * F::bytes;
}
template <class F>
inline ulong row_bytes(int k) {
  return ulong(k / F::block) * F::bytes;
}

// The exact weights of a unit.
template <class F>
inline void decode(const device uchar* row, int unit, thread float (&w)[F::unit]) {
  constexpr int per_block = F::block / F::unit;
  const device uchar* block = block_of<F>(row, unit);
  F::codes(block, unit % per_block, w);
  for (int g = 0; g < F::groups; ++g) {
    const Scale s = F::scale(block, unit % per_block, g);
    for (int i = g * F::unit / F::groups; i < (g + 1) * F::unit / F::groups; ++i) {
      const float product = (w[i] * F::part(i) - s.zero) * s.scale;
      w[i] = product + s.offset;
    }
  }
}
