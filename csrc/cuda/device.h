// What the operators ask of the device itself. No CUDA header, so that only nvcc needs them: device.cu answers, for a
// GPU and for the emulator of the tests.
#pragma once

#include <string>

namespace isqtorch::cuda {

// What went wrong since the last call, in CUDA's words; empty if nothing did. It does not wait: faults of kernels that
// still run show at a later call.
std::string take_fault();

// 90 for an H100; 0 if the device does not say. In the emulator, which is no GPU, 90.
int compute_capability(int device);

// "13.0", the toolkit that compiled this; "emulator".
std::string toolkit_version();

}  // namespace isqtorch::cuda
