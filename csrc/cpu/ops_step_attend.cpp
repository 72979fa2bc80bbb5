// The operators of one token's attention on CPU tensors: its queries, keys and values, and its sums over the cache.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cpu/ops_norm.h"
#include "cpu/ops_products.h"
#include "cpu/ops_steps.h"

namespace isqtorch {
namespace {

constexpr int64_t kColumnsAtOnce = 512;    // of the cache, for each task
constexpr int64_t kProductsPerWeight = 4;  // in the time of decoding one weight; see kWeightsPerTask

// A cache of keys or values [batch, heads, columns, dim], columns of one head contiguous.
struct Stored {
  int64_t batch, heads, columns, dim, head_bytes, batch_bytes;
  uint8_t* bytes;

  Stored(const char* op, const char* what, const Tensor& t, Dtype dtype) {
    if (t.dim() != 4 || float_dtype(t.scalar_type()) != dtype) {
      check(false, op, ": ", what, " must have 4 dimensions [batch, heads, columns, dim] and the type of x, got ",
            name_of(t.scalar_type()), " ", shape_text(shape_of(t)), ".");
    }
    batch = t.size(0);
    heads = t.size(1);
    columns = t.size(2);
    dim = t.size(3);
    check(dim > 0 && t.stride(3) == 1 && t.stride(2) == dim, op, ": the columns of ", what, " must be contiguous.");
    head_bytes = t.stride(1) * item_bytes(dtype);
    batch_bytes = t.stride(0) * item_bytes(dtype);
    bytes = static_cast<uint8_t*>(t.mutable_data_ptr());
  }

  uint8_t* at(int64_t b, int64_t head, int64_t column, Dtype dtype) const {
    return bytes + b * batch_bytes + head * head_bytes + column * dim * item_bytes(dtype);
  }
};

// Angles [rows, n] as f32; one row is for the whole batch.
struct Angles {
  int64_t n, rows;
  Scratch values;

  Angles(const char* what, const Tensor& t, Dtype dtype, int64_t batch, int64_t dim) {
    check(t.dim() > 0 && float_dtype(t.scalar_type()) == dtype, "step_heads: ", what, " must have the type of x, got ",
          name_of(t.scalar_type()), ".");
    n = t.size(t.dim() - 1);
    rows = n ? t.numel() / n : 0;
    check(n > 0 && n % 2 == 0 && n <= dim && (rows == 1 || rows == batch), "step_heads: ", what,
          " must have a row for each sequence, or one for all, of an even number of at most ", dim,
          " values, got shape ", shape_text(shape_of(t)), ".");
    values.grow(rows * n * sizeof(float));
    selected_table().formats.load(dense(t).const_data_ptr(), dtype, rows * n, values.floats());
  }
  const float* of(int64_t b) const { return values.floats() + (rows == 1 ? 0 : b * n); }
};

}  // namespace

Tensor step_heads(const Tensor& x, const Tensor& cos, const Tensor& sin, Tensor keys, Tensor values, int64_t at,
                  std::optional<Tensor> q_norm, std::optional<Tensor> k_norm, double eps, int64_t style,
                  int64_t lanes) {
  const char* const op = "step_heads";
  const Dtype dtype = checked_dtype(op, "x", x.scalar_type());
  const int64_t item = item_bytes(dtype);
  const Stored k(op, "keys", keys, dtype), v(op, "values", values, dtype);
  const int64_t width = x.dim() ? x.size(x.dim() - 1) : 0, batch = width ? x.numel() / width : 0;
  check(k.batch == batch && v.batch == batch && k.heads == v.heads && k.columns == v.columns, op,
        ": keys and values must have one head and one column as the other has, and a sequence for each of the ", batch,
        " rows of x, got shapes ", shape_text(shape_of(keys)), " and ", shape_text(shape_of(values)), ".");
  check(at >= 0 && at < k.columns, op, ": there is no column ", at, " in a cache of ", k.columns, ".");
  const int64_t left = width - k.heads * (k.dim + v.dim), heads = left / k.dim;
  check(left > 0 && left % k.dim == 0, op, ": rows of x hold queries of ", k.dim, " values, ", k.heads,
        " keys and as many values; ", width, " is no such width.");
  const Angles c("cos", cos, dtype, batch, k.dim), s("sin", sin, dtype, batch, k.dim);
  check(c.n == s.n, op, ": cos and sin must have one shape, got ", c.n, " and ", s.n, " values.");
  const std::optional<Norm> of_queries = norm_of(op, q_norm, k.dim, dtype, eps, style, lanes);
  const std::optional<Norm> of_keys = norm_of(op, k_norm, k.dim, dtype, eps, style, lanes);
  Tensor q = empty({batch, heads, 1, k.dim}, x.scalar_type());
  const Tensor source = dense(x);
  const KernelTable& kernels = selected_table();
  const Scratch row(width * sizeof(float));
  for (int64_t b = 0; b < batch; ++b) {
    kernels.formats.load(static_cast<const uint8_t*>(source.const_data_ptr()) + b * width * item, dtype, width,
                         row.floats());
    for (int64_t h = 0; h < heads + k.heads; ++h) {
      float* head = row.floats() + h * k.dim;
      const std::optional<Norm>& norm = h < heads ? of_queries : of_keys;
      if (norm) norm->apply(head);
      kernels.steps->rotate(head, c.of(b), s.of(b), c.n, dtype);
      uint8_t* to = h < heads ? static_cast<uint8_t*>(q.mutable_data_ptr()) + (b * heads + h) * k.dim * item
                              : k.at(b, h - heads, at, dtype);
      kernels.formats.store(head, k.dim, dtype, to);
    }
    for (int64_t h = 0; h < v.heads; ++h) {
      kernels.formats.store(row.floats() + (heads + k.heads) * k.dim + h * v.dim, v.dim, dtype, v.at(b, h, at, dtype));
    }
  }
  return q;
}

Tensor step_attend(const Tensor& q, const Tensor& keys, const Tensor& values, int64_t first, int64_t last, double scale,
                   std::optional<Tensor> mask) {
  const char* const op = "step_attend";
  const Dtype dtype = checked_dtype(op, "q", q.scalar_type());
  const Stored k(op, "keys", keys, dtype), v(op, "values", values, dtype);
  check(q.dim() == 4 && q.size(2) == 1 && q.size(3) == k.dim && v.dim == k.dim && k.batch == q.size(0) &&
            v.batch == k.batch && k.heads == v.heads && k.heads > 0 && q.size(1) % k.heads == 0,
        op, ": q [batch, heads, 1, dim], keys and values [batch, groups, columns, dim] do not fit: got ",
        shape_text(shape_of(q)), ", ", shape_text(shape_of(keys)), " and ", shape_text(shape_of(values)), ".");
  check(first >= 0 && first < last && last <= k.columns && last <= v.columns, op, ": columns ", first, " to ", last,
        " are not in a cache of ", std::min(k.columns, v.columns), ".");
  const int64_t batch = k.batch, heads = q.size(1), group = heads / k.heads, dim = k.dim, all = last - first;
  Tensor seen = q;
  if (mask) {
    const std::vector<int64_t> one = {1, 1, 1, all}, each = {batch, 1, 1, all}, shape = shape_of(*mask);
    check(mask->scalar_type() == ScalarType::Bool && (shape == one || shape == each), op, ": the mask must be bool ",
          shape_text(each), ", got ", name_of(mask->scalar_type()), " ", shape_text(shape), ".");
    seen = dense(*mask);
  }
  const uint8_t* masks = mask ? static_cast<const uint8_t*>(seen.const_data_ptr()) : nullptr;
  const int64_t mask_rows = mask ? seen.size(0) : 1;

  // Columns on the left that a sequence does not see do not move the borders of the chunks, so a sequence has the same
  // sums in a padded batch and alone.
  std::vector<int64_t> begins(batch, 0);
  int64_t most = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const uint8_t* m = masks ? masks + (mask_rows == 1 ? 0 : b) * all : nullptr;
    while (m && begins[b] < all - 1 && !m[begins[b]]) ++begins[b];
    most = std::max(most, all - begins[b]);
  }
  const int64_t chunks = (most + kColumnsAtOnce - 1) / kColumnsAtOnce;
  const int64_t padded = round_up(dim, kStepLanes), state = 2 * group + group * padded;  // largest, sums, out
  const Scratch states(batch * k.heads * chunks * state * sizeof(float));
  const Scratch queries(batch * heads * padded * sizeof(float));
  const KernelTable& kernels = selected_table();
  const Tensor source = dense(q);
  std::memset(queries.bytes(), 0, batch * heads * padded * sizeof(float));
  for (int64_t i = 0; i < batch * heads; ++i) {
    kernels.formats.load(static_cast<const uint8_t*>(source.const_data_ptr()) + i * dim * item_bytes(dtype), dtype, dim,
                         queries.floats() + i * padded);
  }
  const int64_t columns = std::min(most, kColumnsAtOnce);
  parallel_tiles(batch * k.heads * chunks, 2 * group * columns * dim / kProductsPerWeight,
                 [&](int64_t from, int64_t to) {
                   thread_local Scratch scores, rows;
                   scores.grow(group * round_up(kColumnsAtOnce, kStepLanes) * sizeof(float));
                   rows.grow(kStepColumns * padded * sizeof(float));
                   for (int64_t task = from; task < to; ++task) {
                     const int64_t chunk = task % chunks, head = task / chunks % k.heads, b = task / chunks / k.heads;
                     const int64_t begin = begins[b] + chunk * kColumnsAtOnce;
                     StepAttendJob job;
                     float* own = states.floats() + task * state;
                     job.columns = std::clamp<int64_t>(all - begin, 0, kColumnsAtOnce);
                     job.q = queries.floats() + (b * heads + head * group) * padded;
                     job.keys = k.at(b, head, first + begin, dtype);
                     job.values = v.at(b, head, first + begin, dtype);
                     job.mask = masks ? masks + (mask_rows == 1 ? 0 : b) * all + begin : nullptr;
                     job.heads = group;
                     job.dim = dim;
                     job.padded = padded;
                     job.scale = static_cast<float>(scale);
                     job.dtype = dtype;
                     job.scores = scores.floats();
                     job.rows = rows.floats();
                     job.largest = own;
                     job.sums = own + group;
                     job.out = own + 2 * group;
                     if (job.columns > 0) {
                       kernels.steps->attend(job);
                     } else {
                       std::fill_n(own, group, -INFINITY);
                       std::fill_n(own + group, state - group, 0.0f);
                     }
                   }
                 });

  Tensor y = empty({batch, 1, heads * dim}, q.scalar_type());
  uint8_t* to = static_cast<uint8_t*>(y.mutable_data_ptr());
  const Scratch total(padded * sizeof(float));
  for (int64_t i = 0; i < batch * heads; ++i) {
    const float* own = states.floats() + i / group * chunks * state;
    const int64_t h = i % group;
    float largest = -INFINITY, sum = 0;
    for (int64_t c = 0; c < chunks; ++c) largest = std::max(largest, own[c * state + h]);
    std::fill_n(total.floats(), padded, 0.0f);
    for (int64_t c = 0; c < chunks; ++c) {
      const float* s = own + c * state;
      if (s[h] == -INFINITY) continue;  // a chunk of which nothing is seen
      const float weight = chunks == 1 ? 1.0f : std::exp(s[h] - largest);
      sum += s[group + h] * weight;
      const float* out = s + 2 * group + h * padded;
      for (int64_t j = 0; j < dim; ++j) total.floats()[j] += out[j] * weight;
    }
    // A sequence that sees nothing gets zeros, as from torch.
    for (int64_t j = 0; j < dim; ++j) total.floats()[j] = sum == 0 ? 0.0f : total.floats()[j] / sum;
    kernels.formats.store(total.floats(), dim, dtype, to + i * dim * item_bytes(dtype));
  }
  return y;
}

}  // namespace isqtorch

STABLE_TORCH_LIBRARY_IMPL(isqtorch, CPU, m) {
  m.impl("step_heads", TORCH_BOX(&isqtorch::step_heads));
  m.impl("step_attend", TORCH_BOX(&isqtorch::step_attend));
}
