// x on its way to the warps of a block of the tile kernel: a ring in shared memory, which all warps fill.
//
// The ring holds x as rows of a slice, 64 bytes each, or 128 for f32. A lane's numbers lie together. In every other
// pair of rows (every other row for f32) the halves are exchanged, so that lanes that read at the same time use
// different banks.
#pragma once

#include "cuda/kernels/product.cuh"

namespace isqtorch::cuda {

constexpr int kTileStages = 3;

// A stage has 16 KB: a few slices of as many chunks as the warps split k into. All warps of a block meet once per
// stage. That must not be too often, or the matrix units would wait.
template <class X, int kTokenTiles>
struct TokenRing {
  static constexpr int kTokens = 8 * kTokenTiles, kMostSlices = (16 << 10) / (kTokens * X::kSliceBytes);
  static constexpr int kSlices = kMostSlices < kChunk / kSlice ? kMostSlices : kChunk / kSlice;  // of a stage
  static constexpr int kSteps = kChunk / kSlice / kSlices;                                       // stages to a chunk
  static constexpr int kPartBytes = kSlices * kTokens * X::kSliceBytes;                          // of one chunk
  static constexpr int kBytes = kTileStages * kPartBytes;
  static constexpr int kRowsBytes = kTokens * (int)sizeof(uint8_t*);  // where the tokens' rows are
  static ISQ_DEVICE int swapped(int g) { return X::kF32 ? g % 2 * 64 : g / 2 % 2 * 32; }

  // Copies this warp's share of a stage. `chunk` is its first chunk and `first` its first slice of each chunk. If
  // kRest, slices from `slices` on, counted from the beginning of x, are zeros.
  template <bool kRest>
  static ISQ_DEVICE void copy(const uint8_t* const* rows, uint8_t* stage, int chunk, int first, int slices, int split,
                              int warp, int warps, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int eight = warp; eight < split * kTokenTiles; eight += warps) {  // tokens of a chunk
      const int begin = (chunk + eight / kTokenTiles) * (kChunk / kSlice) + first, left = slices - begin;
      if (left <= 0) continue;
      const uint8_t* const from = rows[eight % kTokenTiles * 8 + g] + (int64_t)begin * X::kSliceBytes + 16 * t;
      uint8_t* const tokens = stage + eight / kTokenTiles * kPartBytes + (eight % kTokenTiles * 8 + g) * X::kSliceBytes;
#pragma unroll
      for (int at = 0; at < X::kSliceBytes; at += 64) {
        const SharedAddress to(tokens + ((at + 16 * t) ^ swapped(g)));
#pragma unroll
        for (int i = 0; i < kSlices; ++i) {
          copy_async(to, i * kTokens * X::kSliceBytes, from + i * X::kSliceBytes + at, !kRest || i < left ? 16 : 0);
        }
      }
    }
  }
};

}  // namespace isqtorch::cuda
