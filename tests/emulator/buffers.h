// Buffers that end where memory ends: a page that nothing may touch follows the last byte, another one precedes the
// first page. A stray access of a GPU thread becomes an error that names buffer, offset and thread.
#pragma once

#include <csignal>
#include <cstddef>
#include <string>

namespace simt {

// `bytes` of memory whose end, rounded up to `alignment`, is the end of what may be touched. Filled with 0xff.
void* new_buffer(size_t bytes, size_t alignment, const std::string& name);
void delete_buffer(void* memory);

// Where an address lies: "byte 512 of 'x' (512 bytes)".
std::string describe_address(const void* address);

// While one exists, faults of GPU threads end their launch; other faults do what they did before.
class CatchFaults {
 public:
  CatchFaults();
  ~CatchFaults();
  CatchFaults(const CatchFaults&) = delete;
  CatchFaults& operator=(const CatchFaults&) = delete;
};

// Must be called once by every OS thread that runs GPU threads: their own stack may be what overflowed.
void use_signal_stack();

}  // namespace simt
