// Where an operator runs: the device and stream of its weight, and the kernels of its format. In the emulator of the
// tests, CPU tensors take the place of CUDA's, and there are no streams.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "cuda/device.h"
#include "cuda/launch.h"
#include "ops_tensors.h"

#if defined(ISQTORCH_EMULATED)
#define ISQTORCH_DEVICE CPU
#else
#define ISQTORCH_DEVICE CUDA
// torch's header declares it only in CUDA builds; every libtorch_cuda has it.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace isqtorch::cuda {

// Makes a device the current one during its lifetime.
class Place {
 public:
  explicit Place(const Tensor& weight)
      : device_(weight.get_device_index())
#if !defined(ISQTORCH_EMULATED)
        ,
        guard_(device_)
#endif
  {
#if !defined(ISQTORCH_EMULATED)
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream_));
#endif
  }

  Stream stream() const { return stream_; }

  Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) const {
    return empty_on(device_type(), device_, shape, dtype);
  }

  // The tensor on this device with unchanged contents; the same tensor if it is there already.
  Tensor upload(const Tensor& t) const { return torch::stable::to(t, torch::stable::Device(kType, device_)); }

  // Throws CUDA's message if an earlier launch failed.
  void check_launches(const char* op) const {
    const std::string fault = take_fault();
    if (!fault.empty()) throw std::runtime_error(text(op, ": ", fault, "."));
  }

 private:
#if defined(ISQTORCH_EMULATED)
  static constexpr auto kType = torch::headeronly::DeviceType::CPU;
  static int32_t device_type() { return aoti_torch_device_type_cpu(); }
#else
  static constexpr auto kType = torch::headeronly::DeviceType::CUDA;
  static int32_t device_type() { return aoti_torch_device_type_cuda(); }
#endif

  int32_t device_;
  Stream stream_ = nullptr;
#if !defined(ISQTORCH_EMULATED)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

inline std::string device_text(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return text(t.is_cuda() ? "cuda:" : "another device:", t.get_device_index());
}

// `subject` is "x is" or "ids are".
inline void check_device(const char* op, const char* subject, const Tensor& t, const Tensor& weight) {
  if (t.is_cpu() == weight.is_cpu() && t.is_cuda() == weight.is_cuda() &&
      t.get_device_index() == weight.get_device_index()) {
    return;
  }
  check(false, op, ": ", subject, " on ", device_text(t), ", the weight on ", device_text(weight),
        ". Move one of them.");
}

// A contiguous tensor whose address is a multiple of `alignment`.
inline Tensor aligned(const Tensor& t, uintptr_t alignment) {
  const Tensor packed = dense(t);
  if (reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % alignment == 0) return packed;
  return torch::stable::clone(packed);
}

inline const FormatKernels& known_format(const char* op, const std::string& name) {
  if (const FormatKernels* format = find_format(name)) return *format;
  std::string names;
  for (int i = 0; i < format_count(); ++i) names += text(i ? ", " : "", format_at(i).name);
  throw std::invalid_argument(
      text(op, ": no CUDA kernels for the format \"", shortened(name), "\". There are kernels for ", names, "."));
}

}  // namespace isqtorch::cuda
