// Selects the instruction-set level, and finds the kernels of a format.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace isqtorch {

struct IsaLevel {
  const char* name;
  const char* needs;  // in words
  bool supported;     // by this processor and operating system
  KernelTable table;
};

// All levels in this binary, the best one last.
const std::vector<IsaLevel>& isa_levels();

// The selected level: the best supported one, unless the environment variable ISQTORCH_CPU_ISA or select_isa chose
// another.
const KernelTable& selected_table();
std::string selection_reason();

// Throws if the level does not exist or cannot run here; "" goes back to the default choice.
void select_isa(const std::string& name);

// The index of a format in the lists of every level. Throws if there is no such format; the message lists all formats.
int find_format(const char* op, const std::string& format);

}  // namespace isqtorch
