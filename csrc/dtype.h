// The float types that weights and activations come in.
#pragma once

#include <cstdint>

namespace isqtorch {

enum class Dtype : uint8_t { kF32, kF16, kBf16 };

}  // namespace isqtorch
