// `linear` for some rows of x on AMX: int8 codes, sixteen weight rows to a tile, times x in int8 per 32.
//
// A tile instruction takes as long for 16 weights of a row as for 64, and for one token as for sixteen. All that it
// adds to one sum must have one scale. So the product of two tiles is one of these:
//
//   16 tokens   one group of 16 or 32 weights; column t of the sums is token t
//    8 tokens   two groups at once; column 2t + g is token t, group g, and x has zeros where the other group lies
//
// Weights are the left operand, whose rows stay rows, so a weight costs no more than its decoding (see rows.h). The
// integer sums go through memory to become f32, because a tile can only be stored. This conversion, not the product, is
// the cost of a row of x. It is why for more than some dozens of rows decoding to bf16 (amx_panels.h) is faster.
#pragma once

#include "cpu/linear/tile_codes.h"
#include "cpu/linear/tile_scope.h"
#include "cpu/linear/transpose.h"

namespace isqtorch::ISQ_ISA {

// A unit of activations of 16 / kTogether tokens, in the layout of the right operand.
template <class Unit, int kTogether>
struct alignas(64) TileActivations {
  static constexpr int kTokens = 16 / kTogether, kProducts = 16 / kTogether;
  static constexpr int kGroup = Unit::kWeights / 16, kBytes = kTogether * kGroup;  // of a weight row in a product
  struct {
    int8_t q[kBytes / 4][16][4];  // [k / 4][column][k % 4]
    float step[16], offset[16];   // by column; kAffine: step * sum(q)
  } product[kProducts];
};

// A unit of sixteen rows, in the layout of the left operand.
template <class Unit>
struct alignas(64) TileWeights {
  uint8_t codes[16][Unit::kWeights];    // signed unless kAffine
  float scale[16][16], offset[16][16];  // [row][position]
};

// ---- packing x ----------------------------------------------------------------------------------------------------

template <class Unit, int kTogether>
void pack_tile_activations(const float* x, int tokens, int64_t k, void* packed) {
  using Facts = UnitFacts<Unit>;
  using Packed = TileActivations<Unit, kTogether>;
  constexpr int kWeights = Unit::kWeights, kGroup = Packed::kGroup;
  Packed* out = static_cast<Packed*>(packed);
  std::memset(packed, 0, (k + kWeights - 1) / kWeights * sizeof(Packed));
  for (int64_t begin = 0; begin < k; begin += kWeights, ++out) {
    for (int t = 0; t < tokens; ++t) {
      int8_t q[kWeights] = {};
      float step[kWeights / 32] = {};
      for (int b = 0; b < kWeights / 32 && begin + 32 * b < k; ++b) {
        step[b] = quantize_activations<127>(x + t * k + begin + 32 * b, q + 32 * b);
      }
      for (int position = 0; position < 16; ++position) {
        auto& product = out->product[position / kTogether];
        const int part = position % kTogether, column = kTogether * t + part;
        const int lane = TileCodes<Unit>::lane_at(position);
        const int first = lane % 4 * Facts::kDots * 64 + lane / 4 * 16;  // in the unit's vectors
        int8_t ordered[kGroup];
        for (int d = 0; d < Facts::kDots; ++d) {
          if constexpr (Facts::kPlainQuarters) {
            std::memcpy(ordered + 16 * d, q + Facts::kOrder.at[first + 64 * d], 16);
          } else {
            for (int j = 0; j < 16; ++j) ordered[16 * d + j] = q[Facts::kOrder.at[first + 64 * d + j]];
          }
        }
        int sum = 0;
        for (int j = 0; j < kGroup; ++j) sum += ordered[j];
        for (int word = 0; word < kGroup / 4; ++word) {
          std::memcpy(product.q[part * kGroup / 4 + word][column], ordered + 4 * word, 4);
        }
        product.step[column] = step[Facts::group_of_lane(lane)];
        product.offset[column] = product.step[column] * (float)sum;
      }
    }
  }
}

template <class Unit>
int64_t tile_packed_bytes(int64_t k) {
  static_assert(sizeof(TileActivations<Unit, 1>) >= sizeof(TileActivations<Unit, 2>));
  return (k + Unit::kWeights - 1) / Unit::kWeights * (int64_t)sizeof(TileActivations<Unit, 1>);
}

// ---- decoding -----------------------------------------------------------------------------------------------------

template <class Unit>
ISQ_INLINE void decode_tile_row(const uint8_t* unit, const UnitLayout& layout, TileWeights<Unit>* out, int row) {
  Bytes codes[UnitFacts<Unit>::kVectors];
  Floats scale, offset;
  Unit::load(unit, layout, codes, &scale, &offset);
  __m512i* to = reinterpret_cast<__m512i*>(out->codes[row]);
  TileCodes<Unit>::store(unit, codes, to);
  static constexpr auto kLanes = [] {
    struct {
      int32_t at[16];
    } lanes{};
    for (int position = 0; position < 16; ++position) lanes.at[position] = TileCodes<Unit>::lane_at(position);
    return lanes;
  }();
  const __m512i lanes = _mm512_loadu_si512(kLanes.at);
  _mm512_store_ps(out->scale[row], _mm512_maskz_permutexvar_ps(0xffff, lanes, (__m512)scale.part[0]));
  if constexpr (Unit::kAffine) {
    _mm512_store_ps(out->offset[row], _mm512_maskz_permutexvar_ps(0xffff, lanes, (__m512)offset.part[0]));
  }
}

// ---- the product --------------------------------------------------------------------------------------------------

// Tiles 0-3 are sums; 4 and 5 are weights, 6 and 7 activations, used alternately.
template <class Packed>
struct TileShapes {
  static constexpr TileShape kSums = {16, 64}, kLeft = {16, Packed::kBytes}, kRight = {Packed::kBytes / 4, 64};
  static constexpr TileShape kAll[8] = {kSums, kSums, kSums, kSums, kLeft, kLeft, kRight, kRight};
};

// The intrinsics need literal tile numbers.
#define ISQ_MULTIPLY_TILE(sum, left, right, kSigned) \
  do {                                               \
    _tile_zero(sum);                                 \
    _tile_loadd(left, w, w_stride);                  \
    _tile_loadd(right, x, 64);                       \
    if constexpr (kSigned) {                         \
      _tile_dpbssd(sum, left, right);                \
    } else {                                         \
      _tile_dpbusd(sum, left, right);                \
    }                                                \
  } while (0)

template <int kTile, bool kSigned>
ISQ_INLINE void multiply_tile(const uint8_t* w, int64_t w_stride, const void* x) {
  if constexpr (kTile == 0) ISQ_MULTIPLY_TILE(0, 4, 6, kSigned);
  if constexpr (kTile == 1) ISQ_MULTIPLY_TILE(1, 5, 7, kSigned);
  if constexpr (kTile == 2) ISQ_MULTIPLY_TILE(2, 4, 6, kSigned);
  if constexpr (kTile == 3) ISQ_MULTIPLY_TILE(3, 5, 7, kSigned);
}
#undef ISQ_MULTIPLY_TILE

template <int kTile>
ISQ_INLINE void store_tile(int32_t* to) {
  if constexpr (kTile == 0) _tile_stored(0, to, 64);
  if constexpr (kTile == 1) _tile_stored(1, to, 64);
  if constexpr (kTile == 2) _tile_stored(2, to, 64);
  if constexpr (kTile == 3) _tile_stored(3, to, 64);
}

// The factor of a row and a group for all columns, or those of two groups alternating.
template <int kTogether>
ISQ_INLINE __m512 of_columns(const float* factors) {
  if constexpr (kTogether == 1) return _mm512_set1_ps(*factors);
  double pair;  // bits, not a number
  std::memcpy(&pair, factors, 8);
  return _mm512_castpd_ps(_mm512_set1_pd(pair));
}

// Sums of sixteen rows stay in registers only if every index is a constant.
using SixteenRows = std::make_index_sequence<16>;
template <size_t... row>
ISQ_INLINE void load_rows(const float* from, __m512* acc, std::index_sequence<row...>) {
  ((acc[row] = _mm512_load_ps(from + 16 * row)), ...);
}
template <size_t... row>
ISQ_INLINE void store_rows(const __m512* acc, float* to, std::index_sequence<row...>) {
  (_mm512_store_ps(to + 16 * row, acc[row]), ...);
}
template <int kTogether, size_t... row>
ISQ_INLINE void add_dots(const int32_t (&dots)[16][16], const float* step, const float* scale, __m512* acc,
                         std::index_sequence<row...>) {
  const __m512 steps = _mm512_load_ps(step);
  ((acc[row] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(dots[row])), steps),
                               of_columns<kTogether>(scale + 16 * row), acc[row])),
   ...);
}
template <int kTogether, size_t... row>
ISQ_INLINE void add_offsets(const float* x, const float* offset, __m512* acc, std::index_sequence<row...>) {
  const __m512 of_x = _mm512_load_ps(x);
  ((acc[row] = _mm512_fmadd_ps(of_x, of_columns<kTogether>(offset + 16 * row), acc[row])), ...);
}

// The products of a unit, four at a time. Results have a long latency, so a tile is stored two products after its own.
template <class Unit, int kTogether>
class UnitProduct {
 public:
  using Packed = TileActivations<Unit, kTogether>;

  // sums[row][column] += a unit of sixteen rows times the activations.
  static void add(const TileWeights<Unit>& w, const Packed& x, float* sums) {
    alignas(64) int32_t dots[4][16][16];
    __m512 acc[16];
    load_rows(sums, acc, SixteenRows{});
    multiply<0>(w, x, 0);
    multiply<1>(w, x, 1);
    store_tile<0>(dots[0][0]);
    multiply<2>(w, x, 2);
    store_tile<1>(dots[1][0]);
    for (int p = 0; p < Packed::kProducts; p += 4) {
      multiply<3>(w, x, p + 3);
      store_tile<2>(dots[2][0]);
      add_product(w, x, p, dots[0], acc);
      multiply<0>(w, x, p + 4);
      store_tile<3>(dots[3][0]);
      add_product(w, x, p + 1, dots[1], acc);
      multiply<1>(w, x, p + 5);
      store_tile<0>(dots[0][0]);
      add_product(w, x, p + 2, dots[2], acc);
      multiply<2>(w, x, p + 6);
      store_tile<1>(dots[1][0]);
      add_product(w, x, p + 3, dots[3], acc);
    }
    store_rows(acc, sums, SixteenRows{});
  }

 private:
  template <int kTile>
  ISQ_INLINE static void multiply(const TileWeights<Unit>& w, const Packed& x, int p) {
    if (p >= Packed::kProducts) return;
    multiply_tile<kTile, !Unit::kAffine>(w.codes[0] + p * Packed::kBytes, sizeof w.codes[0], x.product[p].q);
  }
  ISQ_INLINE static void add_product(const TileWeights<Unit>& w, const Packed& x, int p, const int32_t (&dots)[16][16],
                                     __m512* acc) {
    const int first = p * kTogether;
    add_dots<kTogether>(dots, x.product[p].step, w.scale[0] + first, acc, SixteenRows{});
    if constexpr (Unit::kAffine) {
      add_offsets<kTogether>(x.product[p].offset, w.offset[0] + first, acc, SixteenRows{});
    }
  }
};

// Writes y of sixteen rows from their sums.
template <int kTogether>
ISQ_INLINE void store_tile_sums(const float* sums, int64_t tokens, float* y, int64_t ldy) {
  __m512i columns[16];
  for (int r = 0; r < 16; ++r) columns[r] = _mm512_load_si512(sums + 16 * r);
  transpose_16(columns);
  for (int64_t t = 0; t < tokens; ++t) {
    __m512 total = (__m512)columns[kTogether * t];
    for (int part = 1; part < kTogether; ++part) total = _mm512_add_ps(total, (__m512)columns[kTogether * t + part]);
    _mm512_storeu_ps(y + t * ldy, total);
  }
}

template <class Unit>
void decode_tile_unit(const TilesJob& job, int64_t row, int64_t unit, TileWeights<Unit>* out) {
  const int64_t unit_bytes = job.layout.unit_bytes, left = job.row_bytes - unit * unit_bytes;
  for (int r = 0; r < 16 && row + r < job.rows; ++r) {
    const uint8_t* from = job.w + (row + r) * job.row_bytes + unit * unit_bytes;
    for (int64_t b = 0; b < unit_bytes; b += 64) ISQ_PREFETCH(from + unit_bytes + b);
    const bool at_end = Unit::kReadsBeyond > 0 && job.w_ends && row + r == job.rows - 1;
    if (left > unit_bytes || (left == unit_bytes && !at_end)) {
      decode_tile_row<Unit>(from, job.layout, out, r);
    } else {
      alignas(64) uint8_t copy[kMaxUnitBytes + 64] = {};
      std::memcpy(copy, from, left);
      decode_tile_row<Unit>(copy, job.layout, out, r);
    }
  }
}

template <class Unit, int kTogether>
void multiply_int8_tiles(const TilesJob& job) {
  using Packed = TileActivations<Unit, kTogether>;
  const TileScope tiles_configured(TileShapes<Packed>::kAll);
  const int64_t units = (job.k + Unit::kWeights - 1) / Unit::kWeights, x_bytes = tile_packed_bytes<Unit>(job.k);
  const int64_t tiles = (job.tokens + Packed::kTokens - 1) / Packed::kTokens;
  const uint8_t* x = static_cast<const uint8_t*>(job.x);
  TileWeights<Unit> w = {};  // rows past the end keep zeros or old weights; their sums are discarded
  alignas(64) float sums[kMaxTileTokens / kTileTokens][16 * 16];
  for (int64_t row = 0; row < job.rows; row += 16) {
    std::memset(sums, 0, tiles * sizeof sums[0]);
    for (int64_t u = 0; u < units; ++u) {
      decode_tile_unit<Unit>(job, row, u, &w);
      ISQ_WRITE_ALL();  // GCC does not know that tile loads read what was stored
      for (int64_t t = 0; t < tiles; ++t) {
        UnitProduct<Unit, kTogether>::add(w, reinterpret_cast<const Packed*>(x + t * x_bytes)[u], sums[t]);
      }
    }
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = t * Packed::kTokens, left = job.tokens - first;
      store_tile_sums<kTogether>(sums[t], left < Packed::kTokens ? left : Packed::kTokens,
                                 job.y + first * job.ldy + row, job.ldy);
    }
  }
}

struct Int8Tiles {
  template <class Unit>
  static TileKernels get(const UnitLayout& layout) {
    // Activations of 15 bits would take twice as many tiles. Row kernels and bf16 panels are as exact.
    if constexpr (kActivationBytes<Unit> == 2) {
      return {};
    } else {
      // Sums cost more with offsets and with groups of 16 weights.
      return {"int8 tiles (AMX)",
              5,
              Unit::kWeights == 256 || Unit::kAffine ? 16 : 32,
              layout,
              tile_packed_bytes<Unit>,
              {pack_tile_activations<Unit, 2>, pack_tile_activations<Unit, 1>},
              {multiply_int8_tiles<Unit, 2>, multiply_int8_tiles<Unit, 1>}};
    }
  }
  static TileKernels fp8() { return {}; }
};

}  // namespace isqtorch::ISQ_ISA
