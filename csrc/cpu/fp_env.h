// Subnormal numbers are part of several formats' arithmetic, but a process may have asked its threads to flush them to
// zero (torch.set_flush_denormal, or any library linked with -ffast-math). While an IeeeScope exists, its thread
// computes as IEEE 754 says; the destructor restores the caller's mode.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace isqtorch {

class IeeeScope {
 public:
#if defined(__x86_64__)
  IeeeScope() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~(kFlushToZero | kDenormalsAreZero)); }
  ~IeeeScope() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kFlushToZero = 1u << 15, kDenormalsAreZero = 1u << 6;
  unsigned saved_;
#elif defined(__aarch64__)
  IeeeScope() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(saved_ & ~(kFlushToZero | kFlushHalf)));
  }
  ~IeeeScope() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  static constexpr uint64_t kFlushToZero = 1u << 24, kFlushHalf = 1u << 19;
  uint64_t saved_;
#else
  IeeeScope() {}
#endif

 public:
  IeeeScope(const IeeeScope&) = delete;
  IeeeScope& operator=(const IeeeScope&) = delete;
};

}  // namespace isqtorch
