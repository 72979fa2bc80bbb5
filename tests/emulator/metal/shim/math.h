// MSL's arithmetic functions, as overload sets of their own: what is ambiguous in MSL is ambiguous here. None for
// bfloat.
#pragma once

#include "types.h"

namespace metal {

#define EMULATOR_INTEGERS(X) X(char) X(uchar) X(short) X(ushort) X(int) X(uint) X(long) X(ulong)
#define EMULATOR_FLOATS(X) X(half) X(float)

// A function of scalars for vectors: element by element.
#define EMULATOR_VECTOR_1(name)                            \
  template <class T, int N>                                \
  Ext<T, N> name(Ext<T, N> a) {                            \
    Ext<T, N> result;                                      \
    for (int i = 0; i < N; ++i) result[i] = name((T)a[i]); \
    return result;                                         \
  }
#define EMULATOR_VECTOR_2(name)                                     \
  template <class T, int N>                                         \
  Ext<T, N> name(Ext<T, N> a, Ext<T, N> b) {                        \
    Ext<T, N> result;                                               \
    for (int i = 0; i < N; ++i) result[i] = name((T)a[i], (T)b[i]); \
    return result;                                                  \
  }
#define EMULATOR_VECTOR_3(name)                                              \
  template <class T, int N>                                                  \
  Ext<T, N> name(Ext<T, N> a, Ext<T, N> b, Ext<T, N> c) {                    \
    Ext<T, N> result;                                                        \
    for (int i = 0; i < N; ++i) result[i] = name((T)a[i], (T)b[i], (T)c[i]); \
    return result;                                                           \
  }

#define EMULATOR_INTEGER(T)                                                                           \
  constexpr T min(T a, T b) { return b < a ? b : a; }                                                 \
  constexpr T max(T a, T b) { return a < b ? b : a; }                                                 \
  constexpr T clamp(T x, T low, T high) { return min(max(x, low), high); }                            \
  constexpr T abs(T a) { return a < 0 ? (T) - a : a; }                                                \
  constexpr T popcount(T x) { return (T)__builtin_popcountl((ulong)(std::make_unsigned_t<T>)x); }     \
  constexpr T clz(T x) {                                                                              \
    const ulong bits = (std::make_unsigned_t<T>)x;                                                    \
    return (T)(bits ? __builtin_clzl(bits) - (64 - 8 * (int)sizeof(T)) : 8 * (int)sizeof(T));         \
  }                                                                                                   \
  constexpr T ctz(T x) { return (T)(x ? __builtin_ctzl((ulong)x) : 8 * (int)sizeof(T)); }             \
  constexpr T extract_bits(T x, uint offset, uint bits) {                                             \
    if (!bits) return 0;                                                                              \
    const uint left = 8 * sizeof(T) - bits; /* an arithmetic shift extends the sign */                \
    return (T)((T)((std::make_unsigned_t<T>)((std::make_unsigned_t<T>)x >> offset) << left) >> left); \
  }                                                                                                   \
  constexpr T mulhi(T a, T b) {                                                                       \
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;                \
    return (T)((Wide)a * (Wide)b >> 8 * sizeof(T));                                                   \
  }
EMULATOR_INTEGERS(EMULATOR_INTEGER)
#undef EMULATOR_INTEGER

// A NaN is what min and max do not choose.
#define EMULATOR_FLOAT(T)                                                                 \
  inline T min(T a, T b) { return b != b ? a : a != a ? b : b < a ? b : a; }              \
  inline T max(T a, T b) { return b != b ? a : a != a ? b : a < b ? b : a; }              \
  inline T fmin(T a, T b) { return min(a, b); }                                           \
  inline T fmax(T a, T b) { return max(a, b); }                                           \
  inline T clamp(T x, T low, T high) { return min(max(x, low), high); }                   \
  inline T saturate(T x) { return clamp(x, (T)0, (T)1); }                                 \
  inline T abs(T a) { return (T)__builtin_fabsf((float)a); }                              \
  inline T fabs(T a) { return abs(a); }                                                   \
  inline T copysign(T a, T b) { return (T)__builtin_copysignf((float)a, (float)b); }      \
  inline T fma(T a, T b, T c) { return (T)__builtin_fmaf((float)a, (float)b, (float)c); } \
  inline T sign(T a) { return a > 0 ? (T)1 : a < 0 ? (T) - 1 : (T)0; }                    \
  inline T mix(T a, T b, T t) { return a + (b - a) * t; }                                 \
  inline T fmod(T a, T b) { return (T)__builtin_fmodf((float)a, (float)b); }              \
  inline T pow(T a, T b) { return (T)__builtin_powf((float)a, (float)b); }                \
  inline T ldexp(T a, int exponent) { return (T)__builtin_ldexpf((float)a, exponent); }   \
  inline bool isnan(T a) { return a != a; }                                               \
  inline bool isinf(T a) { return __builtin_isinf((float)a); }                            \
  inline bool isfinite(T a) { return __builtin_isfinite((float)a); }                      \
  inline bool signbit(T a) { return __builtin_signbit((float)a); }                        \
  inline T frexp(T a, int& exponent) { return (T)__builtin_frexpf((float)a, &exponent); }
EMULATOR_FLOATS(EMULATOR_FLOAT)
#undef EMULATOR_FLOAT

#define EMULATOR_FUNCTION(name, value)                                      \
  inline float name(float x) { return value; }                              \
  inline half name(half x_of_half) { return (half)name((float)x_of_half); } \
  EMULATOR_VECTOR_1(name)
#define EMULATOR_FUNCTIONS(X)         \
  X(floor, __builtin_floorf(x))       \
  X(ceil, __builtin_ceilf(x))         \
  X(round, __builtin_roundf(x))       \
  X(rint, __builtin_rintf(x))         \
  X(trunc, __builtin_truncf(x))       \
  X(exp, __builtin_expf(x))           \
  X(exp2, __builtin_exp2f(x))         \
  X(log, __builtin_logf(x))           \
  X(log2, __builtin_log2f(x))         \
  X(sqrt, __builtin_sqrtf(x))         \
  X(rsqrt, 1.0f / __builtin_sqrtf(x)) \
  X(sin, __builtin_sinf(x))           \
  X(cos, __builtin_cosf(x))           \
  X(tanh, __builtin_tanhf(x))         \
  X(fract, x - __builtin_floorf(x))
EMULATOR_FUNCTIONS(EMULATOR_FUNCTION)

EMULATOR_VECTOR_1(abs)
EMULATOR_VECTOR_1(fabs)
EMULATOR_VECTOR_1(sign)
EMULATOR_VECTOR_1(saturate)
EMULATOR_VECTOR_1(popcount)
EMULATOR_VECTOR_2(min)
EMULATOR_VECTOR_2(max)
EMULATOR_VECTOR_2(fmin)
EMULATOR_VECTOR_2(fmax)
EMULATOR_VECTOR_3(clamp)
EMULATOR_VECTOR_3(fma)
EMULATOR_VECTOR_3(mix)

template <class T>
requires(Shape<T>::n == 1) T select(T no, T yes, bool condition) {
  return condition ? yes : no;
}
// A comparison of vectors is true where it is not 0.
template <class T, class C, int N>
Ext<T, N> select(Ext<T, N> no, Ext<T, N> yes, Ext<C, N> condition) {
  Ext<T, N> result;
  for (int i = 0; i < N; ++i) result[i] = condition[i] ? yes[i] : no[i];
  return result;
}
template <class C, int N>
bool any(Ext<C, N> condition) {
  for (int i = 0; i < N; ++i) {
    if (condition[i]) return true;
  }
  return false;
}
template <class C, int N>
bool all(Ext<C, N> condition) {
  for (int i = 0; i < N; ++i) {
    if (!condition[i]) return false;
  }
  return true;
}
template <class T, int N>
T dot(Ext<T, N> a, Ext<T, N> b) {
  T sum = 0;
  for (int i = 0; i < N; ++i) sum += a[i] * b[i];
  return sum;
}

#define EMULATOR_SAME(name, value) using metal::name;
namespace precise {
EMULATOR_FUNCTIONS(EMULATOR_SAME)
using metal::fma;
using metal::fmod;
using metal::pow;
inline float divide(float a, float b) { return a / b; }
}  // namespace precise
namespace fast {
using namespace precise;
EMULATOR_FUNCTIONS(EMULATOR_SAME)
using metal::clamp;
using metal::fmax;
using metal::fmin;
using metal::fmod;
using metal::max;
using metal::min;
using metal::pow;
inline float divide(float a, float b) { return a / b; }
}  // namespace fast
#undef EMULATOR_SAME
#undef EMULATOR_FUNCTION
#undef EMULATOR_FUNCTIONS

}  // namespace metal
