#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <unordered_map>

#include "check.h"
#include "compiler.h"
#include "cpu/steps.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace isqtorch {
namespace {

struct Selection {
  const KernelTable* table;
  std::string reason;
};

std::string level_names() {
  std::string names;
  for (const IsaLevel& level : isa_levels()) {
    names += text(names.empty() ? "" : ", ", level.name, level.supported ? "" : " (not on this machine)");
  }
  return names;
}

const IsaLevel& level_called(const std::string& name, const char* who) {
  for (const IsaLevel& level : isa_levels()) {
    if (name != level.name) continue;
    check(level.supported, who, ": this machine cannot run \"", name, "\", which needs ", level.needs,
          ". Levels: ", level_names(), ".");
    return level;
  }
  throw std::invalid_argument(text(who, ": no instruction-set level \"", name, "\". Levels: ", level_names(), "."));
}

Selection default_selection() {
  const char* forced = std::getenv("ISQTORCH_CPU_ISA");
  if (forced && *forced) {
    return {&level_called(forced, "ISQTORCH_CPU_ISA").table, "chosen by the environment variable ISQTORCH_CPU_ISA"};
  }
  const IsaLevel* best = nullptr;
  for (const IsaLevel& level : isa_levels()) {
    if (level.supported) best = &level;
  }
  return {&best->table, text("the best level this machine supports (", best->needs, ")")};
}

std::mutex selection_mutex;
std::string current_reason;
std::atomic<const KernelTable*> current_table{nullptr};

void set_selection(Selection selection) {
  current_reason = std::move(selection.reason);
  current_table.store(selection.table, std::memory_order_release);
}

#if defined(__x86_64__)
// Linux grants the tile registers of AMX only on request, to the whole process.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// The compiler's detection also asks the operating system. It does not know AVX-VNNI and AMX yet.
struct X86Features {
  bool avx2, avxvnni, avx512, avx512vnni, avx512bf16, amx;

  X86Features() {
    ISQ_CPU_FIND();
    avx2 = ISQ_CPU_HAS("avx2") && ISQ_CPU_HAS("fma") && ISQ_CPU_HAS("f16c");
    avx512 =
        avx2 && ISQ_CPU_HAS("avx512f") && ISQ_CPU_HAS("avx512bw") && ISQ_CPU_HAS("avx512dq") && ISQ_CPU_HAS("avx512vl");
    avx512vnni = avx512 && ISQ_CPU_HAS("avx512vnni");
    avx512bf16 = avx512vnni && ISQ_CPU_HAS("avx512vbmi") && ISQ_CPU_HAS("avx512bf16") && ISQ_CPU_HAS("gfni");
    unsigned a = 0, b = 0, c = 0, d = 0;
    avxvnni = avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
    const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 25 & 1) && (d >> 24 & 1) && (d >> 22 & 1);
    amx = avx512bf16 && tiles && may_use_tiles();
  }
};
#elif defined(__aarch64__)
// On arm64 a program cannot ask the processor for its features, only the operating system.
struct ArmFeatures {
  bool dotprod = false, i8mm = false;

  ArmFeatures() {
#if defined(__linux__)
    constexpr unsigned long kAtomics = 1 << 8, kRounding = 1 << 12, kDotProducts = 1 << 20;  // of AT_HWCAP
    constexpr unsigned long kInt8Matrices = 1 << 13;                                         // of AT_HWCAP2
    constexpr unsigned long kNeeded = kAtomics | kRounding | kDotProducts;  // the compiler assumes all of ARMv8.2
    dotprod = (getauxval(AT_HWCAP) & kNeeded) == kNeeded;
    i8mm = dotprod && (getauxval(AT_HWCAP2) & kInt8Matrices);
#elif defined(__APPLE__)
    dotprod = has("hw.optional.arm.FEAT_DotProd");
    i8mm = dotprod && has("hw.optional.arm.FEAT_I8MM");
#endif
  }

#if defined(__APPLE__)
  static bool has(const char* feature) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
  }
#endif
};
#endif

// Levels share the kernels of a step as they share the decoders.
const StepKernels* steps_of(const FormatTable& formats) {
  static const StepKernels baseline = steps_baseline::step_kernels();
#if defined(__x86_64__)
  static const StepKernels avx2 = steps_avx2::step_kernels(), avx512 = steps_avx512::step_kernels();
  if (formats.formats == avx512::format_table().formats) return &avx512;
  if (formats.formats == avx2::format_table().formats) return &avx2;
#endif
  (void)formats;
  return &baseline;
}

}  // namespace

const std::vector<IsaLevel>& isa_levels() {
  static const std::vector<IsaLevel> levels = [] {
    std::vector<IsaLevel> all;
    const auto add = [&](const char* name, const char* needs, bool supported, FormatTable formats,
                         const RowKernels* rows, const PanelKernels* panels, const TileKernels* tiles = nullptr) {
      all.push_back({name, needs, supported, {name, formats, steps_of(formats), rows, tiles, panels}});
    };
#if defined(__aarch64__)
    add("baseline", "nothing", true, baseline::format_table(), baseline::row_kernels(), baseline::panel_kernels());
    const ArmFeatures has;
    add("dotprod", "ARMv8.2 with dot products", has.dotprod, baseline::format_table(), dotprod::row_kernels(),
        dotprod::panel_kernels());
    add("i8mm", "ARMv8.2 with dot products and I8MM", has.i8mm, baseline::format_table(), i8mm::row_kernels(),
        i8mm::panel_kernels());
#else
    add("baseline", "nothing", true, baseline::format_table(), baseline::row_kernels(), nullptr);
#endif
#if defined(__x86_64__)
    const X86Features has;
    add("avx2", "AVX2, FMA and F16C", has.avx2, avx2::format_table(), avx2::row_kernels(), avx2::panel_kernels());
    add("avxvnni", "AVX2 and AVX-VNNI", has.avxvnni, avx2::format_table(), avxvnni::row_kernels(),
        avxvnni::panel_kernels());
    add("avx512", "AVX-512 F, BW, DQ and VL", has.avx512, avx512::format_table(), avx512::row_kernels(),
        avx512::panel_kernels());
    add("avx512vnni", "AVX-512 with VNNI", has.avx512vnni, avx512::format_table(), avx512vnni::row_kernels(),
        avx512vnni::panel_kernels());
    add("avx512bf16", "AVX-512 with VNNI, VBMI, BF16 and GFNI", has.avx512bf16, avx512::format_table(),
        avx512bf16::row_kernels(), avx512vnni::panel_kernels());
    add("amx", "AVX-512 with VNNI, VBMI, BF16 and GFNI, and AMX with INT8 and BF16", has.amx, avx512::format_table(),
        avx512bf16::row_kernels(), amx::panel_kernels(), amx::tile_kernels());
#endif
    return all;
  }();
  return levels;
}

const KernelTable& selected_table() {
  const KernelTable* table = current_table.load(std::memory_order_acquire);
  if (!table) {
    const std::lock_guard<std::mutex> lock(selection_mutex);
    if (!current_table.load(std::memory_order_acquire)) set_selection(default_selection());
    table = current_table.load(std::memory_order_acquire);
  }
  return *table;
}

std::string selection_reason() {
  selected_table();
  const std::lock_guard<std::mutex> lock(selection_mutex);
  return current_reason;
}

void select_isa(const std::string& name) {
  Selection selection =
      name.empty() ? default_selection() : Selection{&level_called(name, "set_cpu_isa").table, "chosen by set_cpu_isa"};
  const std::lock_guard<std::mutex> lock(selection_mutex);
  set_selection(std::move(selection));
}

int find_format(const char* op, const std::string& format) {
  static const FormatTable formats = baseline::format_table();
  static const std::unordered_map<std::string, int> index = [] {
    std::unordered_map<std::string, int> by_name;
    for (int i = 0; i < formats.count; ++i) by_name[formats.formats[i].name] = i;
    return by_name;
  }();
  const auto found = index.find(format);
  if (found == index.end()) {
    std::string names;
    for (int i = 0; i < formats.count; ++i) names += text(i ? ", " : "", formats.formats[i].name);
    throw std::invalid_argument(
        text(op, ": no CPU kernels for the format \"", shortened(format), "\". There are kernels for ", names, "."));
  }
  return found->second;
}

}  // namespace isqtorch
