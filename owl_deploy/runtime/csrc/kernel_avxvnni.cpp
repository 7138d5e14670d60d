// AVX2 with AVX-VNNI, without AVX-512: client processors of Intel from Alder Lake on.
#include <immintrin.h>

#include "kernel_table.h"
#include "x86_avx2_common.h"

namespace owl {
namespace {

struct AvxVnni : Avx2Common {
  static constexpr int kInt8Rows =
      3;  // 3 x 2 integer and as many float sums, 2 weights, in 16 registers
  static constexpr int kNarrowRows = 0;
  static constexpr bool kBiased = true;  // as with AVX-512: unsigned by signed

  using Avx2Common::dot;
  static __m256i bias_half(__m256i w) {
    return _mm256_xor_si256(w, _mm256_set1_epi8(static_cast<char>(0x80)));
  }
  static Cell bias8(Cell w) { return {bias_half(w.lo), bias_half(w.hi)}; }
  static __m256i dot8_half(__m256i acc, __m256i w, __m256i x) {
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(acc, w, x);
#else  // OWL_EVEX: the same operation as AVX-512 encodes it, to test these kernels where AVX-VNNI
       // is missing
    return _mm256_dpbusd_epi32(acc, w, x);
#endif
  }
  static I dot(Bits<8>, I acc, Cell w, Cell x) {
    return {dot8_half(acc.lo, w.lo, x.lo), dot8_half(acc.hi, w.hi, x.hi)};
  }
};

}  // namespace

const Kernels kAvxVnniKernels = make_kernels<AvxVnni>("avxvnni");

}  // namespace owl
