// MSL's types: scalars, bfloat, vectors, and what is known about them.
//
// Vectors are clang's own, which know swizzles and refuse to mix element types, as MSL does. translate.py turns their
// constructors, float4(a, b), into metal::make<float4>(a, b).
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;
using size_t = unsigned long;
using half = _Float16;

// Converts to float by itself, and to everything else from there; nothing converts to it by itself.
struct bfloat {
  uint16_t bits;

  bfloat() = default;
  template <class T>
  requires(std::is_arithmetic_v<T> || std::is_same_v<T, half>) explicit constexpr bfloat(T value)
      : bits(rounded((float)value)) {}
  constexpr operator float() const { return __builtin_bit_cast(float, (uint32_t)bits << 16); }
  constexpr bfloat operator-() const { return bfloat(-(float)*this); }
  bfloat& operator+=(float other) { return *this = bfloat(*this + other); }
  bfloat& operator-=(float other) { return *this = bfloat(*this - other); }
  bfloat& operator*=(float other) { return *this = bfloat(*this * other); }
  bfloat& operator/=(float other) { return *this = bfloat(*this / other); }

 private:
  static constexpr uint16_t rounded(float value) {
    const uint32_t all = __builtin_bit_cast(uint32_t, value);
    if ((all & 0x7fffffff) > 0x7f800000) return (uint16_t)(all >> 16 | 0x40);
    return (uint16_t)((all + 0x7fff + (all >> 16 & 1)) >> 16);
  }
};

// bfloat with bfloat, or with an integer, is bfloat; with half it does not exist.
#define EMULATOR_BFLOAT(op)                                                                 \
  constexpr bfloat operator op(bfloat a, bfloat b) { return bfloat((float)a op(float) b); } \
  template <class T>                                                                        \
  requires std::is_integral_v<T> constexpr bfloat operator op(bfloat a, T b) {              \
    return a op bfloat(b);                                                                  \
  }                                                                                         \
  template <class T>                                                                        \
  requires std::is_integral_v<T> constexpr bfloat operator op(T a, bfloat b) {              \
    return bfloat(a) op b;                                                                  \
  }                                                                                         \
  template <class T>                                                                        \
  requires std::is_same_v<T, half> void operator op(bfloat, T) = delete;                    \
  template <class T>                                                                        \
  requires std::is_same_v<T, half> void operator op(T, bfloat) = delete;
EMULATOR_BFLOAT(+)
EMULATOR_BFLOAT(-)
EMULATOR_BFLOAT(*)
EMULATOR_BFLOAT(/)
#undef EMULATOR_BFLOAT

namespace metal {

using std::bool_constant;
using std::conditional;
using std::conditional_t;
using std::enable_if;
using std::enable_if_t;
using std::false_type;
using std::integral_constant;
using std::is_convertible_v;
using std::is_integral;
using std::is_integral_v;
using std::is_same;
using std::is_same_v;
using std::is_signed_v;
using std::is_unsigned_v;
using std::make_signed_t;
using std::make_unsigned_t;
using std::remove_cv_t;
using std::remove_reference_t;
using std::true_type;
template <class T>
inline constexpr bool is_floating_point_v =
    std::is_floating_point_v<T> || std::is_same_v<T, half> || std::is_same_v<T, bfloat>;
template <class T>
struct is_floating_point : bool_constant<is_floating_point_v<T>> {};

template <class T>
struct numeric_limits : std::numeric_limits<T> {};
#define EMULATOR_LIMITS(T, largest, smallest, step)                  \
  template <>                                                        \
  struct numeric_limits<T> {                                         \
    static constexpr T max() { return T(largest); }                  \
    static constexpr T lowest() { return T(-largest); }              \
    static constexpr T min() { return T(smallest); }                 \
    static constexpr T epsilon() { return T(step); }                 \
    static constexpr T infinity() { return T(__builtin_inff()); }    \
    static constexpr T quiet_NaN() { return T(__builtin_nanf("")); } \
  };
EMULATOR_LIMITS(half, 65504.0f, 0x1p-14f, 0x1p-10f)
EMULATOR_LIMITS(bfloat, 0x1.fep127f, 0x1p-126f, 0x1p-7f)
#undef EMULATOR_LIMITS

// ---- vectors

template <int N>
struct alignas(N == 2 ? 4 : 8) BfloatVector {
  bfloat elements[N];
  bfloat& operator[](int i) { return elements[i]; }
  const bfloat& operator[](int i) const { return elements[i]; }
};

template <class T, int N>
using Ext = T __attribute__((ext_vector_type(N)));
template <class T, int N>
struct VectorOf {
  using type = Ext<T, N>;
};
template <int N>
struct VectorOf<bfloat, N> {
  using type = BfloatVector<N>;
};
template <class T, int N>
using vec = typename VectorOf<T, N>::type;

// The element type and the number of elements of a scalar or vector.
template <class T>
struct Shape {
  using Element = T;
  static constexpr int n = 1;
};
template <class T, int N>
struct Shape<Ext<T, N>> {
  using Element = T;
  static constexpr int n = N;
};
template <int N>
struct Shape<BfloatVector<N>> {
  using Element = bfloat;
  static constexpr int n = N;
};
template <class T>
using ElementOf = typename Shape<T>::Element;

// A vector's constructor: from one scalar for all elements, from a vector of as many, or from parts.
template <class V, class... Parts>
V make(const Parts&... parts) {
  using Element = ElementOf<V>;
  constexpr int n = Shape<V>::n;
  V result;
  int at = 0;
  const auto put = [&]<class Part>(const Part& part) {
    if constexpr (Shape<Part>::n == 1) {
      result[at++] = (Element)part;
    } else {
      for (int i = 0; i < Shape<Part>::n; ++i) result[at++] = (Element)part[i];
    }
  };
  (put(parts), ...);
  constexpr bool all = (Shape<Parts>::n + ... + 0) == n, one = sizeof...(Parts) == 1 && (Shape<Parts>::n + ...) == 1;
  static_assert(all || one, "as many elements as the vector has, or one for all of them");
  if constexpr (one) {
    for (int i = 1; i < n; ++i) result[i] = result[0];
  }
  return result;
}

#define EMULATOR_TYPES(X) X(bool) X(char) X(uchar) X(short) X(ushort) X(int) X(uint) X(long) X(ulong) X(half) X(float)
#define EMULATOR_VECTORS(T) \
  using T##2 = vec<T, 2>;   \
  using T##3 = vec<T, 3>;   \
  using T##4 = vec<T, 4>;
EMULATOR_TYPES(EMULATOR_VECTORS)
EMULATOR_VECTORS(bfloat)
#undef EMULATOR_VECTORS

}  // namespace metal

// Names of types are global in MSL.
#define EMULATOR_GLOBAL(T) \
  using metal::T##2;       \
  using metal::T##3;       \
  using metal::T##4;
EMULATOR_TYPES(EMULATOR_GLOBAL)
EMULATOR_GLOBAL(bfloat)
#undef EMULATOR_GLOBAL
#undef EMULATOR_TYPES

template <class To, class From>
To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type: types of one size");
  return __builtin_bit_cast(To, value);
}
