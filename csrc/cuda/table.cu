// Every format by name, with its kernels.
#include <cstring>

#include "cuda/formats/list.cuh"
#include "cuda/launchers.cuh"

namespace isqtorch::cuda {

namespace {

template <class F>
constexpr FormatKernels kernels_of(const char* name, int block, Header header) {
  uint8_t rules = header == Header::kNone ? 0 : rule_bit(Rule::kSearch);
  if (header == Header::kScaleBiasBf16 || header == Header::kScaleBiasF16) rules |= rule_bit(Rule::kMlx);
  int bytes;
  if constexpr (F::kBlock) {
    bytes = sizeof(typename F::Block);
  } else {
    bytes = F::block_bytes(block);
  }
  return {name,
          {block, bytes, header},
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

#define ISQ_ENTRY(name, F, block, header) kernels_of<F>(name, block, header),
const FormatKernels kTable[] = {ISQ_ALL_FORMATS(ISQ_ENTRY)};

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
