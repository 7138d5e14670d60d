// Expansion by table and shuffle (SSSE3), for AVX2 and for AVX-512 without VBMI2.
#pragma once

#include <immintrin.h>

#include <cstddef>

#include "expand_tables.h"

namespace owl {
namespace {

// 16 bytes of a cell; advances p past the values it used.
inline __m128i expand_bytes(const std::uint8_t*& p, std::uint32_t mask) {
  const std::uint32_t low = mask & 0xff, high = mask >> 8 & 0xff;
  const auto used = static_cast<std::size_t>(__builtin_popcount(low));
  __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  v = _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(v), reinterpret_cast<const __m64*>(p + used)));
  __m128i order = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kLowBytes.entry[low]));
  order = _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(order), reinterpret_cast<const __m64*>(kHighBytes.entry[high])));
  p += used + static_cast<std::size_t>(__builtin_popcount(high));
  return _mm_shuffle_epi8(v, order);
}

inline __m128i expand_words(const std::uint8_t*& p, std::uint32_t mask) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  p += 2 * static_cast<std::size_t>(__builtin_popcount(mask));
  return _mm_shuffle_epi8(v, _mm_load_si128(reinterpret_cast<const __m128i*>(kWords.entry[mask])));
}

inline __m128i expand_quads(const std::uint8_t*& p, std::uint32_t mask) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  p += 4 * static_cast<std::size_t>(__builtin_popcount(mask));
  return _mm_shuffle_epi8(v, _mm_load_si128(reinterpret_cast<const __m128i*>(kQuads.entry[mask])));
}

}  // namespace
}  // namespace owl
