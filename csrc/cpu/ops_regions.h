// Parallel regions of the CPU operators: which threads work, and which part of the work each of them takes.
//
// A thread that is done takes work that others have left, because cores differ in speed and may be shared.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

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

// The pieces of work of a region. Each thread has a part of its own, of neighbouring pieces, and then helps others with
// theirs. So it reads memory in order, and in the next region the same memory as in this one.
class SharedWork {
 public:
  SharedWork(int64_t count, int64_t step, int64_t threads)
      : step_(step), parts_(std::min(threads, kMostParts)), caller_(std::this_thread::get_id()) {
    const int64_t pieces = (count + step - 1) / step;
    for (int64_t p = 0; p < parts_; ++p) {
      part_[p].next.store(pieces * p / parts_ * step, std::memory_order_relaxed);
      part_[p].end = std::min(pieces * (p + 1) / parts_ * step, count);
    }
  }

  // Calls body(begin, end) for pieces until none is left.
  template <class Body>
  void take(const Body& body) {
    const int64_t own = std::this_thread::get_id() == caller_ ? 0 : ++helpers_ % parts_;
    try {
      for (int64_t p = own, tried = 0; tried < parts_; ++tried, p = p + 1 < parts_ ? p + 1 : 0) {
        for (int64_t i = part_[p].next.fetch_add(step_); i < part_[p].end; i = part_[p].next.fetch_add(step_)) {
          body(i, std::min(i + step_, part_[p].end));
        }
      }
    } catch (...) {
      for (int64_t p = 0; p < parts_; ++p) part_[p].next = part_[p].end;  // the other threads need not go on
      throw;
    }
  }

 private:
  static constexpr int64_t kMostParts = 64;
  struct alignas(64) Part {
    std::atomic<int64_t> next;
    int64_t end;
  };

  const int64_t step_, parts_;
  const std::thread::id caller_;
  std::atomic<int64_t> helpers_{0};
  Part part_[kMostParts];
};

// Calls body(begin, end) for ranges of [0, count), `step` long or less.
template <class Body>
void parallel_ranges(int64_t count, int64_t step, int64_t threads, bool brief, const Body& body) {
  struct Call {
    SharedWork& work;
    const Body& body;
  };
  SharedWork work(count, step, threads);
  const Call call{work, body};
  run_region(threads, brief, {&call, [](const void* context) {
                                const Call& c = *static_cast<const Call*>(context);
                                c.work.take(c.body);
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
