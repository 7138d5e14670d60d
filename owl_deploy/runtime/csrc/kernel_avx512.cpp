// AVX-512 with VBMI2 (byte and word expansion), VNNI (int8 dot products) and BF16: Zen 4, Sapphire Rapids and later.
#include <immintrin.h>

#include "kernel_body.h"
#include "x86_avx512_common.h"

namespace owl {
namespace {

struct Avx512 : Avx512Common {
  using Half = std::uint16_t;
  static constexpr bool kBiased = true;  // VPDPBUSD multiplies unsigned by signed bytes: weights are biased by 128

  // Written as assembly for two reasons, both measured on Zen 4 (2x): compilers fold the load into the expansion,
  // whose memory form is microcoded there, and the zeroing form still waits for its destination's old
  // value, so the destination must be the freshly loaded source.
  static Cell expand8(const std::uint8_t* p, std::uint64_t mask) {
    Cell cell = load_cell(p);
    __asm__("vpexpandb %0, %0%{%1%}%{z%}" : "+v"(cell) : "Yk"(static_cast<__mmask64>(mask)));
    return cell;
  }
  static Cell expand16(const std::uint8_t* p, std::uint32_t mask) {
    Cell cell = load_cell(p);
    __asm__("vpexpandw %0, %0%{%1%}%{z%}" : "+v"(cell) : "Yk"(static_cast<__mmask32>(mask)));
    return cell;
  }

  static Cell bias8(Cell w) { return _mm512_xor_si512(w, _mm512_set1_epi8(static_cast<char>(0x80))); }
  static I dot8(I acc, Cell w, const std::uint8_t* x) { return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(load32(x))); }
  static F dot16(F acc, Cell w, const std::uint8_t* x) {
    return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(load32(x)));
  }
  static void store_half_row(Half* out, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(v));
  }
};

}  // namespace

const Kernels kAvx512Kernels = make_kernels<Avx512>("avx512");

}  // namespace owl
