// AVX-512 with VBMI2 (byte and word expansion) and VNNI (int8 dot products), which Ice Lake and
// those after it have; Cooper Lake, which came later too, lacks VBMI2.
#pragma once

#include "x86_avx512_common.h"
#include "x86_expand.h"

namespace owl {
namespace {

struct Avx512VnniCommon : Avx512Common {
  static constexpr int kNarrowRows = 0;
  static constexpr bool kBiased =
      true;  // VPDPBUSD multiplies unsigned by signed bytes: weights are biased by 128

  static constexpr bool kWidens = false;
  using Avx512Common::dot;
  using Avx512Common::expand;

  // Written as assembly for two reasons, both measured on Zen 4 (2x): compilers fold the load into
  // the expansion, whose memory form is microcoded there, and the zeroing form still waits for its
  // destination's old value, so the destination must be the freshly loaded source.
  static Cell expand(Bits<8>, const std::uint8_t* p, std::uint64_t mask) {
    Cell cell = load_cell(p);
    __asm__("vpexpandb %0, %0%{%1%}%{z%}" : "+v"(cell) : "Yk"(static_cast<__mmask64>(mask)));
    return cell;
  }
  // In one byte and the next, what two halves of a byte hold. The bias that is taken off here, and
  // put on again for `dot`, costs nothing: compilers see that.
  static Cell expand(Bits<4>, const std::uint8_t* p, std::uint64_t mask) {
    const __m512i bytes =
        _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __m512i bias = _mm512_set1_epi8(static_cast<char>(0x80));
    const __m512i values = _mm512_and_si512(_mm512_or_si512(bytes, _mm512_slli_epi16(bytes, 12)),
                                            _mm512_set1_epi8(static_cast<char>(0xf0)));
    return _mm512_xor_si512(_mm512_mask_expand_epi8(bias, mask, values), bias);
  }
  static void widen(Bits<3>, const std::uint8_t* p, std::size_t size, std::uint8_t* bytes) {
    widen_threes<false>(p, size, bytes);
  }
  static Cell expand(Bits<16>, const std::uint8_t* p, std::uint32_t mask) {
    Cell cell = load_cell(p);
    __asm__("vpexpandw %0, %0%{%1%}%{z%}" : "+v"(cell) : "Yk"(static_cast<__mmask32>(mask)));
    return cell;
  }

  static Cell bias8(Cell w) {
    return _mm512_xor_si512(w, _mm512_set1_epi8(static_cast<char>(0x80)));
  }
  static I dot(Bits<8>, I acc, Cell w, Cell x) { return _mm512_dpbusd_epi32(acc, w, x); }
};

}  // namespace
}  // namespace owl
