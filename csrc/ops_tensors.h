// Tensors through torch's stable ABI, for the operators of every device: types, shapes, new tensors.
#pragma once

#include <algorithm>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "compiler.h"
#include "dtype.h"

// The namespace of the operators. The tests build the CUDA operators a second time under another name, for an emulator.
#ifndef ISQTORCH_OPERATORS
#define ISQTORCH_OPERATORS isqtorch
#endif
// torch's macros turn their argument into a string as it stands. Through one more macro, the argument is expanded
// first.
#define ISQTORCH_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define ISQTORCH_LIBRARY_IMPL(name, device, m) STABLE_TORCH_LIBRARY_IMPL(name, device, m)

#if defined(__linux__)
// What the last failed call to torch said. Older versions of torch, which a binary of ours may meet, lack it.
extern "C" ISQ_WEAK const char* torch_exception_get_what_without_backtrace();
#endif

namespace isqtorch {

// A string argument of an operator. torch's own conversion to std::string leaks a string per call (torch 2.10 to 2.13).
struct Text : std::string {
  using std::string::string;
};

}  // namespace isqtorch

HIDDEN_NAMESPACE_BEGIN(torch, stable, detail)

template <>
struct ToImpl<isqtorch::Text> {
  static isqtorch::Text call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = to<StringHandle>(value);
    const char* data = nullptr;
    size_t length = 0;
    const bool read = torch_string_length(handle, &length) == 0 && torch_string_c_str(handle, &data) == 0;
    isqtorch::Text text = read ? isqtorch::Text(data, length) : isqtorch::Text();
    torch_delete_string(handle);
    if (!read) throw std::runtime_error("isqtorch: torch gave no string for an argument.");
    return text;
  }
};

HIDDEN_NAMESPACE_END(torch, stable, detail)

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

// More elements than this are in no tensor, and sizes in bytes still fit into int64.
constexpr int64_t kMostElements = int64_t{1} << 60;

// MemoryError. Errors of torch cross its stable ABI without class and words.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string what) : what_(std::move(what)) {}
  const char* what() const noexcept override { return what_.c_str(); }

 private:
  std::string what_;
};

// For a failed call to torch that makes a tensor: on the CPU, only memory can be missing. On other devices, an earlier
// kernel may be the reason.
[[noreturn]] inline void refuse_allocation(const std::vector<int64_t>& shape, bool on_cpu) {
  std::string words;
#if defined(__linux__)
  if (torch_exception_get_what_without_backtrace) words = torch_exception_get_what_without_backtrace();
#endif
  words = words.substr(0, words.find('\n'));
  const std::string what =
      text("isqtorch: no memory for a tensor of shape ", shape_text(shape), words.empty() ? "" : ": ", words);
  if (on_cpu || words.find("out of memory") != std::string::npos) throw OutOfMemory(what);
  throw std::runtime_error(what);
}

// A new contiguous tensor on a device. Sizes that overflow are refused, also beside a size of zero.
inline Tensor empty_on(int32_t device_type, int32_t device, const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    const int64_t size = std::max<int64_t>(shape[i], 1);
    if (size > kMostElements / stride) {
      check(false, "isqtorch: a result of shape ", shape_text(shape),
            " is larger than any memory. Split the arguments.");
    }
    stride *= size;
  }
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(shape.size(), shape.data(), strides.data(), static_cast<int32_t>(dtype), device_type,
                               device, &handle) != 0) {
    refuse_allocation(shape, device_type == aoti_torch_device_type_cpu());
  }
  return Tensor(handle);
}

// A new contiguous CPU tensor.
inline Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) {
  return empty_on(aoti_torch_device_type_cpu(), 0, shape, dtype);
}

inline Tensor dense(const Tensor& t) {
  if (t.is_contiguous()) return t;
  try {
    return torch::stable::contiguous(t);
  } catch (const std::runtime_error&) {
    refuse_allocation(shape_of(t), t.is_cpu());
  }
}

}  // namespace isqtorch
