// Relaxed atomics, of 32 bits.
#pragma once

#include "types.h"

namespace metal {

enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T value;
};
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_float = atomic<float>;

template <class T>
T atomic_load_explicit(const volatile atomic<T>* object, memory_order) {
  T result;
  __atomic_load(&object->value, &result, __ATOMIC_RELAXED);
  return result;
}
template <class T>
void atomic_store_explicit(volatile atomic<T>* object, std::type_identity_t<T> value, memory_order) {
  __atomic_store(&object->value, &value, __ATOMIC_RELAXED);
}
#define EMULATOR_ATOMIC(name, result)                                                                           \
  template <class T>                                                                                            \
  T atomic_##name##_explicit(volatile atomic<T>* object, std::type_identity_t<T> b, memory_order order) {       \
    T a = atomic_load_explicit(object, order), next;                                                            \
    do {                                                                                                        \
      next = result;                                                                                            \
    } while (!__atomic_compare_exchange(&object->value, &a, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)); \
    return a;                                                                                                   \
  }
EMULATOR_ATOMIC(exchange, b)
EMULATOR_ATOMIC(fetch_add, a + b)
EMULATOR_ATOMIC(fetch_sub, a - b)
EMULATOR_ATOMIC(fetch_min, b < a ? b : a)
EMULATOR_ATOMIC(fetch_max, a < b ? b : a)
EMULATOR_ATOMIC(fetch_and, a& b)
EMULATOR_ATOMIC(fetch_or, a | b)
#undef EMULATOR_ATOMIC

}  // namespace metal
