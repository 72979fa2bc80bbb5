// The kernels of a decoding step for every machine.
#include "cpu/prelude.h"

#define ISQ_ISA steps_baseline
#define ISQ_VECTOR_FLOATS 4
#include "cpu/steps/kernels.h"
