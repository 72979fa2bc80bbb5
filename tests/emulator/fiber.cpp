#include "fiber.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#if defined(EMULATOR_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#endif
#if defined(EMULATOR_ASAN)
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
void __asan_unpoison_memory_region(const void volatile*, size_t);
}
#endif

// simt_switch(save, to): pushes what the calling convention wants preserved, stores the stack pointer in *save, and
// returns on the stack that was left at `to`.
extern "C" void simt_switch(void** save, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.type simt_switch,@function
simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size simt_switch,.-simt_switch
)");
constexpr int kReturnWord = 6;  // `ret` pops it
constexpr int kFrameWords = 8;  // with one more, so that the entry finds the stack as after a call
#elif defined(__aarch64__)
asm(R"(
.text
.type simt_switch,%function
simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size simt_switch,.-simt_switch
)");
constexpr int kReturnWord = 11;  // x30
constexpr int kFrameWords = 20;
#else
#error "the emulator knows how to switch stacks on x86-64 and aarch64 only"
#endif

namespace simt {
namespace {

constexpr size_t kGuardBytes = 64 << 10;  // whole pages, of any size in use

}  // namespace

Fiber::~Fiber() {
#if defined(EMULATOR_TSAN)
  if (stack_ && race_fiber_) __tsan_destroy_fiber(race_fiber_);
#endif
  if (stack_) munmap(stack_ - kGuardBytes, kStackBytes + kGuardBytes);
}

void Fiber::start(void (*entry)()) {
  if (!stack_) {
    void* const pages = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) std::abort();
    mprotect(pages, kGuardBytes, PROT_NONE);
    stack_ = static_cast<char*>(pages) + kGuardBytes;
    bounds_ = stack_;
    bounds_bytes_ = kStackBytes;
#if defined(EMULATOR_TSAN)
    race_fiber_ = __tsan_create_fiber(0);
#endif
  }
#if defined(EMULATOR_ASAN)
  __asan_unpoison_memory_region(stack_, kStackBytes);  // a fiber that failed never left its functions
#endif
  void** const frame = reinterpret_cast<void**>(stack_ + kStackBytes) - kFrameWords;
  std::memset(frame, 0, kFrameWords * sizeof(void*));
  frame[kReturnWord] = reinterpret_cast<void*>(entry);
  stack_pointer_ = frame;
}

void Fiber::adopt_thread() {
#if defined(EMULATOR_TSAN)
  race_fiber_ = __tsan_get_current_fiber();
#endif
}

bool Fiber::overflowed(const void* address) const {
  const char* const at = static_cast<const char*>(address);
  return stack_ && at >= stack_ - kGuardBytes && at < stack_;
}

void Fiber::switch_to(Fiber& from, Fiber& to, [[maybe_unused]] bool last) {
#if defined(EMULATOR_ASAN)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack_, to.bounds_, to.bounds_bytes_);
#endif
#if defined(EMULATOR_TSAN)
  __tsan_switch_to_fiber(to.race_fiber_, 1);  // 1: the switch itself orders nothing
#endif
  simt_switch(&from.stack_pointer_, to.stack_pointer_);
#if defined(EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::arrived([[maybe_unused]] Fiber& self, [[maybe_unused]] Fiber& thread) {
#if defined(EMULATOR_ASAN)
  const void* left;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &left, &bytes);
  if (!thread.bounds_) {  // only the first fiber is reached from the thread's own stack
    thread.bounds_ = left;
    thread.bounds_bytes_ = bytes;
  }
#endif
}

#if defined(EMULATOR_TSAN)
void happens_before(void* token) { __tsan_release(token); }
void happens_after(void* token) { __tsan_acquire(token); }
#else
void happens_before(void*) {}
void happens_after(void*) {}
#endif

}  // namespace simt
