// Barriers, and the functions that SIMD-groups and quad-groups work on together.
#pragma once

#include "math.h"
#include "metal/runtime.h"

#define EMULATOR_LINE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace metal {

enum class mem_flags : int { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((int)a | (int)b); }

inline void threadgroup_barrier(mem_flags flags, EMULATOR_LINE) {
  simt::metal::threadgroup_barrier(flags != mem_flags::mem_none, {file, line});
}
inline void simdgroup_barrier(mem_flags flags, EMULATOR_LINE) {
  simt::metal::simdgroup_barrier(flags != mem_flags::mem_none, {file, line});
}

// The values of the active lanes of a group that begins at lane `first`.
template <class T>
struct Exchange {
  const simt::metal::Lane* lanes;
  uint active;
  int first, size;

  Exchange(bool quad, const T& mine, const char* file, int line) {
    static_assert(sizeof(T) <= sizeof(simt::metal::Lane));
    static_assert(!std::is_same_v<ElementOf<T>, bfloat>, "SIMD-group functions do not exist for bfloat: use float");
    lanes = simt::metal::exchange(quad, &mine, sizeof(T), {file, line}, &active);
    first = quad ? simt::metal::lane() / 4 * 4 : 0;
    size = quad ? 4 : 32;
  }
  T operator[](int lane) const {
    T value;
    __builtin_memcpy(&value, lanes[lane], sizeof(T));
    return value;
  }
  bool has(int lane) const { return lane >= first && lane < first + size && active >> lane & 1; }

  // All values, combined as a butterfly does it: a tree, not a chain.
  template <class F>
  T reduce(F combine) const {
    T values[32];
    int n = 0;
    for (int lane = first; lane < first + size; ++lane) {
      if (has(lane)) values[n++] = (*this)[lane];
    }
    for (; n > 1; n = (n + 1) / 2) {
      for (int i = 0; i + (n + 1) / 2 < n; ++i) values[i] = combine(values[i], values[i + (n + 1) / 2]);
    }
    return values[0];
  }
};

#define EMULATOR_REDUCE(name, value)                                                      \
  template <class T>                                                                      \
  T simd_##name(T x, EMULATOR_LINE) {                                                     \
    return Exchange<T>(false, x, file, line).reduce([](T a, T b) -> T { return value; }); \
  }                                                                                       \
  template <class T>                                                                      \
  T quad_##name(T x, EMULATOR_LINE) {                                                     \
    return Exchange<T>(true, x, file, line).reduce([](T a, T b) -> T { return value; });  \
  }
EMULATOR_REDUCE(sum, a + b)
EMULATOR_REDUCE(product, a* b)
EMULATOR_REDUCE(min, min(a, b))
EMULATOR_REDUCE(max, max(a, b))
EMULATOR_REDUCE(and, a& b)
EMULATOR_REDUCE(or, a | b)
EMULATOR_REDUCE(xor, a ^ b)
#undef EMULATOR_REDUCE

// From another lane, given its place in the group; one's own value where there is none.
#define EMULATOR_SHUFFLE(name, from)                            \
  template <class T>                                            \
  T simd_##name(T x, ushort by, EMULATOR_LINE) {                \
    const Exchange<T> all(false, x, file, line);                \
    const int mine = simt::metal::lane(), size = 32, at = from; \
    return at < size && all.has(at) ? all[at] : x;              \
  }                                                             \
  template <class T>                                            \
  T quad_##name(T x, ushort by, EMULATOR_LINE) {                \
    const Exchange<T> all(true, x, file, line);                 \
    const int mine = simt::metal::lane() % 4, size = 4;         \
    const int place = from, at = all.first + place;             \
    return place >= 0 && all.has(at) ? all[at] : x;             \
  }
EMULATOR_SHUFFLE(shuffle, by + 0 * (mine + size))
EMULATOR_SHUFFLE(broadcast, by + 0 * (mine + size))
EMULATOR_SHUFFLE(shuffle_xor, (mine ^ by) + 0 * size)
EMULATOR_SHUFFLE(shuffle_down, mine + by + 0 * size)
EMULATOR_SHUFFLE(shuffle_up, mine - by + 0 * size)
EMULATOR_SHUFFLE(shuffle_rotate_down, (mine + by) % size)
EMULATOR_SHUFFLE(shuffle_rotate_up, (mine + size - by % size) % size)
#undef EMULATOR_SHUFFLE

template <class T>
T simd_broadcast_first(T x, EMULATOR_LINE) {
  const Exchange<T> all(false, x, file, line);
  return all[__builtin_ctz(all.active)];
}

// Over the lanes before this one, with or without itself.
#define EMULATOR_PREFIX(name, start, value)                         \
  template <class T>                                                \
  T simd_prefix_exclusive_##name(T x, EMULATOR_LINE) {              \
    const Exchange<T> all(false, x, file, line);                    \
    T a = (T)(start);                                               \
    for (int lane = 0; lane < simt::metal::lane(); ++lane) {        \
      const T b = all.has(lane) ? all[lane] : (T)(start);           \
      a = value;                                                    \
    }                                                               \
    return a;                                                       \
  }                                                                 \
  template <class T>                                                \
  T simd_prefix_inclusive_##name(T x, EMULATOR_LINE) {              \
    const T a = simd_prefix_exclusive_##name(x, file, line), b = x; \
    return value;                                                   \
  }
EMULATOR_PREFIX(sum, 0, a + b)
EMULATOR_PREFIX(product, 1, a* b)
#undef EMULATOR_PREFIX

class simd_vote {
 public:
  using vote_t = ulong;
  explicit constexpr simd_vote(vote_t votes) : votes_(votes) {}
  explicit constexpr operator vote_t() const { return votes_; }
  constexpr bool any() const { return votes_ != 0; }
  constexpr bool all() const { return votes_ == 0xffffffff; }

 private:
  vote_t votes_;
};
inline simd_vote simd_ballot(bool vote, EMULATOR_LINE) {
  const Exchange<int> all(false, vote, file, line);
  ulong votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (all.has(lane) && all[lane]) votes |= 1ul << lane;
  }
  return simd_vote(votes);
}
inline bool simd_any(bool vote, EMULATOR_LINE) { return simd_ballot(vote, file, line).any(); }
inline bool simd_all(bool vote, EMULATOR_LINE) { return !simd_any(!vote, file, line); }

// ---- 8x8 matrices

// Full of NaN until something is loaded: what a lane did not load is not silently zero.
template <class T, int Columns = 8, int Rows = 8>
class simdgroup_matrix {
 public:
  static_assert(Columns == 8 && Rows == 8);
  simdgroup_matrix() : elements_(make<vec<T, 2>>(__builtin_nanf(""))) {}
  explicit simdgroup_matrix(T diagonal) {
    const auto [row, column] = simt::metal::matrix_place(simt::metal::lane());
    for (int i = 0; i < 2; ++i) elements_[i] = row == column + i ? diagonal : (T)0;
  }
  vec<T, 2>& thread_elements() { return elements_; }
  const vec<T, 2>& thread_elements() const { return elements_; }

 private:
  vec<T, 2> elements_;
};
using simdgroup_float8x8 = simdgroup_matrix<float>;
using simdgroup_half8x8 = simdgroup_matrix<half>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat>;

template <class T, int Columns, int Rows = 8>
simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Columns, Rows> result;
  for (int i = 0; i < 2; ++i) result.thread_elements()[i] = value;
  return result;
}

// The index of a lane's element i in memory.
inline ulong matrix_index(int i, ulong stride, ulong2 origin, bool transpose) {
  const auto [row, column] = simt::metal::matrix_place(simt::metal::lane());
  return transpose ? (origin.x + column + i) * stride + origin.y + row
                   : (origin.y + row) * stride + origin.x + column + i;
}
template <class T>
void simdgroup_load(simdgroup_matrix<T>& matrix, const T* from, ulong stride = 8, ulong2 origin = 0,
                    bool transpose = false, EMULATOR_LINE) {
  simt::metal::check_uniform(from, stride, {file, line});
  for (int i = 0; i < 2; ++i) matrix.thread_elements()[i] = from[matrix_index(i, stride, origin, transpose)];
}
template <class T>
void simdgroup_store(const simdgroup_matrix<T>& matrix, T* to, ulong stride = 8, ulong2 origin = 0,
                     bool transpose = false, EMULATOR_LINE) {
  simt::metal::check_uniform(to, stride, {file, line});
  for (int i = 0; i < 2; ++i) to[matrix_index(i, stride, origin, transpose)] = matrix.thread_elements()[i];
}

template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(simdgroup_matrix<D>& d, const simdgroup_matrix<A>& a, const simdgroup_matrix<B>& b,
                                   const simdgroup_matrix<C>& c, EMULATOR_LINE) {
  const auto &ea = a.thread_elements(), &eb = b.thread_elements();
  const auto& ec = c.thread_elements();
  float product[2];
  simt::metal::multiply({(float)ea[0], (float)ea[1]}, {(float)eb[0], (float)eb[1]}, product, {file, line});
  const float sums[2] = {(float)ec[0] + product[0], (float)ec[1] + product[1]};
  for (int i = 0; i < 2; ++i) d.thread_elements()[i] = (D)sums[i];
}
template <class D, class A, class B>
void simdgroup_multiply(simdgroup_matrix<D>& d, const simdgroup_matrix<A>& a, const simdgroup_matrix<B>& b,
                        EMULATOR_LINE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8>((D)0.0f), file, line);
}

}  // namespace metal
