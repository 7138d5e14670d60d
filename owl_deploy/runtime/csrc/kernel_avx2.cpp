// AVX2 with FMA, F16C and BMI2: Haswell and later, Zen 1 to Zen 3.
#include <immintrin.h>

#include "kernel_table.h"
#include "x86_avx2_common.h"

namespace owl {
namespace {

struct Avx2 : Avx2Common {
  static constexpr int kInt8Rows = 2;
  static constexpr bool kBiased = false;

  using Avx2Common::dot;
  static Cell bias8(Cell w) { return w; }
  // |w| * (x with w's sign): neither product nor pair sum leaves 16 bits, since |x| <= 127.
  static __m256i dot8_half(__m256i acc, __m256i w, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static I dot(Bits<8>, I acc, Cell w, Cell x) {
    return {dot8_half(acc.lo, w.lo, x.lo), dot8_half(acc.hi, w.hi, x.hi)};
  }
};

}  // namespace

const Kernels kAvx2Kernels = make_kernels<Avx2>("avx2");

}  // namespace owl
