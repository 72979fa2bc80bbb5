// Fibers: stacks of their own, switched between by hand, on one OS thread. A GPU thread is one.
//
// The sanitizers are told of every switch, so they see a GPU thread as a thread: ThreadSanitizer finds races between
// GPU threads, AddressSanitizer follows each stack. Compile this file as the kernels are (EMULATOR_TSAN, EMULATOR_ASAN
// say which sanitizer), but never with -fsanitize=thread itself: its bookkeeping is shared by all fibers on purpose.
#pragma once

#include <cstddef>

namespace simt {

constexpr size_t kStackBytes = 256 << 10;  // reserved, not touched; what is below it is guarded

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  // The next switch to this fiber calls `entry`, which must never return.
  void start(void (*entry)());
  // Makes this object stand for the OS thread that runs now, so that fibers can switch back to it.
  void adopt_thread();
  // Whether an address lies in the guarded memory below the stack.
  bool overflowed(const void* address) const;

  // Leaves `from` where it is and goes on where `to` was left. `last`: `from` is not coming back.
  static void switch_to(Fiber& from, Fiber& to, bool last = false);
  // Must be the first thing that a started fiber calls.
  static void arrived(Fiber& self, Fiber& thread);

 private:
  void* stack_pointer_ = nullptr;
  char* stack_ = nullptr;
  const void* bounds_ = nullptr;  // what AddressSanitizer is told: the lowest address of the stack
  size_t bounds_bytes_ = 0;
  void* fake_stack_ = nullptr;
  void* race_fiber_ = nullptr;
};

// Orderings between fibers that ThreadSanitizer should know of; nothing without it.
void happens_before(void* token);
void happens_after(void* token);

}  // namespace simt
