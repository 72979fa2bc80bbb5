// The CPU's searches for scales and lines, and its power function, compiled for one lane.
#pragma once

#include "cuda/kernels/quantize/lanes.cuh"  // first: it says what a lane is

#include "cpu/quantize/descent.h"
#include "cpu/quantize/lines.h"
#include "cpu/quantize/power.h"
#include "cpu/quantize/search.h"
