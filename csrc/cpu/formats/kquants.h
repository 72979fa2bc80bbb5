// ggml's 256-weight formats q2k q3k q4k q5k q6k q8k: a block is cut into sub-blocks of 16 or 32 with small integer
// scales of their own, which one or two f16 numbers scale in turn.
#pragma once

#include "cpu/formats/kquants_affine.h"
#include "cpu/formats/kquants_symmetric.h"
