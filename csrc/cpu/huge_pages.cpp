#include "cpu/huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace isqtorch {

#if defined(__linux__) && defined(MADV_HUGEPAGE)

void prefer_huge_pages(void* memory, int64_t bytes) {
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

#else

void prefer_huge_pages(void*, int64_t) {}

#endif

}  // namespace isqtorch
