// `linear` for many rows of x on AMX: weights decoded to bf16, sixteen rows by 32 weights to a tile, times x in bf16.
//
// Weights are the left operand of the tile product, whose rows stay rows. x is the right operand; it is packed once per
// call, in pairs along k. Tiles follow one another in memory. Along k both sides are in the order of the format's code
// vectors (weight_at in rows.h) with the bytes of each word apart, so that a decoder never has to reorder weights. Sums
// are f32 tiles of 16 weight rows by 16 rows of x, transposed at the end.
#pragma once

#include "cpu/linear/fp8_rows.h"
#include "cpu/linear/tile_scope.h"
#include "cpu/linear/transpose.h"

namespace isqtorch::ISQ_ISA {

constexpr int kTileRows = 16, kTileWeights = 32;
constexpr int64_t kTileBytes = 1024, kTileFloats = 256;

ISQ_INLINE int64_t tiles_along_k(int64_t k) { return (k + kPanelStep - 1) / kPanelStep * (kPanelStep / kTileWeights); }

inline int64_t amx_panel_bytes(int64_t rows, int64_t weights) {
  return rows / kTileRows * tiles_along_k(weights) * kTileBytes;
}
inline int64_t amx_packed_bytes(int64_t k) { return tiles_along_k(k) * kTileBytes; }

// ---- packing x ----------------------------------------------------------------------------------------------------

// The activations that meet tile row `half` (see store_bf16), from two vectors with the activations of 64 codes.
ISQ_INLINE __m512i words_of_tile(const uint16_t* ordered, int half) {
  static constexpr auto kWords = [] {
    struct {
      uint16_t at[2][32];
    } words{};
    for (int h = 0; h < 2; ++h) {
      for (int p = 0; p < 32; ++p) words.at[h][p] = (uint16_t)(4 * (p % 16) + 2 * h + p / 16);
    }
    return words;
  }();
  return _mm512_permutex2var_epi16(_mm512_load_si512(ordered), _mm512_loadu_si512(kWords.at[half]),
                                   _mm512_load_si512(ordered + 32));
}

// Facts: UnitFacts, or a struct with its kWeights, kOrder and kPlainQuarters. kWordwise: reorder as store_bf16 does.
template <class Facts, bool kWordwise>
void pack_amx_tokens(const float* x, int tokens, int64_t k, void* packed) {
  constexpr int kWeights = Facts::kWeights;
  uint8_t* out = static_cast<uint8_t*>(packed);
  alignas(64) uint16_t ordered[kTileRows][kWeights] = {};
  const int64_t padded = tiles_along_k(k) * kTileWeights;
  for (int64_t begin = 0; begin < padded; begin += kWeights) {
    const int64_t left = k - begin, there = left < 0 ? 0 : left < kWeights ? left : kWeights;
    for (int t = 0; t < tokens; ++t) {
      uint16_t natural[kWeights] = {};
      for (int i = 0; i < there; ++i) natural[i] = f32_to_bf16(x[t * k + begin + i]);
      if constexpr (Facts::kPlainQuarters) {
        for (int p = 0; p < kWeights; p += 16) std::memcpy(ordered[t] + p, natural + Facts::kOrder.at[p], 32);
      } else {
        for (int p = 0; p < kWeights; ++p) ordered[t][p] = natural[Facts::kOrder.at[p]];
      }
    }
    for (int p = 0; p < kWeights; p += kTileWeights, out += kTileBytes) {
      __m512i rows[16];
      for (int t = 0; t < 16; ++t) {
        if constexpr (kWordwise) {
          rows[t] = words_of_tile(ordered[t] + p / 64 * 64, p / 32 % 2);
        } else {
          rows[t] = _mm512_load_si512(ordered[t] + p);
        }
      }
      transpose_16(rows);
      for (int t = 0; t < 16; ++t) _mm512_store_si512(out + 64 * t, rows[t]);
    }
  }
}

// ---- decoding -----------------------------------------------------------------------------------------------------

// Stores the 64 weights of a code vector as bf16: bytes 0 and 1 of its words become a row of one tile, bytes 2 and 3 a
// row of the next tile.
ISQ_INLINE void store_bf16(__m512i codes, __m512 scale, __m512 offset, uint8_t* out) {
  const __m512i byte = _mm512_set1_epi32(255);
  const auto weights = [&](__m512i code) { return _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), scale, offset); };
  const __m512 w0 = weights(_mm512_and_si512(codes, byte));
  const __m512 w1 = weights(_mm512_and_si512(_mm512_srli_epi32(codes, 8), byte));
  const __m512 w2 = weights(_mm512_and_si512(_mm512_srli_epi32(codes, 16), byte));
  const __m512 w3 = weights(_mm512_srli_epi32(codes, 24));
  _mm512_store_si512(out, (__m512i)_mm512_cvtne2ps_pbh(w1, w0));
  _mm512_store_si512(out + kTileBytes, (__m512i)_mm512_cvtne2ps_pbh(w3, w2));
}

// Decodes one unit of one row into the tiles of its sixteen rows.
template <class Unit>
ISQ_INLINE void decode_unit(const uint8_t* unit, const UnitLayout& layout, uint8_t* tiles) {
  using Facts = UnitFacts<Unit>;
  Bytes codes[Facts::kVectors];
  Floats scale, offset;
  Unit::load(unit, layout, codes, &scale, &offset);
  if constexpr (!Unit::kAffine) offset = scale * (float)-Unit::kCenter;
  // Lane 4q + i of the scales belongs to quarter q of the vectors in run i.
  const auto run = [&](auto i) {
    constexpr int kFirst = i * Facts::kDots, kLane = i * 0x55;
    const __m512 scales = _mm512_permute_ps((__m512)scale.part[0], kLane);
    const __m512 offsets = _mm512_permute_ps((__m512)offset.part[0], kLane);
    for (int v = kFirst; v < kFirst + Facts::kDots; ++v) {
      store_bf16((__m512i)codes[v].part[0], scales, offsets, tiles + 2 * v * kTileBytes);
    }
  };
  run(std::integral_constant<int, 0>{});
  run(std::integral_constant<int, 1>{});
  run(std::integral_constant<int, 2>{});
  run(std::integral_constant<int, 3>{});
}

constexpr int kRowsAhead = 8;

template <class Unit>
void decode_amx_panel(const DecodeJob& job) {
  constexpr int kWeights = Unit::kWeights;
  const int64_t unit_bytes = job.layout.unit_bytes, tiles = tiles_along_k(job.k_end - job.k_begin);
  const int64_t first = job.k_begin / kWeights, last = first + tiles * kTileWeights / kWeights;
  for (int64_t row = 0; row < job.rows; ++row) {
    const uint8_t* w = job.w + row * job.row_bytes;
    uint8_t* out = static_cast<uint8_t*>(job.panel) + row / kTileRows * tiles * kTileBytes + row % kTileRows * 64;
    const bool at_end = Unit::kReadsBeyond > 0 && job.w_ends && row == job.rows - 1;
    // The pieces of the rows are too short for the hardware prefetcher.
    const uint8_t* ahead = w + kRowsAhead * job.row_bytes;
    for (int64_t b = first * unit_bytes; b < last * unit_bytes; b += 64) ISQ_PREFETCH(ahead + b);
    for (int64_t u = first; u < last; ++u, out += kWeights / kTileWeights * kTileBytes) {
      const int64_t left = job.row_bytes - u * unit_bytes;
      if (left > unit_bytes || (left == unit_bytes && !at_end)) {
        decode_unit<Unit>(w + u * unit_bytes, job.layout, out);
      } else {
        alignas(64) uint8_t copy[kMaxUnitBytes + 64] = {};
        if (left > 0) std::memcpy(copy, w + u * unit_bytes, left);
        decode_unit<Unit>(copy, job.layout, out);
      }
    }
  }
}

// 64 codes become 32 words of two bf16 (see Fp8Step). To be scaled, the lower and the upper halves of sixteen words
// become f32, which then are sixteen neighbours in a tile's row.
struct Fp8Facts {
  static constexpr int kWeights = 128;
  static constexpr bool kPlainQuarters = false;
  static constexpr auto kOrder = [] {
    struct {
      uint16_t at[128];
    } order{};
    for (int p = 0; p < 128; ++p) {
      const int half = p % 64 / 32, in_half = p % 16 * 2 + p % 32 / 16;
      order.at[p] = (uint16_t)(p / 64 * 64 + in_half / 8 * 16 + half * 8 + in_half % 8);
    }
    return order;
  }();
};

inline void decode_amx_fp8_panel(const DecodeJob& job) {
  const int64_t tiles = tiles_along_k(job.k_end - job.k_begin);
  for (int64_t row = 0; row < job.rows; ++row) {
    uint8_t* out = static_cast<uint8_t*>(job.panel) + row / kTileRows * tiles * kTileBytes + row % kTileRows * 64;
    const uint8_t* block = job.w + row * job.row_bytes + job.k_begin / kFp8Block * (int64_t)sizeof(BlockFp8);
    for (int64_t k = job.k_begin; k < job.k_end; k += kFp8Block, block += sizeof(BlockFp8)) {
      ISQ_PREFETCH(block + kRowsAhead * job.row_bytes);
      ISQ_PREFETCH(block + kRowsAhead * job.row_bytes + 64);
      const __m512 scale = _mm512_set1_ps(load_f32(block));
      for (int step = 0; step < kFp8Block; step += Fp8Step::kWeights) {
        Floats w[4];
        Fp8Step::load(block + offsetof(BlockFp8, codes) + step, w);
        for (int half = 0; half < 2; ++half, out += kTileBytes) {
          const __m512 low = _mm512_mul_ps((__m512)w[2 * half].part[0], scale);
          const __m512 high = _mm512_mul_ps((__m512)w[2 * half + 1].part[0], scale);
          _mm512_store_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
      }
    }
    const int64_t rest = tiles - (job.k_end - job.k_begin) / kTileWeights;
    for (int64_t tile = 0; tile < rest; ++tile) _mm512_store_si512(out + tile * kTileBytes, _mm512_setzero_si512());
  }
}

// ---- the product --------------------------------------------------------------------------------------------------

// Two tiles of weight rows times two tiles of tokens: tiles 0-3 are sums, 4-5 weights, 6-7 tokens.
ISQ_INLINE void multiply_tiles(const uint8_t* w0, const uint8_t* w1, const uint8_t* x0, const uint8_t* x1,
                               int64_t tiles, float* s00, float* s01, float* s10, float* s11, bool first) {
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, s00, 64);
    _tile_loadd(1, s01, 64);
    _tile_loadd(2, s10, 64);
    _tile_loadd(3, s11, 64);
  }
  for (int64_t i = 0; i < tiles; ++i) {
    _tile_loadd(6, x0 + i * kTileBytes, 64);
    _tile_loadd(4, w0 + i * kTileBytes, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, x1 + i * kTileBytes, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, w1 + i * kTileBytes, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, s00, 64);
  _tile_stored(1, s01, 64);
  _tile_stored(2, s10, 64);
  _tile_stored(3, s11, 64);
}

// The same for one tile of tokens.
ISQ_INLINE void multiply_tiles(const uint8_t* w0, const uint8_t* w1, const uint8_t* x0, int64_t tiles, float* s0,
                               float* s1, bool first) {
  if (first) {
    _tile_zero(0);
    _tile_zero(2);
  } else {
    _tile_loadd(0, s0, 64);
    _tile_loadd(2, s1, 64);
  }
  for (int64_t i = 0; i < tiles; ++i) {
    _tile_loadd(6, x0 + i * kTileBytes, 64);
    _tile_loadd(4, w0 + i * kTileBytes, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, w1 + i * kTileBytes, 64);
    _tile_dpbf16ps(2, 5, 6);
  }
  _tile_stored(0, s0, 64);
  _tile_stored(2, s1, 64);
}

// sums: one tile per 16 rows and 16 tokens; tokens vary fastest.
inline void multiply_amx_panel(const ProductJob& job) {
  constexpr TileShape kFull = {16, 64};
  constexpr TileShape kShapes[8] = {kFull, kFull, kFull, kFull, kFull, kFull, kFull, kFull};
  const TileScope tiles_configured(kShapes);
  const int64_t tiles = tiles_along_k(job.k_end - job.k_begin), row_tiles = job.rows / kTileRows;
  const int64_t token_tiles = (job.tokens + kTileRows - 1) / kTileRows, x_bytes = amx_packed_bytes(job.k);
  const uint8_t* x = static_cast<const uint8_t*>(job.x) + job.k_begin / kTileWeights * kTileBytes;
  const auto sum = [&](int64_t r, int64_t t) { return job.sums + (r * token_tiles + t) * kTileFloats; };
  for (int64_t t = 0; t < token_tiles; t += 2) {
    for (int64_t r = 0; r < row_tiles; r += 2) {
      const uint8_t* w0 = static_cast<const uint8_t*>(job.panel) + r * tiles * kTileBytes;
      const uint8_t *w1 = w0 + tiles * kTileBytes, *x0 = x + t * x_bytes, *x1 = x0 + x_bytes;
      if (t + 1 < token_tiles) {
        multiply_tiles(w0, w1, x0, x1, tiles, sum(r, t), sum(r, t + 1), sum(r + 1, t), sum(r + 1, t + 1), job.first);
      } else {
        multiply_tiles(w0, w1, x0, tiles, sum(r, t), sum(r + 1, t), job.first);
      }
    }
  }
}

inline void unpack_amx_sums(const float* sums, int64_t rows, int64_t tokens, float* y, int64_t ldy) {
  const int64_t token_tiles = (tokens + kTileRows - 1) / kTileRows;
  for (int64_t tile = 0; tile < token_tiles; ++tile) {
    const int64_t first = tile * kTileRows, left = tokens - first, count = left < kTileRows ? left : kTileRows;
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const float* from = sums + (r / kTileRows * token_tiles + tile) * kTileFloats;
      __m512i words[16];
      for (int i = 0; i < 16; ++i) words[i] = _mm512_load_si512(from + 16 * i);
      transpose_16(words);
      for (int64_t t = 0; t < count; ++t) _mm512_storeu_si512(y + (first + t) * ldy + r, words[t]);
    }
  }
}

struct AmxPanels {
  template <class Unit>
  static PanelKernels get(const UnitLayout& layout) {
    return of<UnitFacts<Unit>, true>(decode_amx_panel<Unit>, layout);
  }
  static PanelKernels fp8() { return of<Fp8Facts, false>(decode_amx_fp8_panel, {}); }

 private:
  template <class Facts, bool kWordwise>
  static PanelKernels of(void (*decode)(const DecodeJob&), const UnitLayout& layout) {
    return {"bf16 tiles (AMX)",
            2 * kTileRows,
            kTileRows,
            256,
            amx_panel_bytes,
            amx_packed_bytes,
            pack_amx_tokens<Facts, kWordwise>,
            layout,
            decode,
            multiply_amx_panel,
            unpack_amx_sums};
  }
};

}  // namespace isqtorch::ISQ_ISA
