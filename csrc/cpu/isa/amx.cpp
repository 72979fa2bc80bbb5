// AMX, matrix tiles of int8 and bf16: Sapphire Rapids and later. For the fewest rows of x this level uses the row
// kernels of avx512bf16.
#if defined(__x86_64__)

#include "cpu/prelude.h"

ISQ_TARGET_REGION(
    "avx,avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,"
    "avx512vnni,avx512vbmi,avx512bf16,gfni,amx-tile,amx-bf16,amx-int8")

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

ISQ_END_TARGET_REGION

#endif
