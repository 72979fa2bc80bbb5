// How many CPUs this process may use.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

#include "cpu/thread_pool.h"

namespace isqtorch {
namespace {

#if defined(__linux__)

// The CPUs that the scheduler may give this thread; 0 if it does not say.
int cpus_by_affinity() {
  for (int cpus = CPU_SETSIZE; cpus <= 1 << 16; cpus *= 2) {  // the kernel refuses a set smaller than its own
    cpu_set_t* const set = CPU_ALLOC(cpus);
    if (!set) return 0;
    const size_t bytes = CPU_ALLOC_SIZE(cpus);
    const bool known = sched_getaffinity(0, bytes, set) == 0;
    const int count = known ? CPU_COUNT_S(bytes, set) : 0;
    CPU_FREE(set);
    if (known) return count;
  }
  return 0;
}

// quota / period of a control group, rounded up; 0 if it has no limit. The numbers are in one file or in two.
int cpus_of_group(const std::string& folder, bool v2) {
  std::string quota;
  double period = 0;
  if (v2) {
    std::ifstream(folder + "/cpu.max") >> quota >> period;
  } else {
    std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;
    std::ifstream(folder + "/cpu.cfs_period_us") >> period;
  }
  const double time = std::strtod(quota.c_str(), nullptr);  // "max" and -1 are no limit
  if (!(time > 0) || !(period > 0)) return 0;
  return static_cast<int>(std::min((time + period - 1) / period, 1e6));
}

// The least limit of the control groups of this process, which are one inside the other; 0 if there is none. A line of
// the list is number:controllers:path.
int cpus_by_quota() {
  int least = 0;
  std::ifstream list("/proc/self/cgroup");
  for (std::string line; std::getline(list, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = ',' + line.substr(first + 1, second - first - 1) + ',';
    const bool v2 = controllers == ",,";
    if (!v2 && controllers.find(",cpu,") == std::string::npos) continue;
    std::string path = line.substr(second + 1);
    for (;;) {
      const int cpus = cpus_of_group((v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu") + path, v2);
      if (cpus > 0) least = least > 0 ? std::min(least, cpus) : cpus;
      const size_t slash = path.rfind('/');
      if (slash == std::string::npos) break;
      path.resize(slash);
    }
  }
  return least;
}

#endif

}  // namespace

int usable_cpus() {
  int cpus = 0;
#if defined(__linux__)
  cpus = cpus_by_affinity();
  const int quota = cpus_by_quota();
  if (quota > 0 && cpus > 0) cpus = std::min(cpus, quota);
#endif
  if (cpus <= 0) cpus = static_cast<int>(std::thread::hardware_concurrency());
  return std::max(cpus, 1);
}

}  // namespace isqtorch
