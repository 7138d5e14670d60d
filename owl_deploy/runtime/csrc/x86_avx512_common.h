// What the AVX-512 files share: 16 floats in one register.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernel_common.h"

namespace owl {
namespace {

struct Avx512Common {
  using F = __m512;
  using I = __m512i;
  using Cell = __m512i;
  static constexpr bool kAsksFar = true;
  static constexpr std::size_t kPanelGroups = 4;
  static constexpr int kFloatRows = 6;  // 6 x 4 sums, 4 weights: 28 of 32 registers
  static constexpr int kInt8Rows = 3;   // 3 x 4 integer and as many float sums

  static Cell load_cell(const void* p) { return _mm512_loadu_si512(p); }
  // To stay in its register: GCC would load it again for each row that it meets, and loads of 64
  // bytes would then take longer than the products.
  static Cell held_cell(const void* p) {
    Cell cell = load_cell(p);
    __asm__("" : "+v"(cell));
    return cell;
  }
  static void store_cell(void* p, Cell v) { _mm512_storeu_si512(p, v); }
  static Cell broadcast(const std::uint8_t* x) { return _mm512_set1_epi32(load32(x)); }
  template <bool Upper>
  static Cell nibbles(Cell v) {
    if constexpr (!Upper) v = _mm512_slli_epi16(v, 4);
    return _mm512_xor_si512(_mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(0xf0))),
                            _mm512_set1_epi8(static_cast<char>(0x80)));
  }
  template <std::size_t Place>
  static Cell three_bits(const std::uint8_t* p) {
    const __m512i pairs = load_cell(p), bias = _mm512_set1_epi8(static_cast<char>(0x80));
    const __m512i moved =
        Place < 3 ? _mm512_slli_epi16(pairs, 5 - 2 * Place) : _mm512_srli_epi16(pairs, 1);
    const __m512i lower = _mm512_and_si512(moved, _mm512_set1_epi8(0x60));
    std::uint64_t upper;
    std::memcpy(&upper, p + kCellBytes + 8 * Place, 8);
    return _mm512_xor_si512(_mm512_mask_add_epi8(lower, upper, lower, bias), bias);
  }
  // Adds the nibbles less 8 themselves.
  template <bool Upper>
  static Cell add_nibbles(Cell cell, Cell v) {
    if constexpr (Upper) v = _mm512_srli_epi16(v, 4);
    const __m512i low = _mm512_and_si512(v, _mm512_set1_epi8(0x0f));
    return _mm512_add_epi8(cell, _mm512_sub_epi8(low, _mm512_set1_epi8(8)));
  }
  static Cell expand(Bits<32>, const std::uint8_t* p, std::uint32_t mask) {
    Cell cell = load_cell(p);  // assembly: see x86_avx512_vnni.h
    __asm__("vpexpandd %0, %0%{%1%}%{z%}" : "+v"(cell) : "Yk"(static_cast<__mmask16>(mask)));
    return cell;
  }
  static F dot(Bits<32>, F acc, Cell w, const std::uint8_t* x) {
    float value;
    std::memcpy(&value, x, 4);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_set1_ps(value), acc);
  }

  static F f_set1(float x) { return _mm512_set1_ps(x); }
  static F f_load(const float* p) { return _mm512_loadu_ps(p); }
  static void f_store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F f_add(F a, F b) { return _mm512_add_ps(a, b); }
  static F f_sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F f_mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F f_div(F a, F b) { return _mm512_div_ps(a, b); }
  static F f_max(F a, F b) { return _mm512_max_ps(a, b); }
  static F f_min(F a, F b) { return _mm512_min_ps(a, b); }
  static F f_abs(F a) { return _mm512_abs_ps(a); }
  static F f_fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static float f_hsum(F v) { return _mm512_reduce_add_ps(v); }
  static float f_hmax(F v) { return _mm512_reduce_max_ps(v); }
  static I i_set1(std::int32_t x) { return _mm512_set1_epi32(x); }
  static I i_add(I a, I b) { return _mm512_add_epi32(a, b); }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  // Rounds to the nearest integers, stores them, and returns them.
  static I store_int8(std::int8_t* out, F v) {
    const I rounded = _mm512_cvtps_epi32(v);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtsepi32_epi8(rounded));
    return rounded;
  }
  // p * 2^n where `shifted` holds n in its low bits, above 1.5 * 2^23.
  static F scale_by_power(F p, F shifted) {
    return _mm512_scalef_ps(p, _mm512_sub_ps(shifted, _mm512_set1_ps(12582912.0F)));
  }
  static F f_load_scales(const std::uint8_t* p, const ScaleCode& code) {
    const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m512i moved = _mm512_sll_epi32(wide, _mm_cvtsi32_si128(code.shift));
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(code.mask));
    return _mm512_castsi512_ps(_mm512_add_epi32(
        _mm512_and_si512(moved, mask), _mm512_set1_epi32(static_cast<int>(code.exponent_bits))));
  }
  static F f_halves(float low, float high) {
    return _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(low), _mm512_set1_ps(high));
  }
  static F f_load_fp16(const std::uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void f_store_fp16(std::uint16_t* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  // 16 rows of 16 -> 16 columns of 16: pairs of floats, pairs of doubles, then 128-bit lanes.
  static void transpose16(F r[16]) {
    F t[16];
    for (int i = 0; i < 16; i += 4) {
      const F a = _mm512_unpacklo_ps(r[i], r[i + 1]), b = _mm512_unpackhi_ps(r[i], r[i + 1]);
      const F c = _mm512_unpacklo_ps(r[i + 2], r[i + 3]),
              d = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
      t[i] = pair_low(a, c);
      t[i + 1] = pair_high(a, c);
      t[i + 2] = pair_low(b, d);
      t[i + 3] = pair_high(b, d);
    }
    for (int i = 0; i < 4; ++i) {
      const F a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88),
              b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
      const F c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88),
              d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
      r[i] = _mm512_shuffle_f32x4(a, c, 0x88);
      r[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
      r[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
      r[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
  }
  // Lanes i and i + 8 of the result add up to the sum over the lanes of v[i]: each step joins
  // halves of two vectors.
  static F f_sum8(const F v[8]) {
    F w[4];
    for (int i = 0; i < 4; ++i) {
      const F other = _mm512_mask_blend_ps(0x0f0f, v[i], v[i + 4]);
      w[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xf0f0, v[i], v[i + 4]),
                           _mm512_shuffle_f32x4(other, other, 0xb1));
    }
    for (int i = 0; i < 2; ++i)
      w[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, w[i], w[i + 2]),
                           _mm512_permute_ps(_mm512_mask_blend_ps(0x3333, w[i], w[i + 2]), 0x4e));
    return _mm512_add_ps(_mm512_mask_blend_ps(0xaaaa, w[0], w[1]),
                         _mm512_permute_ps(_mm512_mask_blend_ps(0x5555, w[0], w[1]), 0xb1));
  }
  // Adds those pairs of lanes: sums of `low` in the first 8 lanes, of `high` in the others.
  static F f_join8(F low, F high) {
    return _mm512_add_ps(_mm512_mask_blend_ps(0xff00, low, high),
                         _mm512_shuffle_f32x4(low, high, 0x4e));
  }

  // bf16 weights times pairs of fp32 activations.
  static F dot16_fp32(F acc, Cell w, const std::uint8_t* x) {
    float pair[2];
    std::memcpy(pair, x, 8);
    const F even = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
    const F odd =
        _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
    return _mm512_fmadd_ps(odd, _mm512_set1_ps(pair[1]),
                           _mm512_fmadd_ps(even, _mm512_set1_ps(pair[0]), acc));
  }

 private:
  static F pair_low(F a, F b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  static F pair_high(F a, F b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
};

}  // namespace
}  // namespace owl
