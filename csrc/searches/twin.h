// Two vectors that take every step together, like one vector with twice the lanes.
//
// A search adds the elements of a sum one after the other, and every addition waits for the one before. Searching two
// sub-blocks side by side fills the waiting time. The searches are written once, for a vector or a twin.
#pragma once

#include "searches/contract.h"

namespace isqtorch::ISQ_ISA {

template <class V>
struct Twin {
  V a, b;
};

template <class V>
struct Like<Twin<V>> {
  using Float = Twin<FloatOf<V>>;
  using Int = Twin<IntOf<V>>;
  using Scalar = ScalarOf<V>;
};

#define ISQ_TWIN_OPERATOR(op)                                                       \
  template <class V>                                                                \
  ISQ_INLINE auto operator op(Twin<V> x, Twin<V> y)->Twin<decltype(x.a op y.a)> {   \
    return {x.a op y.a, x.b op y.b};                                                \
  }                                                                                 \
  template <class V>                                                                \
  ISQ_INLINE auto operator op(Twin<V> x, ScalarOf<V> y)->Twin<decltype(x.a op y)> { \
    return {x.a op y, x.b op y};                                                    \
  }                                                                                 \
  template <class V>                                                                \
  ISQ_INLINE auto operator op(ScalarOf<V> x, Twin<V> y)->Twin<decltype(x op y.a)> { \
    return {x op y.a, x op y.b};                                                    \
  }
ISQ_TWIN_OPERATOR(+)
ISQ_TWIN_OPERATOR(-)
ISQ_TWIN_OPERATOR(*)
ISQ_TWIN_OPERATOR(/)
ISQ_TWIN_OPERATOR(<)
ISQ_TWIN_OPERATOR(>)
ISQ_TWIN_OPERATOR(<=)
ISQ_TWIN_OPERATOR(!=)
ISQ_TWIN_OPERATOR(&)
ISQ_TWIN_OPERATOR(|)
#undef ISQ_TWIN_OPERATOR

template <class V>
ISQ_INLINE Twin<V> operator-(Twin<V> x) {
  return {-x.a, -x.b};
}
template <class V>
ISQ_INLINE Twin<V> operator~(Twin<V> x) {
  return {~x.a, ~x.b};
}
template <class V, class W>
ISQ_INLINE Twin<V>& operator+=(Twin<V>& x, W y) {
  return x = x + y;
}
template <class V>
ISQ_INLINE Twin<V>& operator|=(Twin<V>& x, Twin<V> y) {
  return x = x | y;
}

template <class M, class V>
ISQ_INLINE Twin<V> select(Twin<M> mask, Twin<V> x, Twin<V> y) {
  return {select(mask.a, x.a, y.a), select(mask.b, x.b, y.b)};
}
template <class V>
ISQ_INLINE Twin<V> min(Twin<V> x, Twin<V> y) {
  return {min(x.a, y.a), min(x.b, y.b)};
}
template <class V>
ISQ_INLINE Twin<V> max(Twin<V> x, Twin<V> y) {
  return {max(x.a, y.a), max(x.b, y.b)};
}
template <class V>
ISQ_INLINE Twin<FloatOf<V>> as_float(Twin<V> x) {
  return {as_float(x.a), as_float(x.b)};
}
template <class V>
ISQ_INLINE Twin<IntOf<V>> as_int(Twin<V> x) {
  return {as_int(x.a), as_int(x.b)};
}
template <class M>
ISQ_INLINE bool any(Twin<M> mask) {
  return any(mask.a | mask.b);
}

// Element i of a sub-block of kCount elements, or of as many sub-blocks as T holds, which follow one another.
template <class T, int kCount>
ISQ_INLINE T get(const LaneFloats* x, int i) {
  if constexpr (sizeof(T) == sizeof(LaneFloats)) {
    return x[i];
  } else {
    using Half = decltype(T{}.a);
    return {get<Half, kCount>(x, i), get<Half, kCount>(x + kCount * (sizeof(Half) / sizeof(LaneFloats)), i)};
  }
}
template <int kCount>
ISQ_INLINE void put(LaneFloats* x, int i, LaneFloats v) {
  x[i] = v;
}
template <int kCount, class V>
ISQ_INLINE void put(LaneFloats* x, int i, Twin<V> v) {
  put<kCount>(x, i, v.a);
  put<kCount>(x + kCount * (sizeof(V) / sizeof(LaneFloats)), i, v.b);
}

}  // namespace isqtorch::ISQ_ISA
