// Tensors for the CPU operators, through torch's stable ABI: types, shapes, new tensors, threads, packed weights.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "cpu/dispatch.h"
#include "cpu/linear_choice.h"

namespace isqtorch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunk = 1024;  // weights decoded at a time: 4 KB of f32, well inside the first-level cache
constexpr int64_t kWeightsPerTask = 1 << 16;  // less than this is not worth another thread

inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another type";
  }
}

inline std::optional<Dtype> float_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Dtype::kF32;
    case ScalarType::Half:
      return Dtype::kF16;
    case ScalarType::BFloat16:
      return Dtype::kBf16;
    default:
      return std::nullopt;
  }
}

inline Dtype checked_dtype(const char* op, const char* what, ScalarType dtype) {
  const auto known = float_dtype(dtype);
  check(known.has_value(), op, ": ", what, " must be one of float32, float16, bfloat16, got ", name_of(dtype), ".");
  return *known;
}

inline int64_t item_bytes(Dtype dtype) { return dtype == Dtype::kF32 ? 4 : 2; }

inline std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> shape(t.dim());
  for (int64_t i = 0; i < t.dim(); ++i) shape[i] = t.size(i);
  return shape;
}

inline std::string shape_text(const std::vector<int64_t>& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); ++i) s += text(i ? ", " : "", shape[i]);
  return s + "]";
}

// A new contiguous CPU tensor.
inline Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(shape[i], 1);
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.size(), shape.data(), strides.data(),
                                                  static_cast<int32_t>(dtype), aoti_torch_device_type_cpu(), 0,
                                                  &handle));
  return Tensor(handle);
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline void parallel(int64_t count, int64_t grain, RangeFn body) {
  torch::stable::parallel_for(0, count, grain,
                              [&](int64_t begin, int64_t end) { body.call(body.context, begin, end); });
}

// Calls body(begin, end) for ranges of [0, tiles), a tile at a time, on all threads: whoever is free takes the next
// tile, because cores differ in speed and may be shared.
template <class Body>
void parallel_tiles(int64_t tiles, int64_t weights_per_tile, const Body& body) {
  const int64_t worth = tiles * weights_per_tile / kWeightsPerTask;
  const int64_t workers = std::min<int64_t>({tiles, worth, torch::stable::get_num_threads()});
  if (workers <= 1) return body(0, tiles);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t tile = next++; tile < tiles; tile = next++) body(tile, tile + 1);
    }
  });
}

template <class Body>
void parallel_rows(int64_t rows, int64_t weights_per_row, const Body& body) {
  const int64_t grain = 1 + kWeightsPerTask / std::max<int64_t>(weights_per_row, 1);
  torch::stable::parallel_for(0, rows, grain, body);
}

// Memory for intermediate results, at a cache line's border.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t bytes) { grow(bytes); }

  // At least this many bytes; what was there is lost.
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

// A packed weight [..., N, row_bytes], understood.
struct PackedMatrix {
  const KernelTable* kernels;
  const FormatKernels* format;
  LinearKernels linear;
  Tensor keep_alive;
  const uint8_t* bytes;
  int64_t rows, row_bytes, k;

  PackedMatrix(const char* op, const Tensor& weight, const std::string& name, bool must_be_matrix)
      : kernels(&selected_table()), keep_alive(dense(weight)) {
    const int index = find_format(op, name);
    format = &kernels->formats.formats[index];
    linear = linear_kernels(*kernels, index);
    check(weight.scalar_type() == ScalarType::Byte, op, ": a packed weight is uint8, got ",
          name_of(weight.scalar_type()), ". Pack it with isqtorch.quantize.");
    check(weight.dim() == 2 || (!must_be_matrix && weight.dim() > 2), op, ": a packed weight must have ",
          must_be_matrix ? "" : "at least ", "2 dimensions [N, row_bytes], got shape ", shape_text(shape_of(weight)),
          ".");
    row_bytes = weight.size(weight.dim() - 1);
    check(row_bytes > 0 && row_bytes % format->block_bytes == 0, name, ": a packed row must be a positive multiple of ",
          format->block_bytes, " bytes, got ", row_bytes,
          ". The weight was packed in another format, or cut inside a block.");
    k = row_bytes / format->block_bytes * format->block;
    rows = weight.numel() / row_bytes;
    bytes = static_cast<const uint8_t*>(keep_alive.const_data_ptr());
  }

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
};

}  // namespace isqtorch
