// Weights as floats: all rows, or the rows that ids select.
#include "metal/formats/format.h"

// out [rows, k]; one thread per unit.
template <class F, class T>
kernel void dequantize(const device uchar* weight [[buffer(0)]], device T* out [[buffer(1)]],
                       constant int& k [[buffer(2)]], uint2 thread_at [[thread_position_in_grid]]) {
  const int unit = int(thread_at.x), place = place_of<F>(unit);
  float w[F::unit];
  decode<F>(weight + thread_at.y * row_bytes<F>(k), unit, w);
  device T* row = out + ulong(thread_at.y) * ulong(k);
  for (int i = 0; i < F::unit; ++i) row[place + F::offset(i)] = T(w[i]);
}

// out [count, k] = the rows ids [count] of the weight; NaN for an id that is out of range.
template <class F, class T, class Id>
kernel void embedding(const device uchar* weight [[buffer(0)]], const device Id* ids [[buffer(1)]],
                      device T* out [[buffer(2)]], constant int& k [[buffer(3)]], constant int& rows [[buffer(4)]],
                      uint2 thread_at [[thread_position_in_grid]]) {
  const int unit = int(thread_at.x), place = place_of<F>(unit);
  const Id id = ids[thread_at.y];
  float w[F::unit];
  if (id >= 0 && id < Id(rows)) {
    decode<F>(weight + ulong(id) * row_bytes<F>(k), unit, w);
  } else {
    for (int i = 0; i < F::unit; ++i) w[i] = NAN;
  }
  device T* row = out + ulong(thread_at.y) * ulong(k);
  for (int i = 0; i < F::unit; ++i) row[place + F::offset(i)] = T(w[i]);
}

