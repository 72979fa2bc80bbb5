// How many rows and how much of k a block of the tile kernel takes, calculated with the numbers of an H100. It has 132
// multiprocessors. Each issues four instructions per clock, completes an m16n8k16 product in 1.6 clocks (6.3 on each of
// its four matrix units), and gets 13 bytes per clock from memory and 24 from the second-level cache.
//
// A block of 32 g rows costs its multiprocessor, in clocks per chunk of 256:
// - multiplying: 318 g with 16 tokens, 346 g with 32, 416 g with 64, 832 g with 128 (the count is in linear_tile.cuh)
// - copying 32 g rows of weights, and x of all tokens: 192 g + 21 per token, from the second-level cache, at 4 bits
// So with few rows per block, x is the bottleneck: with n = k = 8192 and 64 tokens, blocks of 64 rows would read 138 MB
// of x in 25 us, while the products take 14.7 us. With 256 rows and a quarter of k (a slab) they read 34 MB in 6 us.
// The sums of slabs are 8 MB, which are written, read and added in 3 us, plus 1.5 us for a second launch: 21 us in all.
// (Instead, the last block to finish could add the slabs. To know that it is the last, it would need a counter that
// outlives the call and that two streams must not share, and the sums of 256 rows would go through one multiprocessor
// in 2 us.)
#pragma once

#include <algorithm>
#include <cstdint>

namespace isqtorch::cuda {

constexpr int kProcessors = 132;  // of an H100; on a GPU with fewer, each gets more blocks

struct TileShape {
  int64_t n, parts;              // number of parts of the tokens; a block takes one
  int chunks, tokens;            // of k; of a part
  int chunk_bytes, token_bytes;  // of 32 rows' chunk of weights, of a token's
  int most_warps, warp_shared, x_shared;
  int64_t shared_limit;
  bool slabs;  // whether blocks may split k
};

struct TilePlan {
  int groups = 1;  // of 32 rows, one warp each
  int split = 1;   // warps with the same rows
  int slabs = 1, slab_chunks = 0;
};

// The clocks that the whole product takes.
inline int64_t tile_cost(const TileShape& shape, const TilePlan& plan) {
  constexpr int kBytesPerClock = 24, kBusyWarps = 8, kStart = 2000, kSecondLaunch = 2600;
  const int64_t rows = 32 * plan.groups, blocks = (shape.n + rows - 1) / rows * shape.parts * plan.slabs;
  const int chunk_clocks = std::max({290 + 7 * shape.tokens / 4, 13 * shape.tokens / 2, shape.chunk_bytes / 13});
  const int warps = plan.groups * plan.split;
  const int64_t multiply = (int64_t)((plan.slab_chunks + plan.split - 1) / plan.split) * chunk_clocks *
                           std::max(warps, kBusyWarps);  // fewer warps leave a part idle
  const int64_t copy =
      (int64_t)plan.slab_chunks * (plan.groups * shape.chunk_bytes + shape.tokens * shape.token_bytes) / kBytesPerClock;
  const int64_t rounds = (blocks + kProcessors - 1) / kProcessors;
  const int64_t sums = plan.slabs * shape.n * shape.parts * shape.tokens * 2 * (int64_t)sizeof(float);
  return rounds * (std::max(multiply, copy) + kStart) +
         (plan.slabs > 1 ? kSecondLaunch + sums / (kProcessors * kBytesPerClock) : 0);
}

// The cheapest plan among those that fill the multiprocessors once and those that do not split k.
inline TilePlan plan_tiles(const TileShape& shape) {
  TilePlan best;
  int64_t least = INT64_MAX;
  for (int groups = (int)std::min<int64_t>(shape.most_warps, (shape.n + 31) / 32); groups > 0; --groups) {
    if (groups * shape.warp_shared + shape.x_shared > shape.shared_limit && groups > 1) continue;
    const int64_t blocks = (shape.n + 32 * groups - 1) / (32 * groups) * shape.parts;
    const int wave = (int)std::clamp<int64_t>(shape.slabs ? kProcessors / blocks : 1, 1, shape.chunks);
    for (int slabs = wave;; slabs = 1) {
      TilePlan plan;
      plan.groups = groups;
      plan.slab_chunks = (shape.chunks + slabs - 1) / slabs;
      plan.slabs = (shape.chunks + plan.slab_chunks - 1) / plan.slab_chunks;
      const int fit = (int)(shape.shared_limit / (groups * shape.warp_shared + shape.x_shared));
      const int most = std::clamp(shape.most_warps / groups, 1, std::max(fit, 1));
      const int rounds = (plan.slab_chunks + most - 1) / most;
      plan.split = (plan.slab_chunks + rounds - 1) / rounds;
      if (const int64_t cost = tile_cost(shape, plan); cost < least) least = cost, best = plan;
      if (slabs == 1) break;
    }
  }
  return best;
}

}  // namespace isqtorch::cuda
