// `experts_linear`. A few (token, slot) pairs take one launch, in which each pair has the index of its expert. Many
// pairs take two: the first sorts them by expert. The host never learns how many pairs an expert has.
#pragma once

#include "cuda/kernels/linear_rows.cuh"
#include "cuda/kernels/linear_tile.cuh"

namespace isqtorch::cuda {

constexpr int kSortThreads = 1024;

// Whether pairs are multiplied one by one. With as many pairs as experts, a share of 0.63 of the experts has any pairs.
// Their weights are read 1.6 times, the second time mostly from L2, because blocks with the same rows of all pairs
// follow each other.
inline bool few_pairs(const ExpertsJob& job) { return job.tokens * job.slots <= (job.experts > 16 ? job.experts : 16); }

// A span is up to `tokens` pairs of one expert. The spans of expert e start at index first(e) / tokens + e, which
// leaves enough room for the experts before it, whatever the ids are. The last spans are for pairs whose expert is not
// on this device.
ISQ_DEVICE int first_span(int first, int expert, int tokens) { return first / tokens + expert; }
inline int64_t most_spans(const ExpertsJob& job, int tokens) {
  return job.tokens * job.slots / tokens + job.experts + 1;
}

template <class F, Dtype dtype>
int expert_token_tiles(const ExpertsJob& job) {
  return token_tiles<F, dtype>((job.tokens * job.slots + job.experts - 1) / job.experts);
}

// Block e writes the pairs of expert e to their place in `order`, and its spans. It counts by itself how many pairs the
// experts before it have.
template <class Id>
__global__ void __launch_bounds__(kSortThreads)
    sort_kernel(const Id* ids, int pairs, int experts, int tokens, int* order, int4* spans) {
  constexpr int kWarps = kSortThreads / kWarp;
  ISQ_SHARED(int, before_of, [kWarps]);
  ISQ_SHARED(int, own_of, [kWarps]);
  const int expert = (int)blockIdx.x, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int share = (pairs + kSortThreads - 1) / kSortThreads * kWarp, begin = warp * share;
  const int end = begin + share < pairs ? begin + share : pairs;
  const auto id_at = [&](int pair) -> int {
    if (pair >= end) return experts + 1;
    const Id id = ids[pair];
    ISQ_ASSERT(id >= 0 && id <= experts, "isqtorch: an id names no expert");
    return (int)id;
  };

  int before = 0, own = 0;
  for (int at = begin; at < end; at += kWarp) {
    const int id = id_at(at + lane);
    before += id < expert;
    own += id == expert;
  }
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    before += __shfl_xor_sync(kAllLanes, before, distance);
    own += __shfl_xor_sync(kAllLanes, own, distance);
  }
  if (lane == 0) before_of[warp] = before, own_of[warp] = own;
  __syncthreads();
  int first = 0, count = 0, place = 0;
  for (int w = 0; w < kWarps; ++w) {
    first += before_of[w];
    place += w < warp ? own_of[w] : 0;
    count += own_of[w];
  }

  place += first;
  for (int at = begin; at < end; at += kWarp) {
    const bool mine = id_at(at + lane) == expert;
    const uint32_t all = __ballot_sync(kAllLanes, mine);
    if (mine) order[place + count_bits(all & ((1u << lane) - 1))] = at + lane;
    place += count_bits(all);
  }
  const int span0 = first_span(first, expert, tokens);
  const int span1 = expert == experts ? pairs / tokens + experts + 1 : first_span(first + count, expert + 1, tokens);
  for (int span = span0 + (int)threadIdx.x; span < span1; span += kSortThreads) {
    const int done = (span - span0) * tokens, left = done < count ? count - done : 0;
    spans[span] = {expert, first + done, left < tokens ? left : tokens, 0};
  }
}

template <class F, Dtype dtype>
void launch_experts_of(const ExpertsJob& job, const Shape& shape, Stream stream) {
  const int64_t pairs = job.tokens * job.slots;
  TileTask task = {};
  task.x = static_cast<const uint8_t*>(job.x);
  task.weight = job.weight;
  task.bias = job.bias;
  task.y = job.y;
  task.m = 1, task.n = (int)job.n, task.k = (int)job.k;
  set_shape(task, shape);
  task.rows_per_slot = job.rows_per_slot;
  task.slots = (int)job.slots, task.experts = (int)job.experts;
  if (few_pairs(job)) {
    task.ids = job.ids, task.wide_ids = job.wide_ids;
    task.parts = (unsigned)pairs;
    return launch_rows<F, dtype>(task, stream);
  }
  const int tiles = expert_token_tiles<F, dtype>(job), tokens = 8 * tiles;
  const int64_t spans = most_spans(job, tokens);
  int4* const of_spans = static_cast<int4*>(job.workspace);
  int* const order = reinterpret_cast<int*>(of_spans + spans);
  const auto sort = [&](auto kernel, auto ids) {
    ISQ_LAUNCH(kernel, {(unsigned)(job.experts + 1)}, {kSortThreads}, 0, (cudaStream_t)stream, ids, (int)pairs,
               task.experts, tokens, order, of_spans);
  };
  if (job.wide_ids) {
    sort(sort_kernel<int64_t>, static_cast<const int64_t*>(job.ids));
  } else {
    sort(sort_kernel<int32_t>, static_cast<const int32_t*>(job.ids));
  }
  task.spans = of_spans, task.order = order;
  task.parts = (unsigned)spans;
  // Blocks do not split k. There are many of them, and a second launch would cost more than that could gain.
  const TilePlan plan = tile_plan<F, dtype>(task, tiles, pairs / tokens + (job.experts + 1) / 2, false);
  launch_tiles<F, dtype>(task, tiles, plan, stream);
}

template <class F, Dtype dtype>
int64_t experts_workspace_of(const ExpertsJob& job) {
  if (few_pairs(job)) return 0;
  return most_spans(job, 8 * expert_token_tiles<F, dtype>(job)) * (int64_t)sizeof(int4) +
         job.tokens * job.slots * (int64_t)sizeof(int);
}

template <class F>
int64_t experts_workspace(const ExpertsJob& job, const Shape&) {
  return job.dtype == Dtype::kF32 ? experts_workspace_of<F, Dtype::kF32>(job)
                                  : experts_workspace_of<F, Dtype::kBf16>(job);
}

template <class F>
void launch_experts(const ExpertsJob& job, const Shape& shape, Stream stream) {
  if (!job.tokens || !job.slots || !job.n) return;
  switch (job.dtype) {
    case Dtype::kF32:
      return launch_experts_of<F, Dtype::kF32>(job, shape, stream);
    case Dtype::kF16:
      return launch_experts_of<F, Dtype::kF16>(job, shape, stream);
    case Dtype::kBf16:
      return launch_experts_of<F, Dtype::kBf16>(job, shape, stream);
  }
}

}  // namespace isqtorch::cuda
