// AVX-512 with VBMI2, VNNI and BF16.
#pragma once

#include "x86_avx512_vnni.h"

namespace owl {
namespace {

struct Avx512 : Avx512VnniCommon {
  using Half = std::uint16_t;
  using Avx512VnniCommon::dot;
  static F dot(Bits<16>, F acc, Cell w, const std::uint8_t* x) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(w),
                            reinterpret_cast<__m512bh>(_mm512_set1_epi32(load32(x))));
  }
  static void store_half_row(Half* out, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
  }
};

}  // namespace
}  // namespace owl
