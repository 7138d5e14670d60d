// Expansion by table and shuffle (SSSE3), for AVX2 and for AVX-512 without VBMI2. These processors
// are limited by how many operations they can start: addresses come from counts over the whole
// mask, not from one another, tables are indexed by a rotation and an `and`, and two halves of a
// register are joined while they are loaded.
#pragma once

#include <immintrin.h>

#include <cstddef>

#include "expand_tables.h"
#include "kernel_common.h"

namespace owl {
namespace {

struct Halves {  // of a cell
  __m256i lo, hi;
};

inline __m256i load_pair(const void* a, const void* b) {
  return _mm256_inserti128_si256(
      _mm256_castsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(a))),
      _mm_loadu_si128(static_cast<const __m128i*>(b)), 1);
}

// Where a table of 16 bytes an entry has the one for the bits of `mask` from `bit` on.
template <int bit, class Table, class Mask>
inline const std::uint8_t* entry_of(const Table& table, Mask mask) {
  constexpr int width = 8 * sizeof(Mask);
  constexpr int turn = (bit + width - 4) % width;
  return table.entry[0] + (static_cast<Mask>(mask >> turn | mask << (width - turn) % width) &
                           (sizeof(table.entry) - 16));
}

// 32 bytes, of the mask's bits from `bit` on; the values of the first 16 begin at a, those of the
// last at b.
template <int bit>
inline __m256i expand_bytes_at(const std::uint8_t* a, const std::uint8_t* b, std::uint64_t mask) {
  const __m256i lower =
      load_pair(entry_of<bit>(kLowerHalf, mask), entry_of<bit + 16>(kLowerHalf, mask));
  const __m256i upper =
      load_pair(entry_of<bit + 8>(kUpperHalf, mask), entry_of<bit + 24>(kUpperHalf, mask));
  return _mm256_shuffle_epi8(load_pair(a, b), _mm256_add_epi8(lower, upper));
}

inline Halves expand_bytes(const std::uint8_t* p, std::uint64_t mask) {
  const std::uint8_t* second = p + set_bits(static_cast<std::uint32_t>(mask & 0xffff));
  const std::uint8_t* third = p + set_bits(static_cast<std::uint32_t>(mask));
  return {expand_bytes_at<0>(p, second, mask),
          expand_bytes_at<32>(third, p + set_bits(mask << 16), mask)};
}

// Values of 4 bits in `size` bytes, the first of two in a byte's upper half, as 16 times what they
// stand for; or, if Narrow, as they are stored with their upper bit turned. Either way zero is 0,
// as removed ones become. Reads up to 15 bytes more and writes whole registers: `bytes` has room
// for `size` rounded up to 16.
template <bool Narrow>
inline void widen_nibbles(const std::uint8_t* p, std::size_t size, std::uint8_t* bytes) {
  const __m256i kept = _mm256_set1_epi8(static_cast<char>(Narrow ? 0x0f : 0xf0));
  const __m256i bias = _mm256_set1_epi8(static_cast<char>(Narrow ? 0x08 : 0x80));
  for (std::size_t i = 0; i < size; i += 16) {
    const __m256i pairs =
        _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i)));
    const __m256i first = Narrow ? _mm256_srli_epi16(pairs, 4) : pairs;
    const __m256i both = _mm256_or_si256(first, _mm256_slli_epi16(pairs, Narrow ? 8 : 12));
    _mm256_store_si256(reinterpret_cast<__m256i*>(bytes + 2 * i),
                       _mm256_xor_si256(_mm256_and_si256(both, kept), bias));
  }
}

// Values of 3 bits in `size` bytes, one after the other, as 32 times what they stand for, or Narrow
// as above: 32 of them from 12 bytes at a time. Reads up to 15 bytes more; `bytes` has room for
// whole times 32.
template <bool Narrow>
inline void widen_threes(const std::uint8_t* p, std::size_t size, std::uint8_t* bytes) {
  // Two values are 6 bits, and two bytes hold them wherever they begin: moved to the upper end.
  const __m256i pairs = _mm256_setr_epi8(0, 1, 0, 1, 1, 2, 2, 3, 3, 4, 3, 4, 4, 5, 5, 6,  //
                                         6, 7, 6, 7, 7, 8, 8, 9, 9, 10, 9, 10, 10, 11, 11, 12);
  const __m256i moves = _mm256_set1_epi64x(0x0100004000100400);  // 10, 4, 6 and 8 bits, see below
  const __m256i even = _mm256_set1_epi16(Narrow ? 0x0007 : 0x00e0);
  const __m256i odd = _mm256_set1_epi16(static_cast<std::int16_t>(Narrow ? 0x0700 : 0xe000));
  const __m256i bias = _mm256_set1_epi8(static_cast<char>(Narrow ? 0x04 : 0x80));
  for (std::size_t i = 0; i < size; i += 12, bytes += 32) {
    const __m256i both =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i)));
    const __m256i upper = _mm256_mullo_epi16(_mm256_shuffle_epi8(both, pairs), moves);
    const __m256i second = Narrow ? _mm256_srli_epi16(upper, 5) : upper;
    const __m256i values =
        _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(upper, Narrow ? 10 : 5), even),
                        _mm256_and_si256(second, odd));
    _mm256_store_si256(reinterpret_cast<__m256i*>(bytes), _mm256_xor_si256(values, bias));
  }
}

// Wider values, `lanes` of them in 16 bytes, by the table of their shuffles.
template <int lanes, class Table>
inline Halves expand_lanes(const Table& table, const std::uint8_t* p, std::uint32_t mask) {
  auto after = [&](int quarters) {
    return p + 16 / lanes * set_bits(mask & ((1U << quarters * lanes) - 1));
  };
  const __m256i lo = load_pair(entry_of<0>(table, mask), entry_of<lanes>(table, mask));
  const __m256i hi = load_pair(entry_of<2 * lanes>(table, mask), entry_of<3 * lanes>(table, mask));
  return {_mm256_shuffle_epi8(load_pair(p, after(1)), lo),
          _mm256_shuffle_epi8(load_pair(after(2), after(3)), hi)};
}

inline Halves expand_words(const std::uint8_t* p, std::uint32_t mask) {
  return expand_lanes<8>(kWords, p, mask);
}
inline Halves expand_quads(const std::uint8_t* p, std::uint32_t mask) {
  return expand_lanes<4>(kQuads, p, mask);
}

}  // namespace
}  // namespace owl
