// Quantizes on the GPU, for the formats whose rule looks at a block once; one thread per block. Formats with searches
// (K-quants, HQQ, importance) are quantized on the CPU.
//
// The arithmetic is that of csrc/cpu/formats, operation by operation, so that the bytes are the same. faults [2] gets
// the first block with a NaN or an infinity, and the first one whose 16-bit scale would be infinite.
#include "metal/formats/format.h"
#include "metal/formats/codebook.h"
#include "metal/formats/fp8.h"
#include "metal/formats/ggml32.h"
#include "metal/formats/stream.h"

constant constexpr const float kLargestFloat = 3.402823466e38f;
// Larger than any weight that a format with f16 scales can hold (csrc/cpu/quantize/blockwise.h).
constant constexpr const float kLargestWithF16Scales = 0x1p30f;

// What a format's `choose` returns for a block.
enum class Fault { none, overflow };

inline float reciprocal_or_zero(float d) {
  const float inverse = 1.0f / d;
  return fabs(inverse) <= kLargestFloat ? inverse : 0.0f;
}
// A number rounded down and clamped to 0 .. nmax; NaN gives 0.
inline int code_of(float f, int nmax) { return f > 0.0f ? int(min(f, float(nmax))) : 0; }
inline bool fits(half h) { return fabs(float(h)) <= 65504.0f; }
inline void store_f16(device uchar* p, half h) { *(device ushort*)p = as_type<ushort>(h); }
inline void store_f32(device uchar* p, float f) {
  *(device ushort*)p = ushort(as_type<uint>(f) & 0xffffu);
  *(device ushort*)(p + 2) = ushort(as_type<uint>(f) >> 16);
}
inline float largest_magnitude(const thread float* x, int count) {
  float largest = 0.0f;
  for (int i = 0; i < count; ++i) largest = max(largest, fabs(x[i]));
  return largest;
}
inline void first_min_max(const thread float* x, int count, thread float& low, thread float& high) {
  low = kLargestFloat;
  high = -kLargestFloat;
  for (int i = 0; i < count; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
}

// ---- 32 weights ----

// 4- or 5-bit codes, 0 .. 2^bits - 1.
template <int bits>
inline void store_codes(const thread int* codes, device uchar* fifths_at, device uchar* nibbles_at) {
  for (int j = 0; j < 8; ++j) {
    uint word = 0;
    for (int c = 0; c < 2; ++c) {
      word |= (uint(codes[2 * j + c] & 15) | uint(codes[2 * j + c + 16] & 15) << 4) << (8 * c);
    }
    *(device ushort*)(nibbles_at + 2 * j) = ushort(word);
  }
  if (bits == 5) {
    uint fifths = 0;
    for (int i = 0; i < 32; ++i) fifths |= uint(codes[i] >> 4 & 1) << i;
    *(device ushort*)fifths_at = ushort(fifths & 0xffffu);
    *(device ushort*)(fifths_at + 2) = ushort(fifths >> 16);
  }
}

// The rule of a format. choose(x, largest magnitude, whether to use MLX's rule, out) writes a block. x is finite, and
// if f16_scales it is within the limit above.
template <class F>
struct Quantizer;

template <int bits>
struct Quantizer<Nibbles<bits, false>> {
  static constant constexpr const bool f16_scales = true;

  static Fault choose(const thread float* x, float, int, device uchar* out) {
    constexpr int nhalf = 1 << (bits - 1);
    float extreme = 0.0f, magnitude = 0.0f;
    for (int i = 0; i < 32; ++i) {
      if (fabs(x[i]) > magnitude) {
        magnitude = fabs(x[i]);
        extreme = x[i];
      }
    }
    const float d = extreme / float(-nhalf), inverse = reciprocal_or_zero(d);
    int codes[32];
    for (int i = 0; i < 32; ++i) {
      const float scaled = x[i] * inverse;
      codes[i] = code_of(scaled + (float(nhalf) + 0.5f), 2 * nhalf - 1);
    }
    const half stored = half(d);
    store_f16(out, stored);
    store_codes<bits>(codes, out + 2, out + (bits == 5 ? 6 : 2));
    return fits(stored) ? Fault::none : Fault::overflow;
  }
};

template <int bits>
struct Quantizer<Nibbles<bits, true>> {
  static constant constexpr const bool f16_scales = true;

  static Fault choose(const thread float* x, float, int, device uchar* out) {
    constexpr int nmax = (1 << bits) - 1;
    float low, high;
    first_min_max(x, 32, low, high);
    const float d = (high - low) / float(nmax), inverse = reciprocal_or_zero(d);
    int codes[32];
    for (int i = 0; i < 32; ++i) {
      const float scaled = (x[i] - low) * inverse;
      codes[i] = code_of(scaled + 0.5f, nmax);
    }
    const half stored = half(d), offset = half(low);
    store_f16(out, stored);
    store_f16(out + 2, offset);
    store_codes<bits>(codes, out + 4, out + (bits == 5 ? 8 : 4));
    return fits(stored) && fits(offset) ? Fault::none : Fault::overflow;
  }
};

template <bool sums>
struct Quantizer<Bytes<sums>> {
  static constant constexpr const bool f16_scales = true;

  static Fault choose(const thread float* x, float largest, int, device uchar* out) {
    const float d = largest / 127.0f, inverse = reciprocal_or_zero(d);
    int sum = 0, codes[32];
    for (int i = 0; i < 32; ++i) {  // half away from zero
      const float scaled = x[i] * inverse, whole = trunc(fabs(scaled));
      const float up = fabs(scaled) - whole >= 0.5f ? whole + 1.0f : whole;
      codes[i] = int(scaled < 0.0f ? -up : up);
      sum += codes[i];
    }
    const half stored = half(d);
    store_f16(out, stored);
    if (sums) store_f16(out + 2, half(d * float(sum)));
    for (int j = 0; j < 16; ++j) {
      *(device ushort*)(out + (sums ? 4 : 2) + 2 * j) =
          ushort(uint(codes[2 * j] & 255) | uint(codes[2 * j + 1] & 255) << 8);
    }
    return fits(stored) ? Fault::none : Fault::overflow;
  }
};

// ---- AFQ ----

// A 16-bit number: its bits and its value.
struct Rounded {
  ushort bits;
  float value;
};
inline Rounded round_f16(float f) {
  const half h = half(f);
  return {as_type<ushort>(h), float(h)};
}
inline Rounded round_bf16(float f) {
  const uint bits = as_type<uint>(f);
  const ushort top = ushort((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  return {top, as_type<float>(uint(top) << 16)};
}
// To f16, subnormal results away from zero: these are so coarse that a scale rounded down would cut off much of the
// range.
inline Rounded round_scale_f16(float f) {
  Rounded r = round_f16(f);
  if (fabs(r.value) < fabs(f) && fabs(f) < 0x1p-14f) {
    ++r.bits;
    r.value = float(as_type<half>(r.bits));
  }
  return r;
}

template <int bits, int group, Header header>
struct Quantizer<Stream<bits, group, header>> {
  static constant constexpr const bool f16_scales = header == Header::scale_bias_f16;

  static Fault choose(const thread float* x, float, int as_mlx, device uchar* out) {
    constexpr int nmax = (1 << bits) - 1;
    constexpr bool f16 = f16_scales;
    float low, high;
    first_min_max(x, group, low, high);
    const bool negative = fabs(low) > fabs(high);
    float scale = max((high - low) / float(nmax), 1e-7f);
    scale = negative ? scale : -scale;
    const float edge = negative ? low : high, steps = rint(edge / scale);
    scale = steps != 0.0f ? edge / steps : scale;
    float bias = steps != 0.0f ? edge : 0.0f;
    const Rounded stored = !f16 ? round_bf16(scale) : as_mlx ? round_f16(scale) : round_scale_f16(scale);
    const Rounded offset = f16 ? round_f16(bias) : round_bf16(bias);
    if (!as_mlx) {
      scale = stored.value;
      bias = offset.value;
    }
    *(device ushort*)out = stored.bits;
    *(device ushort*)(out + 2) = offset.bits;
    ulong stream = 0;  // bits that are not written yet
    int waiting = 0, at = 4;
    for (int i = 0; i < group; ++i) {
      stream |= ulong(code_of(rint((x[i] - bias) / scale), nmax)) << waiting;
      waiting += bits;
      while (waiting >= 16) {
        *(device ushort*)(out + at) = ushort(stream & 0xffffu);
        stream >>= 16;
        waiting -= 16;
        at += 2;
      }
    }
    const bool kept = fabs(stored.value) <= kLargestFloat && fabs(offset.value) <= kLargestFloat;
    return kept ? Fault::none : Fault::overflow;
  }
};

// ---- FP8 ----

template <>
struct Quantizer<Fp8> {
  static constant constexpr const bool f16_scales = false;

  // To nearest even, saturating.
  static uint encode(float f) {
    const float magnitude = min(fabs(f), 448.0f);
    const uint bits = as_type<uint>(magnitude);
    const uint normal = ((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3);
    const uint subnormal = uint(rint(magnitude * 512.0f));
    return (magnitude < 0x1p-6f ? subnormal : normal) | (as_type<uint>(f) >> 24 & 0x80u);
  }
  static Fault choose(const thread float* x, float largest, int, device uchar* out) {
    const float scale = largest == 0.0f ? 1.0f : max(largest / 448.0f, 1.17549435e-38f);
    store_f32(out, scale);
    for (int j = 0; j < 64; ++j) {
      *(device ushort*)(out + 4 + 2 * j) = ushort(encode(x[2 * j] / scale) | encode(x[2 * j + 1] / scale) << 8);
    }
    return Fault::none;
  }
};

// ---- mxfp4 ----

template <>
struct Quantizer<MXFP4> {
  static constant constexpr const bool f16_scales = false;

  // floor(log2(largest)) - 2 + 127, as in csrc/searches/codebook.h: just below a power of two, the logarithm rounds up.
  static int exponent_of(float largest) {
    const uint bits = as_type<uint>(largest);
    const int above = int(bits >> 23) - 126, n = above > 0 ? above - 1 : -above;
    const float units = float(0x800000u - (bits & 0x7fffffu));
    const float spacing = as_type<float>(as_type<uint>(float(n)) & 0x7f800000u);
    const int e = above + 124 + (units <= 0.6931472f * spacing ? 1 : 0);
    return largest > 0.0f ? max(e, 0) : 0;
  }
  static uint code(float f, float step) {
    const float magnitude = fabs(f);
    uint nearest = 0;
    for (int i = 1; i < 8; ++i) {
      nearest += magnitude > step * (0.5f * (kE2m1Levels[i - 1] + kE2m1Levels[i])) ? 1u : 0u;
    }
    return nearest > 0u && f < 0.0f ? nearest | 8u : nearest;
  }
  static Fault choose(const thread float* x, float largest, int, device uchar* out) {
    const int e = exponent_of(largest);
    const float step = MXFP4::power(uint(e));
    out[0] = uchar(e);
    for (int j = 0; j < 16; ++j) out[1 + j] = uchar(code(x[j], step) | code(x[j + 16], step) << 4);
    return Fault::none;
  }
};

// weight [blocks * F::block] -> out. faults [2] are preset to `blocks`.
template <class F, class T>
kernel void quantize(const device T* weight [[buffer(0)]], device uchar* out [[buffer(1)]],
                     device atomic_int* faults [[buffer(2)]], constant int& as_mlx [[buffer(3)]],
                     constant int& blocks [[buffer(4)]], uint block [[thread_position_in_grid]]) {
  if (int(block) >= blocks) return;
  float x[F::block];
  bool finite = true;
  for (int i = 0; i < F::block; ++i) {
    x[i] = float(weight[ulong(block) * F::block + ulong(i)]);
    finite = finite && (as_type<uint>(x[i]) & 0x7f800000u) != 0x7f800000u;
  }
  if (!finite) {
    atomic_fetch_min_explicit(&faults[0], int(block), memory_order_relaxed);
    return;
  }
  const float largest = largest_magnitude(x, F::block);
  Fault fault = Fault::overflow;
  if (!Quantizer<F>::f16_scales || largest <= kLargestWithF16Scales) {
    fault = Quantizer<F>::choose(x, largest, as_mlx, out + ulong(block) * F::bytes);
  }
  if (fault != Fault::none) atomic_fetch_min_explicit(&faults[1], int(block), memory_order_relaxed);
}
