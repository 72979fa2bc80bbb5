// The emulator's settings and buffers, for the tests in Python.
#include <cstring>

#include "buffers.h"
#include "simt.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void emulator_options(int order, unsigned seed, int workers, int late_copies) {
  simt::options = {(simt::Order)order, seed, workers, late_copies != 0};
}

EXPORT void emulator_shared_limit(size_t bytes) { simt::shared_limit = bytes; }

EXPORT const char* emulator_error() {
  static thread_local std::string error;
  error = simt::take_error();
  return error.c_str();
}

EXPORT void* emulator_new_buffer(size_t bytes, size_t alignment, const char* name) {
  return simt::new_buffer(bytes, alignment, name);
}
EXPORT void emulator_delete_buffer(void* memory) { simt::delete_buffer(memory); }

EXPORT void emulator_counts(uint64_t* three) {
  three[0] = simt::counts.switches;
  three[1] = simt::counts.matrix_loads;
  three[2] = simt::counts.matrix_conflicts;
}
