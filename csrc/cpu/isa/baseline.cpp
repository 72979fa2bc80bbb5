// The level every machine has: SSE2 on x86-64, NEON on arm64, whatever the compiler assumes elsewhere.
#define ISQ_ISA baseline
#define ISQ_ISA_NAME "baseline"
#define ISQ_VECTOR_FLOATS 4
#include "cpu/isa/region.h"
