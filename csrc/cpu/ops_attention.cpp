// The operator `attention` on CPU tensors: checks, memory, threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cpu/ops_tensors.h"

namespace isqtorch {
namespace {

// Tokens of a task. It does not depend on the number of threads, so neither does the result.
constexpr int64_t kTokensPerTask = 256;

// Packed keys or values [B, H, S, row_bytes]. The rows of a head lie one after the other; heads may be anywhere.
struct States {
  Tensor keep_alive;
  const uint8_t* bytes;
  int64_t batch, heads, tokens, batch_apart, head_apart;
  AttendSide side;

  States(const char* what, const Tensor& states, const std::string& format)
      : States(what, states, selected_table().formats.formats[find_format("attention", format)]) {}

  AttendSide of(int64_t b, int64_t head, int64_t first) const {
    AttendSide part = side;
    part.rows = bytes + b * batch_apart + head * head_apart + first * side.row_bytes;
    return part;
  }

 private:
  States(const char* what, const Tensor& states, const FormatKernels& format) {
    if (states.dim() != 4) {
      check(false, "attention: ", what, " must have 4 dimensions [B, heads, tokens, row_bytes], got shape ",
            shape_text(shape_of(states)), ".");
    }
    const PackedShape shape("attention", states, format.name, format.block, format.block_bytes, false);
    if (shape.k % 32) {
      check(false, "attention: rows of ", what, " must have a multiple of 32 numbers, got ", shape.k, " of ",
            format.name, ".");
    }
    const bool in_rows = states.stride(3) == 1 && (states.stride(2) == shape.row_bytes || states.size(2) <= 1);
    keep_alive = in_rows ? states : dense(states);
    bytes = static_cast<const uint8_t*>(keep_alive.const_data_ptr());
    batch = states.size(0);
    heads = states.size(1);
    tokens = states.size(2);
    batch_apart = keep_alive.stride(0);
    head_apart = keep_alive.stride(1);
    const std::string name = format.name;
    const AttendRead read = name == "q8_0"   ? AttendRead::kQ8_0
                            : name == "q4_0" ? AttendRead::kQ4_0
                                             : AttendRead::kDecoded;
    side = {bytes, shape.row_bytes, shape.k, read, format.block_bytes, format.decode};
  }
};

// What is added to the scores, as f32, broadcast over batch, heads and queries.
struct Mask {
  std::vector<float> values;
  int64_t apart[3] = {0, 0, 0};

  Mask(const std::optional<Tensor>& mask, const std::vector<int64_t>& scores, const KernelTable& table) {
    if (!mask) return;
    bool fits = mask->dim() == 4 && mask->size(3) == scores[3];
    for (int i = 0; fits && i < 3; ++i) fits = mask->size(i) == 1 || mask->size(i) == scores[i];
    if (!fits) {
      check(false, "attention: mask must have shape ", shape_text(scores), ", or 1 in place of some of its first three",
            " sizes; got ", shape_text(shape_of(*mask)), ".");
    }
    const bool boolean = mask->scalar_type() == ScalarType::Bool;
    if (!boolean && !float_dtype(mask->scalar_type())) {
      check(false, "attention: mask must be bool or one of float32, float16, bfloat16, got ",
            name_of(mask->scalar_type()), ".");
    }
    const Tensor held = dense(*mask);
    values.resize(held.numel());
    if (boolean) {
      const uint8_t* see = static_cast<const uint8_t*>(held.const_data_ptr());
      for (size_t i = 0; i < values.size(); ++i) values[i] = see[i] ? 0.0f : -std::numeric_limits<float>::infinity();
    } else {
      table.formats.load(held.const_data_ptr(), *float_dtype(held.scalar_type()), held.numel(), values.data());
    }
    int64_t step = scores[3];
    for (int i = 3; i-- > 0; step *= mask->size(i)) apart[i] = mask->size(i) == 1 ? 0 : step;
  }

  const float* of(int64_t b, int64_t head, int64_t query) const {
    return values.data() + b * apart[0] + head * apart[1] + query * apart[2];
  }
};

int64_t power_of_two(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, Text k_format, Text v_format, double scale,
                 std::optional<Tensor> mask) {
  const Dtype dtype = checked_dtype("attention", "q", q.scalar_type());
  const States keys("k", k, k_format), values("v", v, v_format);
  check_attention(shape_of(q), shape_of(k), keys.side.dim, shape_of(v));
  const KernelTable& table = selected_table();
  const AttentionKernels& kernels = table.formats.attention;
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), tokens = keys.tokens;
  const int64_t groups = keys.heads, dim = keys.side.dim, value_dim = values.side.dim;
  Tensor out = empty({batch, heads, queries, value_dim}, q.scalar_type());
  const Mask bias(mask, {batch, heads, queries, tokens}, table);
  if (out.numel() == 0) return out;

  // The queries of the heads that share keys lie one after the other.
  const int64_t sharing = heads / groups * queries,
                tasks = std::max<int64_t>(1, (tokens + kTokensPerTask - 1) / kTokensPerTask);
  const Tensor dense_q = dense(q);
  const Scratch floats(q.numel() * sizeof(float)),
      parts(batch * groups * sharing * tasks * (value_dim + 2) * sizeof(float));
  table.formats.load(dense_q.const_data_ptr(), dtype, q.numel(), floats.floats());
  for (int64_t i = 0; i < q.numel(); ++i) floats.floats()[i] *= static_cast<float>(scale);
  const int64_t part_floats = value_dim + 2;  // the sums, what they are relative to, the sum of the weights
  const auto part_of = [&](int64_t row, int64_t task) { return parts.floats() + (row * tasks + task) * part_floats; };

  const int64_t work = std::min(tokens, kTokensPerTask) * (dim + value_dim) * power_of_two(sharing) / 2;
  parallel_tiles(batch * groups * tasks, work, [&](int64_t begin, int64_t end) {
    const int64_t most = std::min<int64_t>(kernels.most_queries, power_of_two(sharing));
    const int64_t widest = std::max(dim, value_dim);
    const Scratch own((most * (dim + value_dim + 2) + kAttendTile * widest) * sizeof(float) + 64);
    float* const buffer = own.floats();
    float* const some_q = buffer + kAttendTile * widest;
    AttendJob job;
    job.buffer = buffer;
    job.q = some_q;
    job.sums = some_q + most * dim;
    job.most = job.sums + most * value_dim;
    job.total = job.most + most;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t task = item % tasks, b = item / tasks / groups, group = item / tasks % groups;
      const int64_t first = task * kTokensPerTask;
      job.tokens = std::min(kTokensPerTask, tokens - first);
      job.keys = keys.of(b, group, first);
      job.values = values.of(b, group, first);
      for (int64_t from = 0; from < sharing; from += most) {
        const int64_t count = std::min(most, sharing - from), row = (b * groups + group) * sharing + from;
        const float* rows[8];
        for (int64_t i = 0; mask && i < count; ++i) {
          const int64_t head = group * (heads / groups) + (from + i) / queries;
          rows[i] = bias.of(b, head, (from + i) % queries) + first;
        }
        std::memcpy(some_q, floats.floats() + row * dim, count * dim * sizeof(float));
        std::memset(some_q + count * dim, 0, (power_of_two(count) - count) * dim * sizeof(float));
        job.queries = static_cast<int>(count);
        job.mask = mask ? rows : nullptr;
        kernels.attend(job);
        for (int64_t i = 0; i < count; ++i) {
          float* part = part_of(row + i, task);
          std::memcpy(part, job.sums + i * value_dim, value_dim * sizeof(float));
          part[value_dim] = job.most[i];
          part[value_dim + 1] = job.total[i];
        }
      }
    }
  });

  // Joins the tasks of each query. A query that sees nothing gets zeros, as in torch.
  uint8_t* const to = static_cast<uint8_t*>(out.mutable_data_ptr());
  parallel_rows(batch * heads * queries, tasks * value_dim, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float most = -std::numeric_limits<float>::infinity(), total = 0.0f;
      for (int64_t task = 0; task < tasks; ++task) {
        const float one = part_of(row, task)[value_dim];
        if (!(one <= most)) most = one;  // NaN wins
      }
      float* const sums = part_of(row, 0);
      for (int64_t task = 0; task < tasks; ++task) {
        const float* part = part_of(row, task);
        const float relative = part[value_dim] - most;
        const float weight = part[value_dim] == -std::numeric_limits<float>::infinity() ? 0.0f : std::exp(relative);
        total += part[value_dim + 1] * weight;
        for (int64_t i = 0; i < value_dim; ++i) sums[i] = (task ? sums[i] : 0.0f) + part[i] * weight;
      }
      const float share = total == 0.0f ? 0.0f : 1.0f / total;
      for (int64_t i = 0; i < value_dim; ++i) sums[i] *= share;
      table.formats.store(sums, value_dim, dtype, to + row * value_dim * item_bytes(dtype));
    }
  });
  return out;
}

}  // namespace
}  // namespace isqtorch

STABLE_TORCH_LIBRARY_IMPL(isqtorch, CPU, m) { m.impl("attention", TORCH_BOX(&isqtorch::attention)); }
