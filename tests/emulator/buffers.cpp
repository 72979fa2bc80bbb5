#include "buffers.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "simt.h"

namespace simt {

bool stack_overflowed(const void* address);  // simt.cpp: of the running GPU thread

namespace {

struct Buffer {
  char* pages;
  size_t page_bytes, bytes;
  std::string name;
};
std::mutex mutex;
std::map<char*, Buffer> buffers;

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
struct sigaction previous[4];
int catching = 0;

std::string code_address(const void* address) {
  Dl_info info;
  if (!dladdr(address, &info) || !info.dli_fname) return "";
  char offset[32];
  std::snprintf(offset, sizeof offset, "+%#zx", (size_t)((const char*)address - (const char*)info.dli_fbase));
  return std::string(" [") + info.dli_fname + offset + "]";  // for addr2line
}

const void* instruction(void* context) {
  const auto& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
  return reinterpret_cast<const void*>(machine.gregs[REG_RIP]);
#else
  return reinterpret_cast<const void*>(machine.pc);
#endif
}

// On the signal's own stack. fail() leaves it for good, which is allowed: it is not in use any more then.
void on_signal(int signal, siginfo_t* info, void* context) {
  if (!self) {  // not a GPU thread: as if nobody had asked
    sigaction(signal, &previous[signal == SIGSEGV ? 0 : signal == SIGBUS ? 1 : signal == SIGFPE ? 2 : 3], nullptr);
    return;
  }
  const std::string where = code_address(instruction(context));
  if (signal == SIGFPE) fail("division by zero" + where);
  if (signal == SIGILL) fail("undefined behaviour" + where);
  if (stack_overflowed(info->si_addr)) fail("a thread's stack overflows" + where);
  fail("stray access to " + describe_address(info->si_addr) + where);
}

}  // namespace

void* new_buffer(size_t bytes, size_t alignment, const std::string& name) {
  const size_t page = sysconf(_SC_PAGESIZE), body = (bytes + page) / page * page,
               padded = (bytes + alignment - 1) / alignment * alignment;
  void* const pages = mmap(nullptr, body + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) return nullptr;
  char* const first = static_cast<char*>(pages);
  mprotect(first, page, PROT_NONE);
  mprotect(first + page + body, page, PROT_NONE);
  char* const memory = first + page + body - padded;
  std::memset(memory, 0xff, padded);
  const std::lock_guard lock(mutex);
  buffers[memory] = {first, body + 2 * page, bytes, name};
  return memory;
}

void delete_buffer(void* memory) {
  const std::lock_guard lock(mutex);
  const auto found = buffers.find(static_cast<char*>(memory));
  if (found == buffers.end()) std::abort();
  munmap(found->second.pages, found->second.page_bytes);
  buffers.erase(found);
}

std::string describe_address(const void* address) {
  const char* const at = static_cast<const char*>(address);
  const std::lock_guard lock(mutex);
  for (const auto& [memory, buffer] : buffers) {
    if (at >= buffer.pages && at < buffer.pages + buffer.page_bytes) {
      return "byte " + std::to_string(at - memory) + " of '" + buffer.name + "' (" + std::to_string(buffer.bytes) +
             " bytes)";
    }
  }
  char text[32];
  std::snprintf(text, sizeof text, "address %p", address);
  return text;
}

CatchFaults::CatchFaults() {
  const std::lock_guard lock(mutex);
  if (catching++) return;
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigemptyset(&action.sa_mask);
  for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &action, &previous[i]);
}

CatchFaults::~CatchFaults() {
  const std::lock_guard lock(mutex);
  if (--catching) return;
  for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &previous[i], nullptr);
}

void use_signal_stack() {
  static thread_local char stack[64 << 10];
  stack_t description = {};
  description.ss_sp = stack;
  description.ss_size = sizeof stack;
  sigaltstack(&description, nullptr);
}

}  // namespace simt
