// What the CPU operators share: memory, packed weights.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>

#include "cpu/dispatch.h"
#include "cpu/linear_choice.h"
#include "cpu/ops_regions.h"
#include "ops_checks.h"

namespace isqtorch {

constexpr int64_t kChunk = 1024;  // weights decoded at a time: 4 KB of f32, well inside the first-level cache

// Memory for intermediate results, aligned to a cache line.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t bytes) { grow(bytes); }

  // Provides at least this many bytes. Old contents are lost.
  void grow(int64_t bytes) {
    if (bytes <= size_) return;
    size_ = (bytes + 63) / 64 * 64;
    data_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, size_)));
    if (!data_) throw std::bad_alloc();
  }
  uint8_t* bytes() const { return data_.get(); }
  float* floats() const { return reinterpret_cast<float*>(data_.get()); }

 private:
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  std::unique_ptr<uint8_t, Free> data_;
  int64_t size_ = 0;
};

// A packed weight [..., N, row_bytes] with its sizes and kernels.
struct PackedMatrix : PackedShape {
  const KernelTable* kernels;
  const FormatKernels* format;
  LinearKernels linear;
  Tensor keep_alive;
  const uint8_t* bytes;

  PackedMatrix(const char* op, const Tensor& weight, const std::string& name, bool must_be_matrix)
      : PackedMatrix(op, weight, must_be_matrix, selected_table(), find_format(op, name)) {}

  // Weights [begin, begin + count) of a row as f32; both multiples of the block.
  void decode(int64_t row, int64_t begin, int64_t count, float* w) const {
    format->decode(bytes + row * row_bytes + begin / format->block * format->block_bytes, count / format->block, w);
  }

  // A whole row in any float type.
  void decode_row(int64_t row, Dtype dtype, uint8_t* out) const {
    alignas(64) float w[kChunk];
    for (int64_t begin = 0; begin < k; begin += kChunk) {
      const int64_t count = std::min(kChunk, k - begin);
      decode(row, begin, count, w);
      kernels->formats.store(w, count, dtype, out + begin * item_bytes(dtype));
    }
  }

 private:
  PackedMatrix(const char* op, const Tensor& weight, bool must_be_matrix, const KernelTable& table, int index)
      : PackedShape(op, weight, table.formats.formats[index].name, table.formats.formats[index].block,
                    table.formats.formats[index].block_bytes, must_be_matrix),
        kernels(&table),
        format(&table.formats.formats[index]),
        linear(linear_kernels(table, index)),
        keep_alive(dense(weight)),
        bytes(static_cast<const uint8_t*>(keep_alive.const_data_ptr())) {}
};

}  // namespace isqtorch
