// What the operators ask of the device itself. It includes no CUDA header, so that only nvcc needs those. device.cu
// answers for a GPU and for the emulator of the tests.
#pragma once

#include <string>

namespace isqtorch::cuda {

// CUDA's message for what failed since the last call; empty if nothing did. It does not wait, so faults of kernels that
// still run are reported by a later call.
std::string take_fault();

// For example 90 for an H100; 0 if the device does not tell. The emulator answers 90.
int compute_capability(int device);

// The toolkit that compiled this, "13.0"; or "emulator".
std::string toolkit_version();

}  // namespace isqtorch::cuda
