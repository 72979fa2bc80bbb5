#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <unordered_map>

#include "check.h"

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
    return {&level_called(forced, "ISQTORCH_CPU_ISA").table(), "chosen by the environment variable ISQTORCH_CPU_ISA"};
  }
  const IsaLevel* best = nullptr;
  for (const IsaLevel& level : isa_levels()) {
    if (level.supported) best = &level;
  }
  return {&best->table(), text("the best level this machine supports (", best->needs, ")")};
}

std::mutex selection_mutex;
std::string current_reason;
std::atomic<const KernelTable*> current_table{nullptr};

void set_selection(Selection selection) {
  current_reason = std::move(selection.reason);
  current_table.store(selection.table, std::memory_order_release);
}

}  // namespace

const std::vector<IsaLevel>& isa_levels() {
  static const std::vector<IsaLevel> levels = [] {
    std::vector<IsaLevel> all = {{"baseline", "nothing", true, baseline::kernel_table}};
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    all.push_back({"avx2", "AVX2, FMA and F16C", avx2, avx2::kernel_table});
    all.push_back({"avx512", "AVX-512 F, BW, DQ and VL", avx512, avx512::kernel_table});
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
  Selection selection = name.empty() ? default_selection()
                                     : Selection{&level_called(name, "set_cpu_isa").table(), "chosen by set_cpu_isa"};
  const std::lock_guard<std::mutex> lock(selection_mutex);
  set_selection(std::move(selection));
}

const FormatKernels& find_format(const KernelTable& table, const char* op, const std::string& format) {
  // Every level lists the same formats in the same order.
  static const std::unordered_map<std::string, int> index = [&] {
    std::unordered_map<std::string, int> by_name;
    for (int i = 0; i < table.format_count; ++i) by_name[table.formats[i].name] = i;
    return by_name;
  }();
  const auto found = index.find(format);
  if (found == index.end()) {
    std::string names;
    for (int i = 0; i < table.format_count; ++i) names += text(i ? ", " : "", table.formats[i].name);
    throw std::invalid_argument(
        text(op, ": no CPU kernels for the format \"", format, "\". There are kernels for ", names, "."));
  }
  return table.formats[found->second];
}

}  // namespace isqtorch
