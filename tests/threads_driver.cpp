// Tests of csrc/cpu/thread_pool.h in a program of their own, which test_threads.py compiles, also with ThreadSanitizer.
// Prints a line for every test; a failure ends the program.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cpu/thread_pool.h"

using isqtorch::Region;
using isqtorch::ThreadPool;
using std::chrono::milliseconds;

#define CHECK(condition)                                                 \
  if (!(condition)) {                                                    \
    std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
    std::exit(1);                                                        \
  }

// Only regions that are not brief surely get their helpers on a loaded machine.
constexpr bool kBrief = true, kLong = false;

template <class Body>
void run(ThreadPool& pool, int helpers, bool brief, const Body& body) {
  pool.run(helpers, brief, {&body, [](const void* context) { (*static_cast<const Body*>(context))(); }});
}

// Counts to `count` in the order in which threads come. Every number is plain memory, written once.
std::vector<int> fill(ThreadPool& pool, int helpers, int count) {
  std::vector<int> seen(count);
  std::atomic<int> next{0};
  run(pool, helpers, kBrief, [&] {
    for (int i = next++; i < count; i = next++) seen[i] += i + 1;
  });
  return seen;
}

void check_filled(const std::vector<int>& seen) {
  for (size_t i = 0; i < seen.size(); ++i) CHECK(seen[i] == static_cast<int>(i) + 1);
}

double cpu_seconds() {
  rusage used;
  getrusage(RUSAGE_SELF, &used);
  const auto seconds = [](const timeval& t) { return t.tv_sec + t.tv_usec * 1e-6; };
  return seconds(used.ru_utime) + seconds(used.ru_stime);
}

// Each piece of work is done once, and its results are seen by the caller, in one region and in thousands in a row.
void every_piece_once() {
  for (int helpers : {0, 1, 3, 7}) {
    ThreadPool pool(helpers);
    for (int i = 0; i < 2000; ++i) check_filled(fill(pool, 1 + i % 8, 1 + i % 50));
  }
}

// With pauses, after which helpers still spin, fall asleep just now, or sleep.
void after_pauses() {
  ThreadPool pool(3);
  for (int i = 0; i < 300; ++i) {
    check_filled(fill(pool, 3, 20));
    std::this_thread::sleep_for(std::chrono::microseconds(i * 10));
  }
}

// All threads are in the region at the same time: each waits for the others.
void threads_work_together() {
  ThreadPool pool(3);
  std::atomic<int> here{0};
  run(pool, 3, kLong, [&] {
    ++here;
    while (here < 4) std::this_thread::yield();
  });
  CHECK(here == 4);
}

void many_callers() {
  ThreadPool pool(3);
  std::vector<std::thread> callers;
  for (int t = 0; t < 8; ++t) {
    callers.emplace_back([&, t] {
      for (int i = 0; i < 500; ++i) check_filled(fill(pool, 1 + t % 4, 30));
    });
  }
  for (std::thread& caller : callers) caller.join();
}

// A region in a region: its caller does all of the work.
void nested() {
  ThreadPool pool(3);
  std::atomic<int> regions{0};
  CHECK(!Region::inside());
  run(pool, 3, kLong, [&] {
    CHECK(Region::inside());
    std::set<std::thread::id> threads;
    run(pool, 3, kLong, [&] { threads.insert(std::this_thread::get_id()); });
    CHECK(threads == std::set<std::thread::id>{std::this_thread::get_id()});
    CHECK(Region::inside());
    ++regions;
  });
  CHECK(!Region::inside());
  CHECK(regions >= 1 && regions <= 4);
}

// The caller gets the exception of a helper, or its own, after all threads have left the region.
void exceptions() {
  ThreadPool pool(3);
  for (int i = 0; i < 200; ++i) {
    std::atomic<int> here{0}, left{0};
    const auto caller = std::this_thread::get_id();
    std::string message;
    try {
      run(pool, 3, kLong, [&] {
        ++here;
        const bool own = std::this_thread::get_id() == caller;
        if (i % 4 == 0) {
          while (here < 2) std::this_thread::yield();  // a helper is here
        }
        ++left;
        if (own == (i % 2 == 1)) throw std::runtime_error(own ? "caller" : "helper");
      });
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
    CHECK(here == left);
    if (i % 2 == 1) CHECK(message == "caller");
    if (i % 4 == 0) CHECK(message == "helper");
    check_filled(fill(pool, 3, 20));
  }
}

// Helpers compute as the caller does.
void floating_point_mode() {
#if defined(__x86_64__)
  ThreadPool pool(1);
  const unsigned before = _mm_getcsr();
  for (int i = 0; i < 50; ++i) {
    const unsigned flush = i % 2 ? 1u << 15 | 1u << 6 : 0;
    _mm_setcsr(before | flush);
    std::atomic<int> here{0}, equal{0};
    run(pool, 1, kLong, [&] {
      ++here;
      while (here < 2) std::this_thread::yield();
      equal += (_mm_getcsr() & (1u << 15 | 1u << 6)) == flush;
    });
    CHECK(equal == 2);
    CHECK((_mm_getcsr() & (1u << 15 | 1u << 6)) == flush);
  }
  _mm_setcsr(before);
#endif
}

// Helpers that have nothing to do burn no time after some milliseconds.
void idle_threads_sleep() {
  ThreadPool pool(3);
  for (int i = 0; i < 100; ++i) check_filled(fill(pool, 3, 100));
  std::this_thread::sleep_for(milliseconds(50));
  const double before = cpu_seconds();
  std::this_thread::sleep_for(milliseconds(500));
  CHECK(cpu_seconds() - before < 0.02);
}

// Regions that come seldom make the helpers spin less and less.
void seldom_regions_cost_little() {
  ThreadPool pool(1);
  for (int i = 0; i < 20; ++i) {
    check_filled(fill(pool, 1, 10));
    std::this_thread::sleep_for(milliseconds(5));
  }
  const double before = cpu_seconds();
  for (int i = 0; i < 40; ++i) {
    check_filled(fill(pool, 1, 10));
    std::this_thread::sleep_for(milliseconds(5));
  }
  CHECK(cpu_seconds() - before < 0.02);  // 40 spins of a millisecond would be 0.04
}

// A child has no threads but its own; the pool of the process is made anew there.
void forked_child() {
  ThreadPool& parent = ThreadPool::of_process();
  check_filled(fill(parent, 3, 100));
  for (int i = 0; i < 5; ++i) {
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
      ThreadPool& own = ThreadPool::of_process();
      if (&own == &parent) _exit(2);
      for (int j = 0; j < 100; ++j) check_filled(fill(own, 3, 100));
      _exit(0);
    }
    for (int j = 0; j < 100; ++j) check_filled(fill(parent, 3, 100));
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  CHECK(&ThreadPool::of_process() == &parent);
}

int main(int count, char** names) {
  const struct {
    const char* name;
    void (*run)();
  } tests[] = {{"every_piece_once", every_piece_once},
               {"after_pauses", after_pauses},
               {"threads_work_together", threads_work_together},
               {"many_callers", many_callers},
               {"nested", nested},
               {"exceptions", exceptions},
               {"floating_point_mode", floating_point_mode},
               {"idle_threads_sleep", idle_threads_sleep},
               {"seldom_regions_cost_little", seldom_regions_cost_little},
               {"forked_child", forked_child}};
  for (const auto& test : tests) {
    if (count > 1 && std::string(names[1]) != test.name) continue;
    test.run();
    std::printf("%s\n", test.name);
  }
}
