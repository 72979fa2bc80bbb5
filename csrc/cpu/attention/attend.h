// Attention of a few queries over packed keys and values: softmax(q k^T + mask) v, without its last division.
//
// The tokens are visited once, a tile at a time. Blocks of keys are decoded in registers and multiplied by all queries;
// then the tile's scores become weights, relative to the largest score so far; then blocks of values are decoded in
// registers and added up with these weights. Everything but the packed bytes is f32. What the sums were relative to is
// returned with them, so that the sums of several ranges of tokens can be joined.
#pragma once

#include "cpu/linear/simd.h"

namespace isqtorch::ISQ_ISA {

// Queries that share a decoded block: their sums, two registers each, stay in registers with the block.
constexpr int kMostQueries = ISQ_VECTOR_FLOATS == 16 ? 8 : 4;

// ---- blocks of 32 numbers ------------------------------------------------------------------------------------------

ISQ_INLINE Floats half_in_all_lanes(const uint8_t* p) {
#if ISQ_VECTOR_FLOATS == 16
  return {{(NativeF32)_mm512_maskz_cvtph_ps(0xffff, _mm256_set1_epi16((short)load_u16(p)))}};
#elif ISQ_VECTOR_FLOATS == 8
  const NativeF32 d = (NativeF32)_mm256_cvtph_ps(_mm_set1_epi16((short)load_u16(p)));
  return {{d, d}};
#elif defined(__aarch64__)
  const NativeF32 d = (NativeF32)vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(load_u16(p))));
  return {{d, d, d, d}};
#else
  return all_lanes(f16_to_f32(load_u16(p)));
#endif
}

struct ReadQ8_0 {
  static constexpr int64_t kBytes = sizeof(BlockQ8_0);
  static ISQ_INLINE void load(const uint8_t* block, Floats* w) {
    const Floats d = half_in_all_lanes(block);
    w[0] = signed_bytes_to_floats(load_16(block + 2)) * d;
    w[1] = signed_bytes_to_floats(load_16(block + 18)) * d;
  }
};

struct ReadQ4_0 {
  static constexpr int64_t kBytes = sizeof(BlockQ4_0);
  static ISQ_INLINE void load(const uint8_t* block, Floats* w) {
    typedef uint16_t Words ISQ_VECTOR(16);
    const Floats d = half_in_all_lanes(block);
    const Quarter codes = load_16(block + 2);
    w[0] = signed_bytes_to_floats((codes & 15) - 8) * d;
    w[1] = signed_bytes_to_floats(((Quarter)((Words)codes >> 4) & 15) - 8) * d;
  }
};

// A tile that the decoder of another format has written.
struct ReadDecoded {
  static constexpr int64_t kBytes = 32 * sizeof(float);
  static ISQ_INLINE void load(const uint8_t* block, Floats* w) {
    w[0] = load_wide<Floats>(block);
    w[1] = load_wide<Floats>(block + 64);
  }
};

// ---- scores --------------------------------------------------------------------------------------------------------

// The sums of the lanes of four vectors.
ISQ_INLINE FourFloats four_sums(Floats a, Floats b, Floats c, Floats d) {
#if ISQ_VECTOR_FLOATS == 16
  const __m512 x = (__m512)a.part[0], y = (__m512)b.part[0], z = (__m512)c.part[0], w = (__m512)d.part[0];
  const __m512 xy = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
  const __m512 zw = _mm512_add_ps(_mm512_unpacklo_ps(z, w), _mm512_unpackhi_ps(z, w));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(xy, zw, 0x44), _mm512_shuffle_ps(xy, zw, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return (FourFloats)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif ISQ_VECTOR_FLOATS == 8
  const auto whole = [](Floats f) { return (__m256)(f.part[0] + f.part[1]); };
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(whole(a), whole(b)), _mm256_hadd_ps(whole(c), whole(d)));
  return (FourFloats)_mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
#elif defined(__aarch64__)
  const auto whole = [](Floats f) { return (float32x4_t)((f.part[0] + f.part[1]) + (f.part[2] + f.part[3])); };
  return (FourFloats)vpaddq_f32(vpaddq_f32(whole(a), whole(b)), vpaddq_f32(whole(c), whole(d)));
#else
  return FourFloats{sum(a), sum(b), sum(c), sum(d)};
#endif
}

// scores[r * kAttendTile + t] = q_r k_t. Up to three more scores of each query are written, of no meaning.
template <class Read, int kQueries>
void score_tile(const uint8_t* keys, int64_t key_bytes, int64_t tokens, int64_t blocks, const float* q, float* scores) {
  constexpr int kTokens = kQueries >= 4 ? 1 : 4 / kQueries;  // that four sums come of them, which are then added up
  constexpr int kSums = kTokens * kQueries;
  for (int64_t t = 0; t < tokens; t += kTokens) {
    const uint8_t* key[kTokens];
    for (int j = 0; j < kTokens; ++j) key[j] = keys + (t + j < tokens ? t + j : tokens - 1) * key_bytes;
    Floats acc[kSums];
    for (int i = 0; i < kSums; ++i) acc[i] = all_lanes(0.0f);
    for (int64_t b = 0; b < blocks; ++b) {
      for (int j = 0; j < kTokens; ++j) {
        Floats w[2];
        Read::load(key[j] + b * Read::kBytes, w);
        for (int r = 0; r < kQueries; ++r) {
          const float* own = q + (r * blocks + b) * 32;
          Floats& to = acc[r * kTokens + j];
          to = multiply_add(w[1], load_floats_16(own + 16), multiply_add(w[0], load_floats_16(own), to));
        }
      }
    }
    for (int i = 0; i < kSums; i += 4) {
      const FourFloats sums = four_sums(acc[i], acc[i + 1], acc[i + 2], acc[i + 3]);
      for (int l = 0; l < 4; ++l) scores[(i + l) / kTokens * kAttendTile + t + (i + l) % kTokens] = sums[l];
    }
  }
}

// ---- weights -------------------------------------------------------------------------------------------------------

// e^x for x <= 0 to seven digits, 0 below -87. NaN stays NaN.
ISQ_INLINE NativeF32 exp_of(NativeF32 x) {
  const NativeF32 v = clamp(x, -104.0f, 0.0f);
  const NativeF32 n = nearest_small(v * 1.44269504f);
  const NativeF32 r = (v - n * 0.693359375f) + n * 2.12194440e-4f;  // v - n ln 2; the first product is exact
  NativeF32 e = r * (1.0f / 720) + 1.0f / 120;                      // the series up to r^6: |r| <= ln 2 / 2
  e = e * r + 1.0f / 24;
  e = e * r + 1.0f / 6;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  return select(x < -87.0f, 0.0f, as_float(as_int(e) + (truncate(n) << 23)));
}
ISQ_INLINE float exp_of(float x) { return exp_of(x - NativeF32{})[0]; }

// Turns the scores of one query into weights relative to the largest score so far, 0 for the rest of the tile. Returns
// by what sums over earlier tokens are to be multiplied.
ISQ_INLINE float weigh_tile(float* scores, int64_t tokens, const float* mask, float* most, float* total) {
  constexpr int kStep = ISQ_VECTOR_FLOATS;
  if (mask) {
    for (int64_t t = 0; t < tokens; ++t) scores[t] += mask[t];
  }
  for (int64_t t = tokens; t < kAttendTile; ++t) scores[t] = -ISQ_INFINITY;
  NativeF32 largest = splat<NativeF32>(-ISQ_INFINITY), v;
  for (int t = 0; t < kAttendTile; t += kStep) {
    std::memcpy(&v, scores + t, sizeof v);
    largest = select((v > largest) | (v != v), v, largest);  // NaN wins, and the result is NaN
  }
  float best = *most;
  for (int l = 0; l < kStep; ++l) best = largest[l] > best || largest[l] != largest[l] ? largest[l] : best;
  if (best == -ISQ_INFINITY) {  // all is masked
    std::memset(scores, 0, kAttendTile * sizeof(float));
    return 1.0f;
  }
  NativeF32 sum = splat<NativeF32>(0.0f);
  for (int t = 0; t < kAttendTile; t += kStep) {
    std::memcpy(&v, scores + t, sizeof v);
    v = exp_of(v - best);
    sum += v;
    std::memcpy(scores + t, &v, sizeof v);
  }
  const float factor = exp_of(*most - best);
  float added = 0.0f;
  for (int l = 0; l < kStep; ++l) added += sum[l];
  *total = *total * factor + added;
  *most = best;
  return factor;
}

// ---- values --------------------------------------------------------------------------------------------------------

// sums_r = sums_r * factor_r + sum_t weights[r * kAttendTile + t] v_t
template <class Read, int kQueries>
void add_tile(const uint8_t* values, int64_t value_bytes, int64_t tokens, int64_t blocks, const float* weights,
              const float* factor, float* sums) {
  constexpr int kTokens = kQueries >= 4 ? 1 : 2;  // one sum after the other would wait for the adder
  for (int64_t b = 0; b < blocks; ++b) {
    const uint8_t* block = values + b * Read::kBytes;
    Floats acc[kTokens][kQueries][2];
    for (int r = 0; r < kQueries; ++r) {
      for (int i = 0; i < 2; ++i) {
        acc[0][r][i] = load_floats_16(sums + (r * blocks + b) * 32 + 16 * i) * factor[r];
        if constexpr (kTokens == 2) acc[1][r][i] = all_lanes(0.0f);
      }
    }
    for (int64_t t = 0; t < tokens; t += kTokens) {
      for (int j = 0; j < kTokens; ++j) {
        Floats w[2];
        Read::load(block + (t + j < tokens ? t + j : t) * value_bytes, w);  // beyond the end, the weight is 0
        for (int r = 0; r < kQueries; ++r) {
          const Floats weight = all_lanes(weights[r * kAttendTile + t + j]);
          for (int i = 0; i < 2; ++i) acc[j][r][i] = multiply_add(w[i], weight, acc[j][r][i]);
        }
      }
    }
    for (int r = 0; r < kQueries; ++r) {
      for (int i = 0; i < 2; ++i) {
        Floats all = acc[0][r][i];
        if constexpr (kTokens == 2) all = multiply_add(acc[1][r][i], all_lanes(1.0f), all);
        std::memcpy(sums + (r * blocks + b) * 32 + 16 * i, &all, sizeof all);
      }
    }
  }
}

// ---- both ----------------------------------------------------------------------------------------------------------

using ScoreTile = void (*)(const uint8_t*, int64_t, int64_t, int64_t, const float*, float*);
using AddTile = void (*)(const uint8_t*, int64_t, int64_t, int64_t, const float*, const float*, float*);

// By AttendRead and by the binary logarithm of the number of queries.
template <class Read>
struct AttendKernels {
  static constexpr ScoreTile kScore[4] = {score_tile<Read, 1>, score_tile<Read, 2>, score_tile<Read, 4>,
                                          score_tile<Read, kMostQueries>};
  static constexpr AddTile kAdd[4] = {add_tile<Read, 1>, add_tile<Read, 2>, add_tile<Read, 4>,
                                      add_tile<Read, kMostQueries>};
};
constexpr const ScoreTile* kScores[] = {AttendKernels<ReadQ8_0>::kScore, AttendKernels<ReadQ4_0>::kScore,
                                        AttendKernels<ReadDecoded>::kScore};
constexpr const AddTile* kAdds[] = {AttendKernels<ReadQ8_0>::kAdd, AttendKernels<ReadQ4_0>::kAdd,
                                    AttendKernels<ReadDecoded>::kAdd};

// Where a tile of a side is read: in its packed rows, or in the buffer into which it is decoded.
struct TileRows {
  const uint8_t* bytes;
  int64_t apart;
};
ISQ_INLINE TileRows rows_of_tile(const AttendSide& side, int64_t first, int64_t tokens, float* buffer) {
  const uint8_t* packed = side.rows + first * side.row_bytes;
  if (side.read != AttendRead::kDecoded) return {packed, side.row_bytes};
  side.decode(packed, tokens * side.row_bytes / side.block_bytes, buffer);
  return {reinterpret_cast<const uint8_t*>(buffer), side.dim * (int64_t)sizeof(float)};
}

void attend(const AttendJob& job) {
  alignas(64) float scores[kMostQueries * kAttendTile];
  float factor[kMostQueries];
  const int step = job.queries > 4 ? 3 : job.queries > 2 ? 2 : job.queries > 1 ? 1 : 0;
  const int queries = 1 << step;
  for (int r = 0; r < queries; ++r) {
    job.most[r] = -ISQ_INFINITY;
    job.total[r] = 0.0f;
  }
  std::memset(job.sums, 0, queries * job.values.dim * sizeof(float));
  for (int64_t first = 0; first < job.tokens; first += kAttendTile) {
    const int64_t tokens = job.tokens - first < kAttendTile ? job.tokens - first : kAttendTile;
    const TileRows keys = rows_of_tile(job.keys, first, tokens, job.buffer);
    kScores[(int)job.keys.read][step](keys.bytes, keys.apart, tokens, job.keys.dim / 32, job.q, scores);
    for (int r = 0; r < queries; ++r) {
      const float* mask = r < job.queries && job.mask ? job.mask[r] + first : nullptr;
      factor[r] = weigh_tile(scores + r * kAttendTile, tokens, mask, &job.most[r], &job.total[r]);
    }
    const TileRows values = rows_of_tile(job.values, first, tokens, job.buffer);
    kAdds[(int)job.values.read][step](values.bytes, values.apart, tokens, job.values.dim / 32, scores, factor,
                                      job.sums);
  }
}

AttentionKernels attention_kernels() { return {kMostQueries, attend}; }

}  // namespace isqtorch::ISQ_ISA
