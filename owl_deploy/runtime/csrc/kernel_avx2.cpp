// AVX2 with FMA, F16C and BMI2: Haswell and later, Zen 1 to Zen 3.
#include <immintrin.h>

#include "kernel_table.h"
#include "x86_avx2_common.h"

namespace owl {
namespace {

struct Avx2 : Avx2Common {
  static constexpr int kInt8Rows = 3;
  static constexpr int kNarrowRows = 4;  // 4 x 2 sums, 2 weights, in 16 registers
  static constexpr bool kBiased = false;

  using Avx2Common::dot;
  static Cell bias8(Cell w) { return w; }
  // |w| * (x with w's sign): neither product nor pair sum leaves 16 bits, since |x| <= 127.
  static __m256i dot8_half(__m256i acc, __m256i w, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return pinned(_mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
  }
  static I dot(Bits<8>, I acc, Cell w, Cell x) {
    return {dot8_half(acc.lo, w.lo, x.lo), dot8_half(acc.hi, w.hi, x.hi)};
  }

  // In this order: GCC would add products to one another first, and run out of registers for them.
  static __m256i pinned(__m256i sum) {
    __asm__("" : "+x"(sum));
    return sum;
  }

  // Values of at most 4 bits, see Narrow.
  static I narrow_add(I a, I b) {
    return {_mm256_add_epi16(a.lo, b.lo), _mm256_add_epi16(a.hi, b.hi)};
  }
  static I narrow_dot(I sum, Cell w, Cell x) {
    const I added =
        narrow_add(sum, {_mm256_maddubs_epi16(w.lo, x.lo), _mm256_maddubs_epi16(w.hi, x.hi)});
    return {pinned(added.lo), pinned(added.hi)};
  }
  template <int Unit>
  static I narrow_sums(I sum) {
    const __m256i unit = _mm256_set1_epi16(Unit);
    return {_mm256_madd_epi16(sum.lo, unit), _mm256_madd_epi16(sum.hi, unit)};
  }
  template <bool Upper>
  static Cell narrow_nibbles(Cell both) {
    return {stored_half<Upper>(both.lo), stored_half<Upper>(both.hi)};
  }
  template <std::size_t Place>
  static __m256i narrow_three_bits_half(__m256i pairs, int upper) {
    const __m256i lower = _mm256_srli_epi16(pairs, 2 * Place);
    return _mm256_or_si256(_mm256_and_si256(lower, _mm256_set1_epi8(3)),
                           _mm256_andnot_si256(clear_bits(upper), _mm256_set1_epi8(4)));
  }
  template <std::size_t Place>
  static Cell narrow_three_bits(const std::uint8_t* p) {
    return of_three_bits<Place>(p, narrow_three_bits_half<Place>);
  }
  static void widen(Bits<4>, const std::uint8_t* p, std::size_t size, std::uint8_t* bytes) {
    widen_nibbles<true>(p, size, bytes);
  }
  static void widen(Bits<3>, const std::uint8_t* p, std::size_t size, std::uint8_t* bytes) {
    widen_threes<true>(p, size, bytes);
  }
  // Turns the upper bit back that widening turned.
  template <std::size_t N>
  static Cell narrow_expanded(Bits<N>, Cell cell) {
    const __m256i bit = _mm256_set1_epi8(1 << (N - 1));
    return {_mm256_xor_si256(cell.lo, bit), _mm256_xor_si256(cell.hi, bit)};
  }
};

}  // namespace

const Kernels kAvx2Kernels = make_kernels<Avx2>("avx2");

}  // namespace owl
