// The operator that collects importance: sums of squares per column, in one pass over what flows into a layer.
#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cpu/ops_tensors.h"

namespace isqtorch {
namespace {

constexpr int64_t kSquaresPerWeight = 8;  // squares take the time of decoding one weight; see kWeightsPerTask

// The groups of each row, [rows, slots], as int64. Without such a tensor, every row is in group 0.
struct Groups {
  Tensor keep_alive;
  bool given = false;
  const int64_t* ids = nullptr;  // null also for a tensor without elements
  int64_t slots = 1;

  Groups(const std::optional<Tensor>& groups, const Tensor& x) : keep_alive(x) {
    if (!groups) return;
    keep_alive = dense(torch::stable::to(*groups, ScalarType::Long));
    given = true;
    ids = static_cast<const int64_t*>(keep_alive.const_data_ptr());
    slots = groups->size(1);
  }
};

Tensor square_sums(const Tensor& x, std::optional<Tensor> groups, int64_t count) {
  const Dtype dtype = checked_dtype("square_sums", "x", x.scalar_type());
  check_square_sums(x, groups, count);
  const int64_t columns = x.size(x.dim() - 1), rows = x.numel() / columns;
  const Groups group_of(groups, x);
  const Tensor source = dense(x);
  const uint8_t* from = static_cast<const uint8_t*>(source.const_data_ptr());
  Tensor out = empty({count, columns}, ScalarType::Float);
  float* sums = static_cast<float*>(out.mutable_data_ptr());
  std::fill_n(sums, count * columns, 0.0f);
  const auto add_squares = selected_table().formats.add_squares;
  const int64_t item = item_bytes(dtype), stride = columns * item;

  // Each thread has its own columns, so that every sum is added in the same order for any number of threads.
  const int64_t threads = std::max<int64_t>(torch::stable::get_num_threads(), 1);
  const int64_t width = std::min(((columns + threads - 1) / threads + 63) / 64 * 64, kChunk);
  const int64_t work = rows * width * group_of.slots / kSquaresPerWeight;
  parallel_tiles((columns + width - 1) / width, work, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * width; first < std::min(end * width, columns); first += width) {
      const int64_t n = std::min(width, columns - first);
      if (!group_of.given) {
        add_squares(from + first * item, dtype, stride, rows, n, sums + first);
        continue;
      }
      for (int64_t i = 0; i < rows * group_of.slots; ++i) {
        const int64_t group = group_of.ids[i], row = i / group_of.slots;
        if (group < 0 || group >= count) continue;  // the expert is not on this device
        add_squares(from + row * stride + first * item, dtype, stride, 1, n, sums + group * columns + first);
      }
    }
  });
  return out;
}

}  // namespace
}  // namespace isqtorch

STABLE_TORCH_LIBRARY_IMPL(isqtorch, CPU, m) { m.impl("square_sums", TORCH_BOX(&isqtorch::square_sums)); }
