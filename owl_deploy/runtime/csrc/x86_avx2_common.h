// What the two files without AVX-512 share: 16 floats in two registers.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "x86_expand.h"

namespace owl {
namespace {

struct Avx2Common {
  struct F {
    __m256 lo, hi;
  };
  using I = Halves;
  using Cell = Halves;
  using Half = float;
  static constexpr bool kAsksFar = false;
  static constexpr std::size_t kPanelGroups = 1;
  static constexpr int kFloatRows = 4;  // 4 x 2 sums, 2 weights and their halves, in 16 registers

  static Cell held_cell(const void* p) { return load_cell(p); }
  static Cell load_cell(const void* p) {
    const auto* q = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
  }
  static void store_cell(void* p, Cell v) {
    auto* q = static_cast<__m256i*>(p);
    _mm256_storeu_si256(q, v.lo);
    _mm256_storeu_si256(q + 1, v.hi);
  }
  static Cell broadcast(const std::uint8_t* x) {
    return {_mm256_set1_epi32(load32(x)), _mm256_set1_epi32(load32(x))};
  }
  template <bool Upper>
  static __m256i nibbles_half(__m256i v) {
    if constexpr (!Upper) v = _mm256_slli_epi16(v, 4);
    return _mm256_xor_si256(_mm256_and_si256(v, _mm256_set1_epi8(static_cast<char>(0xf0))),
                            _mm256_set1_epi8(static_cast<char>(0x80)));
  }
  template <bool Upper>
  static Cell nibbles(Cell v) {
    return {nibbles_half<Upper>(v.lo), nibbles_half<Upper>(v.hi)};
  }
  // All bits of the bytes whose bit in `mask` is clear.
  static __m256i clear_bits(int mask) {
    const __m256i byte_of = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202,
                                              0x0101010101010101, 0x0000000000000000);
    const __m256i bit_of = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ULL));
    const __m256i bits =
        _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(mask), byte_of), bit_of);
    return _mm256_cmpeq_epi8(bits, _mm256_setzero_si256());
  }
  template <std::size_t Place>
  static __m256i three_bits_half(__m256i pairs, int upper) {
    const __m256i moved =
        Place < 3 ? _mm256_slli_epi16(pairs, 5 - 2 * Place) : _mm256_srli_epi16(pairs, 1);
    const __m256i bias = _mm256_set1_epi8(static_cast<char>(0x80));
    return _mm256_or_si256(_mm256_and_si256(moved, _mm256_set1_epi8(0x60)),
                           _mm256_and_si256(clear_bits(upper), bias));
  }
  // One of the four cells of 3 bits a value at p, by what makes a half of pairs and upper bits.
  template <std::size_t Place, class Half>
  static Cell of_three_bits(const std::uint8_t* p, Half half) {
    const Cell pairs = load_cell(p);
    const std::uint8_t* upper = p + kCellBytes + 8 * Place;
    return {half(pairs.lo, load32(upper)), half(pairs.hi, load32(upper + 4))};
  }
  template <std::size_t Place>
  static Cell three_bits(const std::uint8_t* p) {
    return of_three_bits<Place>(p, three_bits_half<Place>);
  }
  // The lower or the upper 4 bits of each byte, as they are stored.
  template <bool Upper>
  static __m256i stored_half(__m256i v) {
    if constexpr (Upper) v = _mm256_srli_epi16(v, 4);
    return _mm256_and_si256(v, _mm256_set1_epi8(0x0f));
  }
  template <bool Upper>
  static __m256i add_nibbles_half(__m256i cell, __m256i v) {
    return _mm256_add_epi8(cell, _mm256_sub_epi8(stored_half<Upper>(v), _mm256_set1_epi8(8)));
  }
  template <bool Upper>
  static Cell add_nibbles(Cell cell, Cell v) {
    return {add_nibbles_half<Upper>(cell.lo, v.lo), add_nibbles_half<Upper>(cell.hi, v.hi)};
  }
  static constexpr bool kWidens = true;
  static void widen(Bits<4>, const std::uint8_t* p, std::size_t size, std::uint8_t* bytes) {
    widen_nibbles<false>(p, size, bytes);
  }
  static void widen(Bits<3>, const std::uint8_t* p, std::size_t size, std::uint8_t* bytes) {
    widen_threes<false>(p, size, bytes);
  }
  static Cell expand(Bits<8>, const std::uint8_t* p, std::uint64_t mask) {
    return expand_bytes(p, mask);
  }
  static Cell expand(Bits<16>, const std::uint8_t* p, std::uint32_t mask) {
    return expand_words(p, mask);
  }
  static Cell expand(Bits<32>, const std::uint8_t* p, std::uint32_t mask) {
    return expand_quads(p, mask);
  }

  static __m256 dot16_half(__m256 acc, __m256i w, __m256 even, __m256 odd) {
    const __m256 low = _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
    const __m256 high =
        _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
    return _mm256_fmadd_ps(high, odd, _mm256_fmadd_ps(low, even, acc));
  }
  static F dot(Bits<16>, F acc, Cell w, const std::uint8_t* x) {
    float pair[2];
    std::memcpy(pair, x, 8);
    const __m256 even = _mm256_set1_ps(pair[0]), odd = _mm256_set1_ps(pair[1]);
    return {dot16_half(acc.lo, w.lo, even, odd), dot16_half(acc.hi, w.hi, even, odd)};
  }
  static F dot(Bits<32>, F acc, Cell w, const std::uint8_t* x) {
    float value;
    std::memcpy(&value, x, 4);
    const __m256 b = _mm256_set1_ps(value);
    return {_mm256_fmadd_ps(_mm256_castsi256_ps(w.lo), b, acc.lo),
            _mm256_fmadd_ps(_mm256_castsi256_ps(w.hi), b, acc.hi)};
  }
  static void store_half_row(Half* out, F v) { f_store(out, v); }

  static F f_set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F f_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void f_store(float* p, F v) {
    _mm256_storeu_ps(p, v.lo);
    _mm256_storeu_ps(p + 8, v.hi);
  }
  static F f_add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
  static F f_sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
  static F f_mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
  static F f_div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
  static F f_max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
  static F f_min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
  static F f_abs(F a) {
    const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(a.lo, mask), _mm256_and_ps(a.hi, mask)};
  }
  static F f_fma(F a, F b, F c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
  }
  static float f_hsum(F v) {
    const __m256 s = _mm256_add_ps(v.lo, v.hi);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
  }
  static float f_hmax(F v) {
    const __m256 s = _mm256_max_ps(v.lo, v.hi);
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
  }
  static I i_set1(std::int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  static I i_add(I a, I b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
  static F to_float(I v) { return {_mm256_cvtepi32_ps(v.lo), _mm256_cvtepi32_ps(v.hi)}; }
  static I store_int8(std::int8_t* out, F v) {
    const I rounded = {_mm256_cvtps_epi32(v.lo), _mm256_cvtps_epi32(v.hi)};
    const __m256i words = _mm256_packs_epi32(rounded.lo, rounded.hi);
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(out),
        _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
    return rounded;
  }
  // p * 2^n where `shifted` holds n in its low bits, above 1.5 * 2^23. A product, not a sum of
  // exponents, so that NaN stays NaN whatever its bits.
  static __m256 scale_half(__m256 p, __m256 shifted) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    const __m256i power = _mm256_add_epi32(exponent, _mm256_set1_epi32(0x3f800000));
    return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
  }
  static F scale_by_power(F p, F shifted) {
    return {scale_half(p.lo, shifted.lo), scale_half(p.hi, shifted.hi)};
  }
  static __m256 scales_half(const std::uint8_t* p, const ScaleCode& code) {
    const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m256i moved = _mm256_sll_epi32(wide, _mm_cvtsi32_si128(code.shift));
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(code.mask));
    return _mm256_castsi256_ps(_mm256_add_epi32(
        _mm256_and_si256(moved, mask), _mm256_set1_epi32(static_cast<int>(code.exponent_bits))));
  }
  static F f_load_scales(const std::uint8_t* p, const ScaleCode& code) {
    return {scales_half(p, code), scales_half(p + 8, code)};
  }
  static F f_halves(float low, float high) { return {_mm256_set1_ps(low), _mm256_set1_ps(high)}; }
  static F f_load_fp16(const std::uint16_t* p) {
    const auto* q = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
  }
  static void f_store_fp16(std::uint16_t* p, F v) {
    auto* q = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(q, _mm256_cvtps_ph(v.lo, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(q + 1, _mm256_cvtps_ph(v.hi, _MM_FROUND_TO_NEAREST_INT));
  }
  static void transpose16(F r[16]) {
    alignas(32) float from[16][16], to[16][16];
    for (int i = 0; i < 16; ++i) f_store(from[i], r[i]);
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j) to[j][i] = from[i][j];
    for (int i = 0; i < 16; ++i) r[i] = f_load(to[i]);
  }
  // Lanes i and i + 8 of the result add up to the sum over the lanes of v[i].
  static F f_sum8(const F v[8]) { return {hsum8(v), _mm256_setzero_ps()}; }
  static F f_join8(F low, F high) {
    return {_mm256_add_ps(low.lo, low.hi), _mm256_add_ps(high.lo, high.hi)};
  }

 private:
  static __m256 hsum8(const F v[8]) {
    __m256 s[8];
    for (int i = 0; i < 8; ++i) s[i] = _mm256_add_ps(v[i].lo, v[i].hi);
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(s[0], s[1]), _mm256_hadd_ps(s[2], s[3]));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(s[4], s[5]), _mm256_hadd_ps(s[6], s[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }
};

}  // namespace
}  // namespace owl
