// Which instruction-set level runs, and where a format's kernels are found.
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

// Everything in this binary, best last.
const std::vector<IsaLevel>& isa_levels();

// The selected level: the best supported one, unless the environment variable ISQTORCH_CPU_ISA or select_isa chose
// another.
const KernelTable& selected_table();
std::string selection_reason();

// Throws if the level does not exist or cannot run here; "" goes back to the default choice.
void select_isa(const std::string& name);

// The position of a format in the lists of every level. Throws, listing what exists, if there is no such format.
int find_format(const char* op, const std::string& format);

}  // namespace isqtorch
