// The searches for scales and lines, and the power function, compiled for one lane.
#pragma once

#include "cuda/kernels/quantize/lanes.cuh"  // first, see searches/contract.h

#include "searches/descent.h"
#include "searches/lines.h"
#include "searches/power.h"
#include "searches/search.h"
