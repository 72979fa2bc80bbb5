// Pages of 2 MB for packed weights.
#pragma once

#include <cstdint>

namespace isqtorch {

// Asks the system to put memory that nobody has written to on pages of 2 MB. A product reads every packed weight once
// for each token, and the processor looks up one page in place of 512. Only whole pages within the memory are asked
// for, so it takes no more memory than before. Small memory, and systems other than Linux, are left alone; Linux
// follows /sys/kernel/mm/transparent_hugepage/enabled, and any refusal leaves pages of the usual size.
void prefer_huge_pages(void* memory, int64_t bytes);

}  // namespace isqtorch
