// Threads for the parallel regions of the CPU operators.
//
// A product takes 30 microseconds, and a token needs hundreds of them. Waking a sleeping thread takes as long as a
// product. So a helper that is done looks for its next job for a while before it sleeps:
//
//   - It looks for kLongestSpin at most. If jobs come further apart than that, it looks for less and less time, because
//     it would burn a core and sleep in the end all the same.
//   - It offers its core to others meanwhile. If another program takes it, the machine has more runnable threads than
//     cores. Then the helper rests: it takes no brief jobs for a while, twice as long after every such event.
//
// A region never waits for a helper that has not begun: its caller takes the job back and does the work itself. So on a
// loaded machine, a region takes no longer than one thread needs, plus at most one piece of work of a helper.
//
// Several threads may have regions at the same time. They share the helpers: each takes those that are idle.
#pragma once

#include <atomic>
#include <exception>
#include <memory>

#include "cpu/fp_env.h"

namespace isqtorch {

// What all threads of a region call at the same time. It takes pieces of work until none is left.
struct RegionFn {
  const void* context;
  void (*call)(const void* context);
};

// A region. All of its threads compute with the floating-point mode of the thread that made it, its caller.
class Region {
 public:
  explicit Region(RegionFn body) : body_(body), mode_(FpMode::here()) {}
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  // Calls the body on this thread, and keeps the first exception.
  void call() noexcept;
  // Throws that exception. Call it when no other thread is in the region any more.
  void finish() const {
    if (failed_) std::rethrow_exception(error_);
  }
  // Whether this thread is in a region.
  static bool inside();

 private:
  const RegionFn body_;
  const FpMode mode_;
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;  // of the thread that set failed_
};

class ThreadPool {
 public:
  // At most `helpers` threads, which are started when they are needed.
  explicit ThreadPool(int helpers);
  // Waits for the threads. No region may be active.
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // The pool of this process, with a helper for every CPU that the process may use but one. A forked child gets a new
  // one. It lives until the process ends: its threads may outlive everything else.
  static ThreadPool& of_process();

  // Calls `body` on this thread and on up to `helpers` idle ones. Returns when all of these calls have returned, and
  // throws their first exception. In a region, or if no helper is idle, only this thread calls it. brief: the region
  // takes less than some milliseconds.
  void run(int helpers, bool brief, RegionFn body);

  int helpers() const { return count_; }

 private:
  class Helper;

  const int count_;
  std::unique_ptr<Helper[]> helpers_;
};

// CPUs that this process may use: by its affinity, and by the quota of its control group, rounded up. At least one.
int usable_cpus();

}  // namespace isqtorch
