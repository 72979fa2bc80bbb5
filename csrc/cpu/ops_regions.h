// Parallel regions of the CPU operators: which threads work, and which part of the work each of them takes.
//
// A thread that is done takes the next piece of work, because cores differ in speed and may be shared.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

namespace isqtorch {

constexpr int64_t kWeightsPerTask = 1 << 16;  // less than this is not worth another thread
constexpr int64_t kBriefWeights = 1 << 27;    // less than this is computed in a few milliseconds
constexpr int64_t kRangesPerThread = 4;

// Threads that a region may use: as many as torch's own, and one inside a region of torch or of ours.
int64_t threads_of_region();

// Calls `body` on this thread and on up to `threads` - 1 others at the same time; see ThreadPool::run.
void run_region(int64_t threads, bool brief, RegionFn body);

// Calls body(begin, end) for ranges of [0, count), `step` long but for the last one.
template <class Body>
void parallel_ranges(int64_t count, int64_t step, int64_t threads, bool brief, const Body& body) {
  struct Work {
    const Body& body;
    const int64_t count, step;
    std::atomic<int64_t> next;
  } work{body, count, step, {0}};
  run_region(threads, brief, {&work, [](const void* context) {
                                Work& w = *static_cast<Work*>(const_cast<void*>(context));
                                try {
                                  for (int64_t i = w.next.fetch_add(w.step); i < w.count;
                                       i = w.next.fetch_add(w.step)) {
                                    w.body(i, std::min(i + w.step, w.count));
                                  }
                                } catch (...) {
                                  w.next = w.count;  // the other threads need not go on
                                  throw;
                                }
                              }});
}

// Calls body(begin, end) for ranges of [0, count), at least `grain` long but for the last one.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  const int64_t threads = count > grain ? threads_of_region() : 1;
  if (threads <= 1) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  const int64_t pieces = threads * kRangesPerThread;
  parallel_ranges(count, std::max({grain, (count + pieces - 1) / pieces, int64_t{1}}), threads, false, body);
}

inline void parallel(int64_t count, int64_t grain, RangeFn body) {
  parallel_for(count, grain, [&](int64_t begin, int64_t end) { body.call(body.context, begin, end); });
}

template <class Body>
void parallel_rows(int64_t rows, int64_t weights_per_row, const Body& body) {
  parallel_for(rows, 1 + kWeightsPerTask / std::max<int64_t>(weights_per_row, 1), body);
}

// Calls body(begin, end) for ranges of [0, tiles), a tile at a time.
template <class Body>
void parallel_tiles(int64_t tiles, int64_t weights_per_tile, const Body& body) {
  const int64_t weights = tiles * weights_per_tile, worth = std::min(tiles, weights / kWeightsPerTask);
  const int64_t threads = worth > 1 ? std::min(worth, threads_of_region()) : 1;
  if (threads <= 1) return body(0, tiles);
  parallel_ranges(tiles, 1, threads, weights < kBriefWeights, body);
}

}  // namespace isqtorch
