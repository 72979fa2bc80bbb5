// Subnormal numbers are part of several formats' arithmetic, but a process may have asked its threads to flush them to
// zero (torch.set_flush_denormal, or any library linked with -ffast-math). While an IeeeScope exists, its thread
// computes as IEEE 754 says; the destructor restores the caller's mode.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "compiler.h"

namespace isqtorch {

// How a thread computes: rounding, and what happens to subnormal numbers.
class FpMode {
 public:
#if defined(__x86_64__)
  static FpMode here() { return FpMode(_mm_getcsr() & ~kHappened); }
  void set() const { _mm_setcsr(bits_); }

 private:
  using Bits = unsigned;
  static constexpr Bits kHappened = 63;  // exceptions that have occurred
  static constexpr Bits kFlushes = 1u << 15 | 1u << 6;
#elif defined(__aarch64__)
  static FpMode here() {
    Bits bits;
    ISQ_GET_FPCR(bits);
    return FpMode(bits);
  }
  void set() const { ISQ_SET_FPCR(bits_); }

 private:
  using Bits = uint64_t;
  static constexpr Bits kFlushes = 1u << 24 | 1u << 19;
#else
  static FpMode here() { return FpMode(0); }
  void set() const {}

 private:
  using Bits = unsigned;
  static constexpr Bits kFlushes = 0;
#endif

 public:
  FpMode ieee() const { return FpMode(bits_ & ~kFlushes); }

 private:
  explicit FpMode(Bits bits) : bits_(bits) {}
  Bits bits_;
};

class IeeeScope {
 public:
  IeeeScope() : saved_(FpMode::here()) { saved_.ieee().set(); }
  ~IeeeScope() { saved_.set(); }
  IeeeScope(const IeeeScope&) = delete;
  IeeeScope& operator=(const IeeeScope&) = delete;

 private:
  const FpMode saved_;
};

}  // namespace isqtorch
