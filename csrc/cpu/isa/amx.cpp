// AMX, matrix tiles of int8 and bf16: Sapphire Rapids and later. The fewest rows of x are avx512bf16's business.
#if defined(__x86_64__)

#include "cpu/isa/prelude.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                                                       \
    __attribute__((target(                                                                                                          \
        "avx,avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512bf16,gfni,amx-tile,amx-bf16,amx-int8"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target( \
    "avx,avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512bf16,gfni,amx-tile,amx-bf16,amx-int8")
#endif

#define ISQ_ISA amx
#define ISQ_VECTOR_FLOATS 16
#define ISQ_VNNI
#define ISQ_VBMI
#define ISQ_BF16
#define ISQ_GFNI
#include "cpu/linear/amx_panels.h"
#include "cpu/linear/int8_tiles.h"
#include "cpu/linear/units.h"

namespace isqtorch::amx {

const TileKernels* tile_kernels() { return kernels_for<Int8Tiles>(AllFormats{}); }
const PanelKernels* panel_kernels() { return kernels_for<AmxPanels>(AllFormats{}); }

}  // namespace isqtorch::amx

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
