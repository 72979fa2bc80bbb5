// User faults in native code. A standard exception crosses the operator call as the Python exception of the same
// meaning: invalid_argument becomes ValueError, out_of_range IndexError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace isqtorch {

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <class... Parts>
void check(bool rule_kept, const Parts&... message) {
  if (!rule_kept) throw std::invalid_argument(text(message...));
}

// A string from outside, for a message: short, and without characters that do not print.
inline std::string shortened(const std::string& s) {
  constexpr size_t kMost = 60;
  std::string shown;
  for (const char c : s.substr(0, kMost)) shown += c < ' ' || c > '~' ? '?' : c;
  return s.size() > kMost ? shown + "..." : shown;
}

}  // namespace isqtorch
