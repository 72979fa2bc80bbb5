// The level that every machine has: SSE2 on x86-64, NEON on arm64, elsewhere what the compiler assumes.
#define ISQ_ISA baseline
#define ISQ_VECTOR_FLOATS 4
#include "cpu/isa/formats_region.h"
#include "cpu/isa/linear_region.h"
