// Tensors through torch's stable ABI, for the operators of every device: types, shapes, new tensors.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "dtype.h"

// The namespace of the operators. The tests build the CUDA operators a second time under another name, for an emulator.
#ifndef ISQTORCH_OPERATORS
#define ISQTORCH_OPERATORS isqtorch
#endif
// torch's macros turn their argument into a string as it stands. Through one more macro, the argument is expanded
// first.
#define ISQTORCH_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define ISQTORCH_LIBRARY_IMPL(name, device, m) STABLE_TORCH_LIBRARY_IMPL(name, device, m)

namespace isqtorch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

// A new contiguous tensor on a device.
inline Tensor empty_on(int32_t device_type, int32_t device, const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(shape[i], 1);
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.size(), shape.data(), strides.data(),
                                                  static_cast<int32_t>(dtype), device_type, device, &handle));
  return Tensor(handle);
}

// A new contiguous CPU tensor.
inline Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) {
  return empty_on(aoti_torch_device_type_cpu(), 0, shape, dtype);
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

}  // namespace isqtorch
