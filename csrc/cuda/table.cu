// The table of formats: names and kernels.
#include <string>

#include "cuda/formats/list.cuh"
#include "cuda/launchers.cuh"

namespace isqtorch::cuda {

namespace {

template <class Format>
constexpr FormatKernels kernels_of(const char* name) {
  using F = typename Instance<Format>::Struct;
  constexpr Shape kShape = Instance<Format>::kShape;
  uint8_t rules = kShape.header == Header::kNone ? 0 : rule_bit(Rule::kSearch);
  if (kShape.header == Header::kScaleBiasBf16 || kShape.header == Header::kScaleBiasF16) rules |= rule_bit(Rule::kMlx);
  return {name,
          kShape,
          F::kAlign,
          rules,
          launch_decode<F>,
          kFewRows,
          kMaxLinearRows,
          kMaxW8A8Rows,
          linear_workspace<F>,
          launch_linear<F>,
          experts_workspace<F>,
          launch_experts<F>,
          quantize_workspace<F>,
          launch_quantize<F>};
}

#define ISQ_ENTRY(name, ...) kernels_of<__VA_ARGS__>(name),
const FormatKernels kTable[] = {ISQ_FORMATS(ISQ_ENTRY)};

}  // namespace

int format_count() { return sizeof kTable / sizeof *kTable; }

const FormatKernels& format_at(int index) { return kTable[index]; }

const FormatKernels* find_format(const std::string& name) {
  for (const FormatKernels& format : kTable) {
    if (name == format.name) return &format;
  }
  return nullptr;
}

}  // namespace isqtorch::cuda
