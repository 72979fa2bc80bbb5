// How a kernel is called: its parameters are fetched from bound buffers and from the running thread.
#pragma once

#include <utility>

#include "metal/runtime.h"
#include "types.h"

namespace simt::metal {

template <class T>
T argument(const Parameter& parameter, void* const* buffers) {
  if constexpr (std::is_pointer_v<T>) {
    return static_cast<T>(buffers[parameter.index]);
  } else if constexpr (std::is_reference_v<T>) {
    return *static_cast<std::remove_reference_t<T>*>(buffers[parameter.index]);
  } else if constexpr (::metal::Shape<T>::n == 1) {
    return (T)input(parameter.input, 0);
  } else {
    T numbers;
    for (int i = 0; i < ::metal::Shape<T>::n; ++i) numbers[i] = input(parameter.input, i);
    return numbers;
  }
}

// What the compiler knows of a parameter, added to what its attributes say.
template <class T>
constexpr Parameter completed(Parameter parameter) {
  using Target = std::remove_pointer_t<std::remove_reference_t<T>>;
  if constexpr (std::is_reference_v<T>) parameter.bytes = sizeof(Target);
  if constexpr (std::is_pointer_v<T> || std::is_reference_v<T>) parameter.writes = !std::is_const_v<Target>;
  return parameter;
}

template <class Numbers, class... Ts>
struct Entry;
template <unsigned long... i, class... Ts>
struct Entry<std::integer_sequence<unsigned long, i...>, Ts...> {
  template <void (*function)(Ts...)>
  static void run(const Parameter* parameters, void* const* buffers) {
    [[clang::noinline]] function(argument<Ts>(parameters[i], buffers)...);
  }
  template <void (*function)(Ts...)>
  static Kernel make(const char* name, const Parameter* attributes, int most_threads) {
    static Parameter parameters[sizeof...(Ts) + 1] = {completed<Ts>(attributes[i])...};
    return {name, parameters, sizeof...(Ts), most_threads, &run<function>};
  }
};
template <class... Ts>
Entry<std::make_integer_sequence<unsigned long, sizeof...(Ts)>, Ts...> entry_of(void (*)(Ts...));

}  // namespace simt::metal

#define EMULATOR_KERNEL(name, attributes, most_threads, ...) \
  decltype(::simt::metal::entry_of(&__VA_ARGS__))::make<&__VA_ARGS__>(name, attributes, most_threads)
