#include "cuda/device.h"

#include "cuda/gpu.h"

namespace isqtorch::cuda {

#if defined(__CUDACC__)
std::string take_fault() {
  const cudaError_t fault = cudaGetLastError();
  if (fault == cudaSuccess) return {};
  if (fault != cudaErrorNoKernelImageForDevice) return cudaGetErrorString(fault);
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return "the kernels are not compiled for this GPU, compute capability " + std::to_string(major) + "." +
         std::to_string(minor) + ". Build isqtorch with ISQTORCH_CUDA_ARCHS=" + std::to_string(10 * major + minor) +
         " (8.0 is the least), or set ISQTORCH_CUDA=0 to compute with plain PyTorch";
}

int compute_capability(int device) {
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)) {
    return 0;
  }
  return 10 * major + minor;
}

std::string toolkit_version() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}
#else
std::string take_fault() { return simt::take_error(); }

int compute_capability(int) { return 90; }

std::string toolkit_version() { return "emulator"; }
#endif

}  // namespace isqtorch::cuda
