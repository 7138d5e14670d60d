// AVX-512 F, BW, VL, DQ without VBMI2: Skylake-X, and Cascade Lake and Cooper Lake, whose VNNI, and
// BF16, go unused.
#include <immintrin.h>

#include "kernel_table.h"
#include "x86_avx512_common.h"
#include "x86_expand.h"

namespace owl {
namespace {

struct Avx512f : Avx512Common {
  static constexpr bool kAsksFar = false;  // its sums of integers take longer than memory
  using Half = float;                      // bf16 weights meet fp32 activations
  static constexpr int kNarrowRows = 0;
  static constexpr bool kBiased = false;

  using Avx512Common::dot;
  using Avx512Common::expand;
  static Cell join(const Halves& v) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(v.lo), v.hi, 1);
  }
  static constexpr bool kWidens = true;
  static void widen(Bits<4>, const std::uint8_t* p, std::size_t size, std::uint8_t* bytes) {
    widen_nibbles<false>(p, size, bytes);
  }
  static void widen(Bits<3>, const std::uint8_t* p, std::size_t size, std::uint8_t* bytes) {
    widen_threes<false>(p, size, bytes);
  }
  static Cell expand(Bits<8>, const std::uint8_t* p, std::uint64_t mask) {
    const Halves cell = expand_bytes(p, mask);
    return join(cell);
  }
  static Cell expand(Bits<16>, const std::uint8_t* p, std::uint32_t mask) {
    const Halves cell = expand_words(p, mask);
    return join(cell);
  }

  static Cell bias8(Cell w) { return w; }
  // |w| * (x with w's sign): neither product nor pair sum leaves 16 bits, since |x| <= 127.
  static I dot(Bits<8>, I acc, Cell w, Cell x) {
    const __m512i turned =
        _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
    const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(w), turned);
    return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
  static F dot(Bits<16>, F acc, Cell w, const std::uint8_t* x) { return dot16_fp32(acc, w, x); }
  static void store_half_row(Half* out, F v) { f_store(out, v); }
};

}  // namespace

const Kernels kAvx512fKernels = make_kernels<Avx512f>("avx512f");

}  // namespace owl
