#include "tensor_core.h"

#include <cmath>
#include <cstring>

#include "simt.h"

namespace simt {

// ---- conversions
// -------------------------------------------------------------------------------------------------------

float f16_to_f32(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  const float sign = h & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp((float)fraction, -24);
  return sign * std::ldexp((float)(1024 + fraction), exponent - 25);
}

uint16_t f32_to_f16(float f) {
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  const double magnitude = std::fabs((double)f);
  if (std::isnan(f)) return 0x7fff;
  if (magnitude >= 65520.0) return sign | 0x7c00;
  if (magnitude < 0x1p-14)
    return sign | (uint16_t)std::nearbyint(magnitude * 0x1p24);  // a carry makes it normal, rightly
  int exponent;
  std::frexp(magnitude, &exponent);                                              // magnitude = [0.5, 1) * 2^exponent
  const double fraction = std::nearbyint(std::ldexp(magnitude, 11 - exponent));  // 1024 .. 2048
  return sign | (uint16_t)(((exponent + 14) << 10) + (int)fraction - 1024);
}

float bf16_to_f32(uint16_t h) { return from_word<float>((uint32_t)h << 16); }

uint16_t f32_to_bf16(float f) {
  const uint32_t bits = (uint32_t)to_word(f);
  if (std::isnan(f)) return 0x7fff;
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// What the hardware reads and writes for a thread. A sanitizer sees calls of memcpy, but not what this file does
// itself; ThreadSanitizer is told, because it may have been asked to overlook calls (they may be Python's).
#if defined(EMULATOR_TSAN)
extern "C" {
void __tsan_read_range(void*, size_t);
void __tsan_write_range(void*, size_t);
}
inline void copy_bytes(void* to, const void* from, size_t bytes) {
  __tsan_read_range(const_cast<void*>(from), bytes);
  __tsan_write_range(to, bytes);
  std::memcpy(to, from, bytes);
}
#elif defined(EMULATOR_ASAN)
static void* (*const volatile copy_bytes)(void*, const void*, size_t) = std::memcpy;
#else
inline void copy_bytes(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
#endif

// ---- matrix products
// ---------------------------------------------------------------------------------------------------

namespace {

// Words of a lane: a in 0 .. 1, b in 2, d in 3 .. 4, the element type in 5.
void multiply_warp(Words* lanes) {
  const auto number = lanes[0][5] ? bf16_to_f32 : f16_to_f32;
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const int g = lane / 4, t = lane % 4;
    uint16_t halves[12];
    float sums[4];
    std::memcpy(halves, lanes[lane], sizeof halves);
    std::memcpy(sums, lanes[lane] + 3, sizeof sums);
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 2; ++j) a[g + 8 * (i % 2)][8 * (i / 2) + 2 * t + j] = number(halves[2 * i + j]);
      d[g + 8 * (i / 2)][2 * t + i % 2] = sums[i];
    }
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) b[8 * i + 2 * t + j][g] = number(halves[8 + 2 * i + j]);
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    float sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
    std::memcpy(lanes[lane] + 3, sums, sizeof sums);
  }
}

}  // namespace

void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bf16) {
  uint64_t words[6] = {};
  std::memcpy(words, a, sizeof a);
  std::memcpy(words + 2, b, sizeof b);
  std::memcpy(words + 3, d, sizeof d);
  words[5] = bf16;
  const Words* lanes = meet(Meeting::kMatrix, ~0u, words, 6, false, multiply_warp);
  std::memcpy(d, lanes[self->lane] + 3, sizeof d);
}

void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  if ((uintptr_t)row % 16) fail("ldmatrix: the address of a row is not a multiple of 16");
  const uint64_t word = (uintptr_t)row;
  const Words* lanes = meet(Meeting::kMatrixLoad, ~0u, &word, 1, false);
  const int lane = self->lane;
  const auto element = [&](int matrix, int at_row, int column) {
    uint16_t half;
    copy_bytes(&half, (const char*)lanes[8 * matrix + at_row][0] + 2 * column, 2);
    return (uint32_t)half;
  };
  for (int matrix = 0; matrix < 4; ++matrix) {
    const int first = lane / 4, second = 2 * (lane % 4);
    r[matrix] = transposed ? element(matrix, second, first) | element(matrix, second + 1, first) << 16
                           : element(matrix, first, second) | element(matrix, first, second + 1) << 16;
    if (lane) continue;
    uint32_t banks = 0;
    for (int i = 0; i < 8; ++i) banks |= 1u << (lanes[8 * matrix + i][0] >> 4 & 7);
    __atomic_fetch_add(&counts.matrix_loads, 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(&counts.matrix_conflicts, banks != 255, __ATOMIC_RELAXED);
  }
}

// ---- asynchronous copies
// -----------------------------------------------------------------------------------------------

namespace {

void make_copy(const Copy& copy) {
  static const char kZeros[16] = {};
  copy_bytes(copy.to, copy.keep ? copy.from : kZeros, 16);
}

}  // namespace

void copy_async(void* to, const void* from, bool keep) {
  if (((uintptr_t)to | (uintptr_t)from) % 16) fail("cp.async: an address is not a multiple of 16");
  if (options.late_copies) {
    self->copies->push_back({to, from, keep});
  } else {
    make_copy({to, from, keep});
  }
}

void end_copies() { self->copies->push_back({nullptr, nullptr, false}); }

void wait_for_copies(int newest) {
  std::vector<Copy>& pending = *self->copies;
  int groups = 0;
  for (const Copy& copy : pending) groups += !copy.to;
  size_t done = 0;
  for (int left = groups - newest; left > 0; ++done) {
    if (pending[done].to) {
      make_copy(pending[done]);
    } else {
      --left;
    }
  }
  pending.erase(pending.begin(), pending.begin() + done);
}

}  // namespace simt
