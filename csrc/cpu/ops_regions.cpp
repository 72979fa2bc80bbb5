// Which threads work in a region: torch's or ours.
//
// torch has a team of OpenMP threads. By default, they spin for milliseconds after each region of torch, for example in
// attention. A thread of ours would have to share a core with one that spins, so then torch's threads do our work, too.
// Where they sleep instead (OMP_WAIT_POLICY=passive), where there is no OpenMP, and in a forked child, which has lost
// them, the work is done by our own pool.
//
// A region of torch's threads ends when all of them are done. If another program takes a core away from one of them,
// all wait. So after such an event our brief regions have one thread for a while, twice as long each time. The pool
// would only compete with the threads that spin.
#include "cpu/ops_regions.h"

#include <chrono>
#include <cstdlib>
#include <cstring>

#include <pthread.h>
#include <strings.h>

#include <torch/csrc/stable/ops.h>

#include "compiler.h"

namespace at {
bool in_parallel_region() ISQ_WEAK;  // torch's stable interface lacks it; null if a later torch has none
}

namespace isqtorch {
namespace {

using std::chrono::microseconds;
using std::chrono::nanoseconds;

constexpr microseconds kDisturbance{300}, kShortestRest{1000}, kSoonAgain{100000};
constexpr int kMostDoublings = 4;

nanoseconds now() { return std::chrono::steady_clock::now().time_since_epoch(); }

// Whether idle OpenMP threads spin, as the variables say that GNU's, Intel's and LLVM's OpenMP read.
bool openmp_spins() {
#if defined(__linux__)
  const char* const policy = std::getenv("OMP_WAIT_POLICY");
  if (policy && strcasecmp(policy, "passive") == 0) return false;
  constexpr long kFewSpins = 10000;  // less than a tenth of a millisecond
  const char* const spins = std::getenv("GOMP_SPINCOUNT");
  if (spins && *spins >= '0' && *spins <= '9' && std::strtol(spins, nullptr, 10) < kFewSpins) return false;
  const char* const milliseconds = std::getenv("KMP_BLOCKTIME");
  return !(milliseconds && std::strcmp(milliseconds, "0") == 0);
#else
  return false;
#endif
}

struct TorchThreads {
  std::atomic<bool> there{openmp_spins()};  // read when the library is loaded, as OpenMP itself does
  std::atomic<int64_t> rest_until{0};       // nanoseconds
  std::atomic<int> doublings{0};
  std::atomic<int64_t> used{0};  // in regions of ours

  TorchThreads() {
    static TorchThreads* const self = this;
    pthread_atfork(nullptr, nullptr, [] {
      self->there = false;
      self->used = 0;
    });
  }
} torch_threads;

// The same as ThreadPool::run.
void run_on_torch_threads(int64_t threads, RegionFn body) {
  Region region(body);
  const nanoseconds begin = now();
  nanoseconds done{};  // when the caller was done
  torch_threads.used += threads;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t) {
    region.call();
    if (first == 0) done = now();
  });
  torch_threads.used -= threads;
  const nanoseconds end = now();
  // The others had less left to do than the caller has done, so this took longer than their work.
  if (end - done > kDisturbance && end - done > done - begin) {
    const bool again = (end - nanoseconds(torch_threads.rest_until)) < kSoonAgain;
    const int doublings = again ? std::min(torch_threads.doublings + 1, kMostDoublings) : 0;
    torch_threads.doublings = doublings;
    torch_threads.rest_until = (end + kShortestRest * (1 << doublings) / (threads - 1)).count();  // many are a loss
  }
  region.finish();
}

}  // namespace

int64_t threads_of_region() {
  if (Region::inside() || (at::in_parallel_region && at::in_parallel_region())) return 1;
  return torch::stable::get_num_threads();
}

void run_region(int64_t threads, bool brief, RegionFn body) {
  static const int cpus = usable_cpus();
  threads = std::min<int64_t>(threads, cpus);
  if (threads <= 1) return body.call(body.context);
  const int64_t used = torch_threads.used.load(std::memory_order_relaxed);
  if (!torch_threads.there.load(std::memory_order_relaxed) || used > 0) {
    const int64_t helpers = std::min(threads, cpus - used) - 1;
    return ThreadPool::of_process().run(static_cast<int>(helpers), brief, body);
  }
  const int64_t rest_until = brief ? torch_threads.rest_until.load(std::memory_order_relaxed) : 0;
  if (rest_until != 0 && now().count() < rest_until) return body.call(body.context);
  run_on_torch_threads(threads, body);
}

}  // namespace isqtorch
