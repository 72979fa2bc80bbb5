// The operator `experts_linear` on CPU tensors: sorts rows of x by expert and chooses the kernel for each expert.
//
//   ids [T, S]     3 0 | 3 7 | 0 3         (token, slot) pairs, here T = 3, S = 2
//   pairs          1 4 | 0 2 5 | 3         sorted by expert: 0 has the pairs 1 and 4, 3 has 0, 2 and 5, 7 has 3
//
// The pairs of an expert are one Product, which gathers rows of x and scatters rows of y. It uses the kernel that
// `linear` uses for this number of rows. No more than a panel of weights is ever decoded into memory.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cpu/ops_products.h"

namespace isqtorch {
namespace {

constexpr int64_t kPackedAtOnce = 1 << 24;  // bytes of x packed for the panel kernels at a time

// Some of an expert's pairs, at most as many as a kernel takes at once.
struct Unit {
  int64_t product, first, count;  // which Product, and which of its rows
};

struct ExpertsCall {
  std::vector<int64_t> pairs, x_rows;  // sorted by expert; the number of a pair is its row of y
  std::vector<int64_t> begins;    // [E + 2], indices into these; the last range has experts that are not on this device
  std::vector<float> bias;        // [products, n], or empty
  std::vector<Product> products;  // of the experts that have pairs
};

// Something that the first thread that needs it makes; the others wait for that thread.
class Once {
 public:
  // make: must not throw, and must not need what itself makes.
  template <class Make>
  void ensure(const Make& make) {
    int state = state_.load(std::memory_order_acquire);
    if (state == kMade) return;
    if (state == kNothing && state_.compare_exchange_strong(state, kBegun)) {
      make();
      state_.store(kMade, std::memory_order_release);
      return;
    }
    while (state_.load(std::memory_order_acquire) != kMade) std::this_thread::yield();
  }

 private:
  static constexpr int kNothing = 0, kBegun = 1, kMade = 2;
  std::atomic<int> state_{kNothing};
};

// Raises IndexError for an id that names no expert.
template <class Id>
void check_expert_ids(const Id* ids, int64_t tokens, int64_t slots, int64_t experts) {
  for (int64_t i = 0; i < tokens * slots; ++i) {
    const int64_t id = ids[i];
    if (id < 0 || id > experts) {
      out_of_range("experts_linear: ids[", i / slots, ", ", i % slots, "] is ", id, ", but the weight has ", experts,
                   " experts, 0 to ", experts - 1, ". Give ids of these; ", experts,
                   " marks an expert that another process holds, and adds zeros.");
    }
  }
}

// Sorts the pairs by expert, in the order of the tokens.
template <class Id>
void sort_pairs(const Id* ids, int64_t tokens, int64_t slots, int64_t experts, bool own_rows, ExpertsCall& call) {
  call.begins.assign(experts + 2, 0);
  const int64_t count = tokens * slots;
  for (int64_t i = 0; i < count; ++i) ++call.begins[ids[i] + 1];
  for (int64_t e = 0; e <= experts; ++e) call.begins[e + 1] += call.begins[e];
  std::vector<int64_t> at(call.begins.begin(), call.begins.end() - 1);
  call.pairs.resize(count);
  call.x_rows.resize(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t to = at[ids[i]]++;
    call.pairs[to] = i;
    call.x_rows[to] = own_rows ? i : i / slots;
  }
}

// Units of the row kernels. Each row of x is packed once. A unit of one row uses it in place; a larger unit copies its
// packed rows together. All of this happens where a tile first needs it, so that there is only one region: for a single
// token, a second one would take as long as a tenth of the product.
void multiply_few(const ExpertsCall& call, const std::vector<Unit>& units) {
  if (units.empty()) return;
  const Product& any = call.products.front();
  const RowKernels& kernels = *any.linear.rows;
  const int64_t bytes = kernels.packed_bytes(any.k), size = static_cast<int64_t>(units.size());

  std::vector<int64_t> places(*std::max_element(call.x_rows.begin(), call.x_rows.end()) + 1, -1), rows;  // rows of x
  std::vector<int64_t> starts(size, -1);  // where the copies of a unit begin; -1: it needs none
  int64_t copied = 0;
  for (int64_t u = 0; u < size; ++u) {
    const int64_t* x_rows = call.products[units[u].product].x_rows + units[u].first;
    for (int64_t i = 0; i < units[u].count; ++i) {
      int64_t& place = places[x_rows[i]];
      if (place < 0) {
        place = static_cast<int64_t>(rows.size());
        rows.push_back(x_rows[i]);
      }
    }
    if (units[u].count == 1) continue;
    starts[u] = copied;
    copied += slots_for(units[u].count);
  }
  const Scratch packed(rows.size() * bytes), together(copied * bytes);
  const std::unique_ptr<Once[]> row_once(new Once[rows.size()]), unit_once(new Once[size]);
  Product all = any;  // all rows of x in their order
  all.x_rows = rows.data();

  const auto packed_row = [&](int64_t place, const Scratch& x) {
    uint8_t* const to = packed.bytes() + place * bytes;
    row_once[place].ensure([&] {
      all.load(place, 1, x.floats());
      kernels.pack(x.floats(), any.k, to);
    });
    return to;
  };
  const auto packed_unit = [&](int64_t u, const Scratch& x) {
    const int64_t* const x_rows = call.products[units[u].product].x_rows + units[u].first;
    if (starts[u] < 0) return packed_row(places[*x_rows], x);
    uint8_t* const to = together.bytes() + starts[u] * bytes;
    unit_once[u].ensure([&] {
      const int64_t slots = slots_for(units[u].count);
      if (units[u].count < slots) std::memset(to, 0, slots * bytes);
      for (int64_t i = 0; i < units[u].count; ++i) {
        kernels.place(packed_row(places[x_rows[i]], x), any.k, static_cast<int>(slots), static_cast<int>(i), to);
      }
    });
    return to;
  };

  const int64_t tiles = any.row_tiles();
  parallel_tiles(size * tiles, kRowsTile * any.k, [&](int64_t begin, int64_t end) {
    thread_local Scratch x;
    x.grow(any.k * sizeof(float));
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t u = tile / tiles;
      Product p = call.products[units[u].product];
      p.x_rows += units[u].first;
      p.y_rows += units[u].first;
      p.m = units[u].count;
      multiply_row_tile(p, packed_unit(u, x), tile % tiles);
    }
  });
}

// Runs units whose rows of x are packed group by group, as many units at a time as there is room for packed rows.
//
//   pack(product, unit, first row, count, floats, out)   packs a group
//   multiply(product, unit, part, packed)                computes part 0 .. parts - 1 of the outputs of a unit
template <class Pack, class Multiply>
void multiply_grouped(const ExpertsCall& call, const std::vector<Unit>& units, int64_t group, int64_t group_bytes,
                      int64_t parts, const Pack& pack, const Multiply& multiply) {
  struct Group {
    const Unit* unit;
    int64_t first, count;
  };
  const Product& any = call.products.front();
  const int64_t room = std::max<int64_t>(kPackedAtOnce / group_bytes, kPortion / group);
  Scratch packed_x;
  for (size_t done = 0; done < units.size();) {
    std::vector<Group> groups;
    std::vector<int64_t> starts;  // of each unit in packed_x, counted in groups
    int64_t tokens = 0;
    size_t end = done;
    for (; end < units.size(); ++end) {
      const Unit& unit = units[end];
      const int64_t used = static_cast<int64_t>(groups.size());
      if (used && used + (unit.count + group - 1) / group > room) break;
      starts.push_back(used);
      for (int64_t first = 0; first < unit.count; first += group) {
        groups.push_back({&unit, unit.first + first, std::min(group, unit.count - first)});
      }
      tokens += unit.count;
    }
    const int64_t used = static_cast<int64_t>(groups.size()), count = static_cast<int64_t>(end - done);
    packed_x.grow(used * group_bytes);
    uint8_t* packed = packed_x.bytes();
    parallel_tiles(used, group * any.k, [&](int64_t begin, int64_t stop) {
      const Scratch x(group * any.k * sizeof(float));
      for (int64_t g = begin; g < stop; ++g) {
        const Unit& unit = *groups[g].unit;
        pack(call.products[unit.product], unit, groups[g].first, groups[g].count, x, packed + g * group_bytes);
      }
    });
    const int64_t weights = any.n * any.k / parts * std::max<int64_t>(tokens / count / kMaxTokens, 1);
    parallel_tiles(count * parts, weights, [&](int64_t begin, int64_t stop) {
      for (int64_t tile = begin; tile < stop; ++tile) {
        const Unit& unit = units[done + tile / parts];
        multiply(call.products[unit.product], unit, tile % parts, packed + starts[tile / parts] * group_bytes);
      }
    });
    done = end;
  }
}

// Units of the tile kernels.
void multiply_handful(const ExpertsCall& call, const std::vector<Unit>& units) {
  if (units.empty()) return;
  const Product& any = call.products.front();
  multiply_grouped(
      call, units, kTileTokens, any.linear.tiles->packed_bytes(any.k), any.row_tiles(),
      [](const Product& p, const Unit& unit, int64_t first, int64_t count, const Scratch& x, uint8_t* out) {
        pack_tile_group(p, unit.count > kPairedTokens, first, count, x, out);
      },
      [](const Product& p, const Unit& unit, int64_t tile, const uint8_t* packed) {
        multiply_tile(p, tile, unit.first, unit.count, packed);
      });
}

// Units of the panel kernels.
void multiply_many(const ExpertsCall& call, const std::vector<Unit>& units) {
  if (units.empty()) return;
  const Product& any = call.products.front();
  const PanelKernels& kernels = *any.linear.panels;
  const int64_t rows = rows_of_panel(any, static_cast<int64_t>(units.size()));
  multiply_grouped(
      call, units, kernels.token_block, kernels.packed_bytes(any.k), (any.n + rows - 1) / rows,
      [](const Product& p, const Unit&, int64_t first, int64_t count, const Scratch& x, uint8_t* out) {
        pack_token_group(p, first, count, x, out);
      },
      [rows](const Product& p, const Unit& unit, int64_t panel, const uint8_t* packed) {
        multiply_panel(p, panel * rows, rows, unit.first, unit.count, packed);
      });
}

// Chooses as `linear` does. But nothing is decoded for torch's product: the row kernels take those units.
void multiply(const ExpertsCall& call) {
  std::vector<Unit> few, handful, many;
  for (size_t e = 0; e < call.products.size(); ++e) {
    const Product& p = call.products[e];
    const LinearWay way = linear_way(p.linear, p.m);
    std::vector<Unit>& units = way == LinearWay::kPanels ? many : way == LinearWay::kTiles ? handful : few;
    const int64_t most = way == LinearWay::kPanels  ? round_up(kPortion, p.linear.panels->token_block)
                         : way == LinearWay::kTiles ? kMaxTileTokens
                                                    : kMaxTokens;
    for (int64_t first = 0; first < p.m; first += most) {
      units.push_back({static_cast<int64_t>(e), first, std::min(most, p.m - first)});
    }
  }
  multiply_few(call, few);
  multiply_handful(call, handful);
  multiply_many(call, many);
}

// The bias of those experts that have pairs.
void load_used_bias(const PackedMatrix& packed, const Tensor& bias, int64_t experts, ExpertsCall& call) {
  const Dtype dtype = *float_dtype(bias.scalar_type());
  const Tensor all = dense(bias);
  const uint8_t* const from = static_cast<const uint8_t*>(all.const_data_ptr());
  const int64_t count = static_cast<int64_t>(call.products.size());
  if (count == 0) return;
  const int64_t n = call.products.front().n;
  call.bias.resize(count * n);
  for (int64_t e = 0, i = 0; e < experts; ++e) {
    if (call.begins[e] == call.begins[e + 1]) continue;
    packed.kernels->formats.load(from + e * n * item_bytes(dtype), dtype, n, call.bias.data() + i * n);
    call.products[i].bias = call.bias.data() + i * n;
    ++i;
  }
}

Tensor experts_linear(const Tensor& x, const Tensor& weight, Text format_name, const Tensor& ids,
                      std::optional<Tensor> bias) {
  const PackedMatrix packed("experts_linear", weight, format_name, false);
  const ExpertsShape sizes(x, weight, packed, format_name, ids);
  const Dtype dtype = *float_dtype(x.scalar_type());
  const int64_t experts = sizes.experts, n = sizes.n, tokens = sizes.tokens, slots = sizes.slots;
  ExpertsCall call;
  if (bias) check_bias("experts_linear", *bias, {experts, n});

  const Tensor dense_ids = dense(ids);
  const auto with_ids = [&](const auto& use) {
    const void* const data = dense_ids.const_data_ptr();
    sizes.wide_ids ? use(static_cast<const int64_t*>(data)) : use(static_cast<const int32_t*>(data));
  };
  with_ids([&](const auto* values) { check_expert_ids(values, tokens, slots, experts); });
  Tensor y = empty({tokens, slots, n}, x.scalar_type());
  if (y.numel() == 0) return y;  // with n = 0, a stack may have more experts than there is memory to count them
  with_ids([&](const auto* values) { sort_pairs(values, tokens, slots, experts, sizes.rows_per_slot, call); });
  const Tensor dense_x = dense(x);
  Product product(packed, dtype);
  product.n = n;
  product.x = static_cast<const uint8_t*>(dense_x.const_data_ptr());
  product.y = static_cast<uint8_t*>(y.mutable_data_ptr());
  for (int64_t e = 0; e < experts; ++e) {
    Product p = product;
    p.m = call.begins[e + 1] - call.begins[e];
    if (p.m == 0) continue;
    p.w += e * n * packed.row_bytes;
    p.w_ends = e == experts - 1;
    p.x_rows = call.x_rows.data() + call.begins[e];
    p.y_rows = call.pairs.data() + call.begins[e];
    call.products.push_back(p);
  }
  if (bias) load_used_bias(packed, *bias, experts, call);
  const int64_t row_bytes = n * item_bytes(dtype);
  for (int64_t i = call.begins[experts]; i < tokens * slots; ++i) {
    std::memset(product.y + call.pairs[i] * row_bytes, 0, row_bytes);
  }
  multiply(call);
  return y;
}

}  // namespace
}  // namespace isqtorch

STABLE_TORCH_LIBRARY_IMPL(isqtorch, CPU, m) { m.impl("experts_linear", TORCH_BOX(&isqtorch::experts_linear)); }
