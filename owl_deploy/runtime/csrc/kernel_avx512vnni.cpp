// AVX-512 with VBMI2 and VNNI, but without BF16: Ice Lake, Tiger Lake, Rocket Lake.
#include <immintrin.h>

#include "kernel_table.h"
#include "x86_avx512_vnni.h"

namespace owl {
namespace {

struct Avx512Vnni : Avx512VnniCommon {
  using Half = float;  // bf16 weights meet fp32 activations
  using Avx512VnniCommon::dot;
  static F dot(Bits<16>, F acc, Cell w, const std::uint8_t* x) { return dot16_fp32(acc, w, x); }
  static void store_half_row(Half* out, F v) { f_store(out, v); }
};

}  // namespace

const Kernels kAvx512VnniKernels = make_kernels<Avx512Vnni>("avx512vnni");

}  // namespace owl
