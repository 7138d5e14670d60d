// AVX-512 with VBMI2 (byte and word expansion), VNNI (int8 dot products) and BF16: Zen 4, Sapphire
// Rapids and later.
#include "kernel_table.h"
#include "x86_avx512_bf16.h"

namespace owl {

const Kernels kAvx512Kernels = make_kernels<Avx512>("avx512");

}  // namespace owl
