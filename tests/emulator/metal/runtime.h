// What a compiled shader asks of the machine in simt.h, without that header's own: every shader includes this one.
#pragma once

namespace simt::metal {

// Where a kernel's parameter comes from: [[buffer(n)]] or what its attribute names.
enum class Input : int {
  kBuffer,
  // one to three numbers
  kPositionInGrid,
  kPositionInThreadgroup,
  kThreadgroupPosition,
  kThreadsPerThreadgroup,
  kDispatchThreadsPerThreadgroup,
  kThreadsPerGrid,
  kThreadgroupsPerGrid,
  // one number
  kIndexInThreadgroup,
  kIndexInSimdgroup,
  kSimdgroupIndex,
  kSimdgroups,
  kSimdgroupSize,
  kIndexInQuadgroup,
  kQuadgroupIndex,
  kQuadgroups,
};

struct Parameter {
  Input input;
  int index;       // of the buffer
  unsigned bytes;  // of what a reference refers to, the least that must be bound; 0 for pointers
  bool writes;     // to the buffer
};

struct Kernel {
  const char* name;
  const Parameter* parameters;
  int count;                                                       // of parameters
  int most_threads;                                                // per threadgroup: its attribute, or 1024
  void (*run)(const Parameter* parameters, void* const* buffers);  // as the running thread
};

struct Line {
  const char* file;
  int number;
};

using Lane = unsigned long[8];  // what a lane brings to an exchange

unsigned input(Input which, int axis);
int lane();

// Every active lane's value, and a mask of these lanes.
const Lane* exchange(bool quad, const void* value, unsigned long bytes, Line line, unsigned* lanes);
void simdgroup_barrier(bool orders, Line line);
void threadgroup_barrier(bool orders, Line line);

// The threadgroup's variable that `id` stands for. Metal has 32 KB for all of them.
void* threadgroup_memory(const void* id, const char* name, unsigned long bytes, unsigned long alignment);

// The product of two 8x8 matrices. A lane holds two elements of each: row and column as in matrix_place().
void multiply(const float (&a)[2], const float (&b)[2], float (&product)[2], Line line);
struct Place {
  int row, column;  // of the first element; the second one is to its right
};
inline Place matrix_place(int lane) { return {(lane / 4 & 4) + lane / 2 % 4, (lane / 4 & 2) * 2 + lane % 2 * 2}; }

// Fails unless all lanes of the SIMD-group are here, with the same address and stride.
void check_uniform(const void* address, unsigned long stride, Line line);

}  // namespace simt::metal
