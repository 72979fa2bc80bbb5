// How codes are chosen. Every format has the default rule, some formats have others too.
#pragma once

#include <cstdint>

namespace isqtorch {

enum class Rule : uint8_t { kDefault, kMlx, kSearch };
constexpr uint8_t rule_bit(Rule rule) { return (uint8_t)(1 << (int)rule); }

}  // namespace isqtorch
