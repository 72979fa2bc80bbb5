// Runs the CPU kernels without torch: reads cases from a file, writes what the kernels of one level make of them to
// another. tests/test_neon.py writes the cases, runs this under emulation, and compares.
//
//   driver                       prints the levels that this machine can run
//   driver LEVEL CASES RESULTS
//
// Every buffer ends at a page that may not be touched, and begins its life full of NaN.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/dispatch.h"

namespace isqtorch {
namespace {

// What a case begins with; its data follow. Numbers as in test_neon.py.
struct Case {
  char operation[16], format[16];
  int64_t dtype, rule, rows, k, tokens, weighted;
};
static_assert(sizeof(Case) == 80);

// Memory behind which there is none. The kernels' own buffers begin at multiples of 64 bytes, as torch's do.
class Guarded {
 public:
  explicit Guarded(int64_t bytes, int64_t alignment = 64) {
    constexpr int64_t kPage = 1 << 16;
    const int64_t used = (bytes + alignment - 1) / alignment * alignment, pages = (used + kPage - 1) / kPage * kPage;
    size_ = pages + kPage;
    base_ = static_cast<uint8_t*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    check(base_ != MAP_FAILED && mprotect(base_ + pages, kPage, PROT_NONE) == 0, "no memory");
    bytes_ = base_ + pages - used;
    std::memset(bytes_, 0xff, used);
  }
  ~Guarded() { munmap(base_, size_); }
  Guarded(const Guarded&) = delete;

  uint8_t* bytes() const { return bytes_; }
  float* floats() const { return reinterpret_cast<float*>(bytes_); }

 private:
  uint8_t *base_, *bytes_;
  size_t size_;
};

struct Files {
  FILE *in, *out;

  void read(void* to, int64_t bytes) const {
    check(std::fread(to, 1, bytes, in) == static_cast<size_t>(bytes), "the cases end too early");
  }
  void write(const void* from, int64_t bytes) const {
    check(std::fwrite(from, 1, bytes, out) == static_cast<size_t>(bytes), "cannot write the results");
  }
};

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

void decode(const Case& c, const FormatKernels& format, const Files& files) {
  const int64_t blocks = c.rows * c.k / format.block;
  const Guarded packed(blocks * format.block_bytes, 1), w(blocks * format.block * 4);
  files.read(packed.bytes(), blocks * format.block_bytes);
  format.decode(packed.bytes(), blocks, w.floats());
  files.write(w.bytes(), blocks * format.block * 4);
}

void quantize(const Case& c, const FormatKernels& format, const Files& files) {
  const int64_t count = c.rows * c.k, item = static_cast<Dtype>(c.dtype) == Dtype::kF32 ? 4 : 2;
  const int64_t bytes = count / format.block * format.block_bytes;
  const bool feedback = std::string(c.operation) == "feedback";
  const Guarded w(count * item, 1), importance(c.k * 4, 1), factor(feedback ? c.k * c.k * 4 : 0, 1), out(bytes, 1);
  files.read(w.bytes(), count * item);
  if (c.weighted) files.read(importance.bytes(), c.k * 4);
  if (feedback) files.read(factor.bytes(), c.k * c.k * 4);
  const ParallelFor one_by_one = [](int64_t n, int64_t, RangeFn body) {
    for (int64_t i = 0; i < n; ++i) body.call(body.context, i, i + 1);
  };
  const QuantizeJob job = {w.bytes(),
                           static_cast<Dtype>(c.dtype),
                           c.rows,
                           c.k,
                           c.weighted ? importance.floats() : nullptr,
                           static_cast<Rule>(c.rule),
                           out.bytes(),
                           one_by_one};
  const QuantizeResult result = feedback ? format.quantize_feedback({job, factor.floats(), 1}) : format.quantize(job);
  check(result.bad_weight == QuantizeResult::kNone && result.overflow_at == QuantizeResult::kNone, "bad weights");
  files.write(out.bytes(), bytes);
}

// As linear_rows in cpu/ops_linear.cpp.
void multiply_rows(const Case& c, const RowKernels& kernels, const uint8_t* w, int64_t row_bytes, const float* x,
                   float* y) {
  int step = 0;
  while (kRowSlots[step] < c.tokens) ++step;
  const int slots = kRowSlots[step];
  const int64_t bytes = kernels.packed_bytes(c.k);
  const Guarded packed(bytes * slots), one(bytes);
  std::memset(packed.bytes(), 0, bytes * slots);
  for (int64_t t = 0; t < c.tokens; ++t) {
    const Guarded row(c.k * 4);
    std::memcpy(row.bytes(), x + t * c.k, c.k * 4);
    kernels.pack(row.floats(), c.k, step ? one.bytes() : packed.bytes());
    if (step) kernels.place(one.bytes(), c.k, slots, static_cast<int>(t), packed.bytes());
  }
  const Guarded sums(c.rows * slots * 4, 1);
  kernels.multiply[step]({w, row_bytes, c.rows, c.k, true, packed.bytes(), sums.floats(), c.rows, kernels.layout});
  std::memcpy(y, sums.bytes(), c.tokens * c.rows * 4);
}

// As linear_panels there.
void multiply_panels(const Case& c, const PanelKernels& kernels, const uint8_t* w, int64_t row_bytes, const float* x,
                     float* y) {
  constexpr int64_t kStretch = 2 * kPanelStep;
  const int64_t group = kernels.token_block, groups = (c.tokens + group - 1) / group;
  const int64_t group_bytes = kernels.packed_bytes(c.k), rows = kernels.row_block;
  const Guarded packed(groups * group_bytes);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * group, count = std::min(group, c.tokens - first);
    const Guarded tokens(count * c.k * 4);
    std::memcpy(tokens.bytes(), x + first * c.k, count * c.k * 4);
    kernels.pack(tokens.floats(), static_cast<int>(count), c.k, packed.bytes() + g * group_bytes);
  }
  const Guarded panel(kernels.panel_bytes(rows, std::min(kStretch, round_up(c.k, kPanelStep))));
  const Guarded sums(rows * groups * group * 4), tile(rows * c.tokens * 4);
  for (int64_t first = 0; first < c.rows; first += rows) {
    const int64_t count = std::min(rows, c.rows - first);
    for (int64_t k = 0; k < c.k; k += kStretch) {
      const int64_t k_end = std::min(k + kStretch, c.k);
      kernels.decode({w + first * row_bytes, row_bytes, count, c.k, first + count == c.rows, k, k_end, panel.bytes(),
                      kernels.layout});
      kernels.multiply({panel.bytes(), rows, c.k, k, k_end, packed.bytes(), c.tokens, sums.floats(), k == 0});
    }
    kernels.unpack(sums.floats(), rows, c.tokens, tile.floats(), rows);
    for (int64_t t = 0; t < c.tokens; ++t) {
      std::memcpy(y + t * c.rows + first, tile.floats() + t * rows, count * 4);
    }
  }
}

// Panels where the level has some: the driver has no other product for many rows.
void linear(const Case& c, const KernelTable& table, int format, const Files& files) {
  const FormatKernels& kernels = table.formats.formats[format];
  const int64_t row_bytes = c.k / kernels.block * kernels.block_bytes;
  const Guarded w(c.rows * row_bytes, 1), x(c.tokens * c.k * 4), y(c.tokens * c.rows * 4, 1);
  files.read(w.bytes(), c.rows * row_bytes);
  files.read(x.bytes(), c.tokens * c.k * 4);
  if (c.tokens <= kMaxTokens) {
    multiply_rows(c, table.rows[format], w.bytes(), row_bytes, x.floats(), y.floats());
  } else if (table.panels && table.panels[format].name) {
    multiply_panels(c, table.panels[format], w.bytes(), row_bytes, x.floats(), y.floats());
  }
  files.write(y.bytes(), c.tokens * c.rows * 4);
}

// All 65536 values of a 16-bit type to f32, or f32 to the type.
void convert(const Case& c, const FormatTable& formats, const Files& files) {
  const Dtype dtype = static_cast<Dtype>(c.dtype);
  const Guarded floats(c.k * 4, 1), halves(c.k * 2, 1);
  if (c.operation[0] == 'l') {
    files.read(halves.bytes(), c.k * 2);
    formats.load(halves.bytes(), dtype, c.k, floats.floats());
    files.write(floats.bytes(), c.k * 4);
  } else {
    files.read(floats.bytes(), c.k * 4);
    formats.store(floats.floats(), c.k, dtype, halves.bytes());
    files.write(halves.bytes(), c.k * 2);
  }
}

void run(const Files& files) {
  const KernelTable& table = selected_table();
  Case c;
  while (std::fread(&c, sizeof c, 1, files.in) == 1) {
    const std::string operation = c.operation;
    if (operation == "load" || operation == "store") {
      convert(c, table.formats, files);
      continue;
    }
    const int format = find_format("driver", c.format);
    if (operation == "decode") decode(c, table.formats.formats[format], files);
    if (operation == "quantize" || operation == "feedback") quantize(c, table.formats.formats[format], files);
    if (operation == "linear") linear(c, table, format, files);
  }
}

}  // namespace
}  // namespace isqtorch

int main(int argc, char** argv) {
  using namespace isqtorch;
  try {
    if (argc == 1) {
      for (const IsaLevel& level : isa_levels()) {
        if (level.supported) std::printf("%s\n", level.name);
      }
      return 0;
    }
    check(argc == 4, "usage: driver [LEVEL CASES RESULTS]");
    select_isa(argv[1]);
    const Files files = {std::fopen(argv[2], "rb"), std::fopen(argv[3], "wb")};
    check(files.in && files.out, "cannot open the files");
    run(files);
    check(std::fclose(files.out) == 0, "cannot write the results");
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "driver: %s\n", error.what());
    return 1;
  }
}
