// Every format by name, with its kernels.
#include <cstring>

#include "cuda/formats/list.cuh"
#include "cuda/launchers.cuh"

namespace isqtorch::cuda {

namespace {

template <class F>
constexpr FormatKernels kernels_of(const char* name, Shape shape, bool has_rules = false) {
  return {name,
          shape,
          F::kAlign,
          has_rules,
          launch_decode<F>,
          kMaxLinearRows,
          launch_linear<F>,
          experts_workspace<F>,
          launch_experts<F>,
          quantize_workspace<F>,
          launch_quantize<F>};
}

template <class F>
constexpr FormatKernels kernels_of(const char* name) {
  return kernels_of<F>(name, {F::kBlock, (int)sizeof(typename F::Block)});
}

const FormatKernels kTable[] = {
    kernels_of<Q4_0>("q4_0"),
};

}  // namespace

int format_count() { return sizeof kTable / sizeof *kTable; }

const FormatKernels& format_at(int index) { return kTable[index]; }

const FormatKernels* find_format(const char* name) {
  for (const FormatKernels& format : kTable) {
    if (!std::strcmp(format.name, name)) return &format;
  }
  return nullptr;
}

}  // namespace isqtorch::cuda
