#include "cpu/thread_pool.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "compiler.h"

namespace isqtorch {
namespace {

using std::chrono::microseconds;
using std::chrono::nanoseconds;

constexpr microseconds kLongestSpin{1000};
constexpr microseconds kShortestSpin{10};  // about as long as falling asleep and waking up take
// Between two looks at the clock lies less than a microsecond. More than this, and another program had the core. Less:
// perhaps it was a thread of torch.
constexpr microseconds kDisturbance{500};
constexpr microseconds kShortestRest{1000};
constexpr int kMostDoublings = 6;                                   // of the rest
constexpr int kPausesPerLook = 16;                                  // at the clock
constexpr int kLooksPerOffer = 8;                                   // of the core to other threads
constexpr int kPausesBeforeYield = 2000, kYieldsBeforeSleep = 200;  // of a caller that waits for the last helper

inline nanoseconds now() { return std::chrono::steady_clock::now().time_since_epoch(); }

// Tells the core that this thread waits in a loop.
inline void pause_core() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  ISQ_WAIT();
#endif
}

// The number of the core that runs this thread; -1 if the system does not say.
inline int current_cpu() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Makes the scheduler run this thread on another core than `cpu`, if it may use another.
void leave_cpu(int cpu) {
#if defined(__linux__)
  cpu_set_t allowed, others;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0)
    return;  // a machine with more cores than the set has room for
  others = allowed;
  CPU_CLR(cpu, &others);
  if (CPU_COUNT(&others) == 0) return;
  sched_setaffinity(0, sizeof others, &others);
  sched_setaffinity(0, sizeof allowed, &allowed);
#else
  static_cast<void>(cpu);
#endif
}

thread_local bool inside_region = false;

}  // namespace

void Region::call() noexcept {
  const FpMode before = FpMode::here();
  const bool nested = inside_region;
  mode_.set();
  inside_region = true;
  try {
    body_.call(body_.context);
  } catch (...) {
    if (!failed_.exchange(true)) error_ = std::current_exception();
  }
  inside_region = nested;
  before.set();
}

bool Region::inside() { return inside_region; }

// One thread. `slot_` says what it does and is the only way to talk to it:
//
//   kUnborn    the thread has not been started
//   kIdle      it waits for a job
//   a Region*   it is to do that job and has not begun; the caller may take the job back
//   Region* + 1 it does that job
//
// A region is on its caller's stack. The helper does not touch it after `slot_` is idle again.
class ThreadPool::Helper {
 public:
  ~Helper() {
    if (!thread_.joinable()) return;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
    }
    posted_.notify_one();
    thread_.join();
  }

  // Gives the helper a job if it is idle. cpu: that of the caller.
  bool claim(Region* job, int cpu, bool brief) {
    uintptr_t idle = kIdle;
    if (slot_.load(std::memory_order_relaxed) == kUnborn) {
      idle = kUnborn;
      return slot_.compare_exchange_strong(idle, posted(job)) && start();
    }
    const int64_t rests_until = brief ? rests_until_.load(std::memory_order_relaxed) : 0;
    if (rests_until != 0 && now().count() < rests_until) return false;
    caller_cpu_.store(cpu, std::memory_order_relaxed);
    if (!slot_.compare_exchange_strong(idle, posted(job))) return false;
    if (asleep_.load()) {
      {
        const std::lock_guard<std::mutex> lock(mutex_);
      }  // it is about to wait, or waits
      posted_.notify_one();
    }
    return true;
  }

  // If the helper was given this job, takes it back or waits until it is done.
  void settle(Region* job) {
    uintptr_t seen = slot_.load(std::memory_order_acquire);
    if (seen == posted(job) && slot_.compare_exchange_strong(seen, kIdle)) return;
    for (int i = 0; i < kPausesBeforeYield; ++i) {
      if (slot_.load(std::memory_order_acquire) != running(job)) return;
      pause_core();
    }
    for (int i = 0; i < kYieldsBeforeSleep; ++i) {
      if (slot_.load(std::memory_order_acquire) != running(job)) return;
      sched_yield();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    awaited_.store(true);
    done_.wait(lock, [&] { return slot_.load() != running(job); });
    awaited_.store(false);
  }

 private:
  static constexpr uintptr_t kUnborn = 2, kIdle = 0;
  static uintptr_t posted(Region* job) { return reinterpret_cast<uintptr_t>(job); }
  static uintptr_t running(Region* job) { return reinterpret_cast<uintptr_t>(job) + 1; }

  // The thread handles no signals: those of a process are for its own threads.
  bool start() {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool started = true;
    try {
      thread_ = std::thread([this] { live(); });
    } catch (const std::system_error&) {  // too many threads or too little memory: the others do the work
      slot_.store(kUnborn);
      started = false;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return started;
  }

  void live() {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "isqtorch");
#endif
    while (Region* job = next_job()) {
      job->call();
      idle_since_ = now();
      slot_.store(kIdle);
      if (awaited_.load()) {
        {
          const std::lock_guard<std::mutex> lock(mutex_);
        }
        done_.notify_all();
      }
    }
  }

  // Waits for a job and begins it. Null: the pool ends.
  Region* next_job() {
    bool caught = look_for_job();
    for (;;) {
      uintptr_t job = slot_.load(std::memory_order_acquire);
      if (job != kIdle && slot_.compare_exchange_strong(job, job + 1)) {
        learn(caught);
        return reinterpret_cast<Region*>(job);
      }
      caught = false;  // or its caller has taken it back
      if (!sleep()) return nullptr;
      // The scheduler likes to run a thread on the core of the thread that wakes it. There it would have to wait.
      if (beside_caller()) leave_cpu(current_cpu());
    }
  }

  bool has_job() const { return slot_.load(std::memory_order_acquire) != kIdle; }
  bool beside_caller() const {
    const int cpu = current_cpu();
    return cpu >= 0 && cpu == caller_cpu_.load(std::memory_order_relaxed);
  }

  // Spins for a while. False: there was no job.
  bool look_for_job() {
    nanoseconds last = now();
    const nanoseconds end = last + spin_;
    for (int looks = 1;; ++looks) {
      for (int i = 0; i < kPausesPerLook; ++i) {
        if (has_job()) return true;
        pause_core();
      }
      if (looks % kLooksPerOffer == 0) sched_yield();
      const nanoseconds time = now();
      if (time - last > kDisturbance) {
        if (!beside_caller()) return rest(time), false;
        leave_cpu(current_cpu());
      }
      if (time > end) return has_job();
      last = time;
    }
  }

  // Takes no jobs for a while, each time twice as long. What others get from a core in turns with this thread would
  // make a region wait.
  void rest(nanoseconds from) {
    rests_until_.store((from + kShortestRest * (1 << doublings_)).count(), std::memory_order_relaxed);
    doublings_ = std::min(doublings_ + 1, kMostDoublings);
  }

  // False: the pool ends.
  bool sleep() {
    std::unique_lock<std::mutex> lock(mutex_);
    asleep_.store(true);
    posted_.wait(lock, [&] { return slot_.load() != kIdle || closing_; });
    asleep_.store(false);
    return !closing_;
  }

  // Chooses how long to look for the next job.
  void learn(bool caught) {
    if (caught) {
      doublings_ = 0;
      rests_until_.store(0, std::memory_order_relaxed);
    }
    const bool near = now() - idle_since_ < kLongestSpin;
    spin_ = near ? kLongestSpin : std::max<nanoseconds>(spin_ / 2, kShortestSpin);
  }

  alignas(64) std::atomic<uintptr_t> slot_{kUnborn};
  std::atomic<bool> asleep_{false}, awaited_{false};
  std::atomic<int64_t> rests_until_{0};  // nanoseconds; 0: it does not rest
  std::atomic<int> caller_cpu_{-1};      // of the last caller
  alignas(64) std::mutex mutex_;
  std::condition_variable posted_, done_;
  bool closing_ = false;
  std::thread thread_;
  // Only for the thread itself.
  nanoseconds idle_since_ = now(), spin_ = kLongestSpin;
  int doublings_ = 0;
};

ThreadPool::ThreadPool(int helpers) : count_(std::max(helpers, 0)), helpers_(new Helper[count_]) {}
ThreadPool::~ThreadPool() = default;

void ThreadPool::run(int helpers, bool brief, RegionFn body) {
  if (inside_region || helpers <= 0 || count_ == 0) return body.call(body.context);
  Region region(body);
  const int cpu = current_cpu();
  int asked = 0;
  for (; asked < count_ && helpers > 0; ++asked) helpers -= helpers_[asked].claim(&region, cpu, brief);
  region.call();
  for (int i = 0; i < asked; ++i) helpers_[i].settle(&region);
  region.finish();
}

namespace {

std::atomic<ThreadPool*> process_pool{nullptr};

}  // namespace

ThreadPool& ThreadPool::of_process() {
  ThreadPool* pool = process_pool.load(std::memory_order_acquire);
  if (pool) return *pool;
  // The threads of the parent do not exist in a forked child. The parent's pool is left as it is there: a thread that
  // has no copy may have held its locks.
  static const int registered = pthread_atfork(nullptr, nullptr, [] { process_pool.store(nullptr); });
  static_cast<void>(registered);
  ThreadPool* const made = new ThreadPool(usable_cpus() - 1);
  if (process_pool.compare_exchange_strong(pool, made)) return *made;
  delete made;
  return *pool;
}

}  // namespace isqtorch
