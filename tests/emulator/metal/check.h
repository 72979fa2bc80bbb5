// Metal's declarations for clang -std=c++14 -fsyntax-only, with real address spaces: nothing here can run.
//
// Where the shim is strict (bfloat, overload sets) this is lenient: a shader has to pass both.
#pragma once

#define kernel
#define thread
#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))

using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long;
using uchar = unsigned char;
using uint8_t = unsigned char;
using ushort = unsigned short;
using uint16_t = unsigned short;
using uint = unsigned int;
using uint32_t = unsigned int;
using ulong = unsigned long;
using uint64_t = unsigned long;
using size_t = unsigned long;
using half = _Float16;
using bfloat = __bf16;

namespace metal {

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

#define EMULATOR_INTEGERS(X) X(char) X(uchar) X(short) X(ushort) X(int) X(uint) X(long) X(ulong)
#define EMULATOR_FLOATS(X) X(half) X(float)
#define EMULATOR_VECTORS(T) \
  using T##2 = vec<T, 2>;   \
  using T##3 = vec<T, 3>;   \
  using T##4 = vec<T, 4>;
EMULATOR_INTEGERS(EMULATOR_VECTORS)
EMULATOR_FLOATS(EMULATOR_VECTORS)
EMULATOR_VECTORS(bool)
EMULATOR_VECTORS(bfloat)

template <class V, class... Parts>
V make(Parts...);

// ---- traits

template <class T, T v>
struct integral_constant {
  static constexpr T value = v;
  constexpr operator T() const { return v; }
};
template <bool v>
using bool_constant = integral_constant<bool, v>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;
template <bool condition, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  using type = T;
};
template <bool condition, class T = void>
using enable_if_t = typename enable_if<condition, T>::type;
template <bool condition, class T, class U>
struct conditional {
  using type = T;
};
template <class T, class U>
struct conditional<false, T, U> {
  using type = U;
};
template <bool condition, class T, class U>
using conditional_t = typename conditional<condition, T, U>::type;
template <class T, class U>
struct is_same : false_type {};
template <class T>
struct is_same<T, T> : true_type {};
template <class T, class U>
constexpr bool is_same_v = is_same<T, U>::value;
template <class T>
constexpr bool is_integral_v = __is_integral(T);
template <class T>
struct is_integral : bool_constant<is_integral_v<T>> {};
template <class T>
constexpr bool is_floating_point_v = __is_floating_point(T) || is_same_v<T, half> || is_same_v<T, bfloat>;
template <class T>
struct is_floating_point : bool_constant<is_floating_point_v<T>> {};
template <class T>
constexpr bool is_signed_v = __is_signed(T);
template <class T>
constexpr bool is_unsigned_v = __is_unsigned(T);
template <class T, class U>
constexpr bool is_convertible_v = __is_convertible_to(T, U);
template <class T>
using remove_cv_t = __remove_cv(T);
template <class T>
using remove_reference_t = __remove_reference_t(T);
template <class T>
using make_signed_t = __make_signed(T);
template <class T>
using make_unsigned_t = __make_unsigned(T);

template <class T>
struct numeric_limits {
  static constexpr T max() { return T(); }
  static constexpr T min() { return T(); }
  static constexpr T lowest() { return T(); }
  static constexpr T epsilon() { return T(); }
  static constexpr T infinity() { return T(); }
  static constexpr T quiet_NaN() { return T(); }
};

// ---- arithmetic

#define EMULATOR_ANY(T) \
  T min(T, T);          \
  T max(T, T);          \
  T clamp(T, T, T);     \
  T abs(T);             \
  T select(T, T, bool);
EMULATOR_INTEGERS(EMULATOR_ANY)
EMULATOR_FLOATS(EMULATOR_ANY)
#define EMULATOR_INTEGER(T)      \
  T popcount(T);                 \
  T clz(T);                      \
  T ctz(T);                      \
  T extract_bits(T, uint, uint); \
  T mulhi(T, T);
EMULATOR_INTEGERS(EMULATOR_INTEGER)
#define EMULATOR_FLOAT(T) \
  T fmin(T, T);           \
  T fmax(T, T);           \
  T saturate(T);          \
  T fabs(T);              \
  T copysign(T, T);       \
  T fma(T, T, T);         \
  T sign(T);              \
  T mix(T, T, T);         \
  T fmod(T, T);           \
  T pow(T, T);            \
  T ldexp(T, int);        \
  bool isnan(T);          \
  bool isinf(T);          \
  bool isfinite(T);       \
  bool signbit(T);        \
  T frexp(T, int&);
EMULATOR_FLOATS(EMULATOR_FLOAT)

#define EMULATOR_VECTOR_1(name) \
  template <class T, int N>     \
  vec<T, N> name(vec<T, N>);
#define EMULATOR_VECTOR_2(name) \
  template <class T, int N>     \
  vec<T, N> name(vec<T, N>, vec<T, N>);
#define EMULATOR_VECTOR_3(name) \
  template <class T, int N>     \
  vec<T, N> name(vec<T, N>, vec<T, N>, vec<T, N>);
#define EMULATOR_FUNCTION(name) \
  float name(float);            \
  half name(half);              \
  EMULATOR_VECTOR_1(name)
#define EMULATOR_FUNCTIONS(X) \
  X(floor)                    \
  X(ceil) X(round) X(rint) X(trunc) X(exp) X(exp2) X(log) X(log2) X(sqrt) X(rsqrt) X(sin) X(cos) X(tanh) X(fract)
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
template <class T, class C, int N>
vec<T, N> select(vec<T, N>, vec<T, N>, vec<C, N>);
template <class C, int N>
bool any(vec<C, N>);
template <class C, int N>
bool all(vec<C, N>);
template <class T, int N>
T dot(vec<T, N>, vec<T, N>);

#define EMULATOR_SAME(name) using metal::name;
namespace precise {
EMULATOR_FUNCTIONS(EMULATOR_SAME)
using metal::fma;
using metal::fmod;
using metal::pow;
float divide(float, float);
}  // namespace precise
namespace fast {
EMULATOR_FUNCTIONS(EMULATOR_SAME)
using metal::clamp;
using metal::fma;
using metal::fmax;
using metal::fmin;
using metal::fmod;
using metal::max;
using metal::min;
using metal::pow;
float divide(float, float);
}  // namespace fast

// ---- SIMD-groups

enum class mem_flags : int { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
mem_flags operator|(mem_flags, mem_flags);
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

#define EMULATOR_REDUCE(name) \
  template <class T>          \
  T simd_##name(T);           \
  template <class T>          \
  T quad_##name(T);
EMULATOR_REDUCE(sum)
EMULATOR_REDUCE(product)
EMULATOR_REDUCE(min)
EMULATOR_REDUCE(max)
EMULATOR_REDUCE(and)
EMULATOR_REDUCE(or)
EMULATOR_REDUCE(xor)
#define EMULATOR_SHUFFLE(name) \
  template <class T>           \
  T simd_##name(T, ushort);    \
  template <class T>           \
  T quad_##name(T, ushort);
EMULATOR_SHUFFLE(shuffle)
EMULATOR_SHUFFLE(broadcast)
EMULATOR_SHUFFLE(shuffle_xor)
EMULATOR_SHUFFLE(shuffle_down)
EMULATOR_SHUFFLE(shuffle_up)
EMULATOR_SHUFFLE(shuffle_rotate_down)
EMULATOR_SHUFFLE(shuffle_rotate_up)
#define EMULATOR_PREFIX(name)        \
  template <class T>                 \
  T simd_prefix_exclusive_##name(T); \
  template <class T>                 \
  T simd_prefix_inclusive_##name(T);
EMULATOR_PREFIX(sum)
EMULATOR_PREFIX(product)
template <class T>
T simd_broadcast_first(T);
class simd_vote {
 public:
  using vote_t = ulong;
  explicit simd_vote(vote_t);
  explicit operator vote_t() const;
  bool any() const;
  bool all() const;
};
simd_vote simd_ballot(bool);
bool simd_any(bool);
bool simd_all(bool);

template <class T, int Columns = 8, int Rows = 8>
class simdgroup_matrix {
 public:
  simdgroup_matrix();
  explicit simdgroup_matrix(T);
  vec<T, 2>& thread_elements();
  const vec<T, 2>& thread_elements() const;
};
using simdgroup_float8x8 = simdgroup_matrix<float>;
using simdgroup_half8x8 = simdgroup_matrix<half>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat>;
template <class T, int Columns, int Rows = 8>
simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T);
#define EMULATOR_MATRIX(space)                                                                    \
  template <class T>                                                                              \
  void simdgroup_load(simdgroup_matrix<T>&, const space T*, ulong = 8, ulong2 = 0, bool = false); \
  template <class T>                                                                              \
  void simdgroup_store(const simdgroup_matrix<T>&, space T*, ulong = 8, ulong2 = 0, bool = false);
EMULATOR_MATRIX(device)
EMULATOR_MATRIX(threadgroup)
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(simdgroup_matrix<D>&, const simdgroup_matrix<A>&, const simdgroup_matrix<B>&,
                                   const simdgroup_matrix<C>&);
template <class D, class A, class B>
void simdgroup_multiply(simdgroup_matrix<D>&, const simdgroup_matrix<A>&, const simdgroup_matrix<B>&);

// ---- atomics

enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T value;
};
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_float = atomic<float>;
template <class T>
using Same = typename enable_if<true, T>::type;  // not deduced
#define EMULATOR_CHANGE(space, name) \
  template <class T>                 \
  T atomic_##name##_explicit(volatile space atomic<T>*, Same<T>, memory_order);
#define EMULATOR_ATOMIC(space)                                           \
  template <class T>                                                     \
  T atomic_load_explicit(const volatile space atomic<T>*, memory_order); \
  EMULATOR_CHANGE(space, store)                                          \
  EMULATOR_CHANGE(space, exchange)                                       \
  EMULATOR_CHANGE(space, fetch_add)                                      \
  EMULATOR_CHANGE(space, fetch_sub)                                      \
  EMULATOR_CHANGE(space, fetch_min)                                      \
  EMULATOR_CHANGE(space, fetch_max)                                      \
  EMULATOR_CHANGE(space, fetch_and)                                      \
  EMULATOR_CHANGE(space, fetch_or)
EMULATOR_ATOMIC(device)
EMULATOR_ATOMIC(threadgroup)

}  // namespace metal

#define EMULATOR_GLOBAL(T) \
  using metal::T##2;       \
  using metal::T##3;       \
  using metal::T##4;
EMULATOR_INTEGERS(EMULATOR_GLOBAL)
EMULATOR_FLOATS(EMULATOR_GLOBAL)
EMULATOR_GLOBAL(bool)
EMULATOR_GLOBAL(bfloat)

template <class To, class From>
To as_type(From);

#define EMULATOR_THREADGROUP(name, ...) \
  using name##_type = __VA_ARGS__;      \
  static threadgroup name##_type name
