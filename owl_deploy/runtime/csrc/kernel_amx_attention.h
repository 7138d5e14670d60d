// Attention of many query positions in tiles of bf16. Scores are exact to 16 bits, since those of
// a model with large biases of its keys reach hundreds: queries and keys are each the sum of two
// bf16, and only the product of both rests is left out. Weights and values are rounded once.
#pragma once

#include "kernel_attention.h"
#include "x86_amx.h"

namespace owl {
namespace {

// A float as the sum of two bf16, for 32 of them side by side.
struct TwoHalves {
  V::Cell upper, rest;
  TwoHalves(V::F first, V::F second)
      : upper(side_by_side(first, second)),
        rest(side_by_side(V::f_sub(first, widened<0>(upper)),
                          V::f_sub(second, widened<1>(upper)))) {}

 private:
  template <int Half>
  static V::F widened(V::Cell halves) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(halves, Half)), 16));
  }
};

class Bf16Tiles {
 public:
  // The upper halves, then the rests.
  static std::size_t query_floats(std::size_t size) { return round_up(size, kStepColumns); }

  static void take_query(const float* q, std::size_t size, float* row) {
    const std::size_t columns = query_floats(size);
    for (std::size_t d = 0; d < columns; d += kStepColumns) {
      const TwoHalves halves(V::f_load(q + d), d + 16 < size ? V::f_load(q + d + 16) : zeros());
      V::store_cell(bytes(row) + d * 2, halves.upper);
      V::store_cell(bytes(row) + (columns + d) * 2, halves.rest);
    }
  }

  void score(const AttentionSpan& span, std::size_t begin, std::size_t end, const float* queries,
             std::size_t rows, float* panels, float* scores) const {
    const std::size_t columns = query_floats(span.head_size), steps = columns / kStepColumns;
    const std::size_t group_bytes = steps * kTileBytes, rest = kKeyGroups * group_bytes;
    transpose_keys(span, begin, end, bytes(panels));
    before_tiles();
    for_row_tiles(rows, [&](auto tiles, std::size_t m) {
      const std::uint8_t* x = bytes(queries + m * columns);
      for (std::size_t n = 0; n < kKeyGroups; n += 2) {
        const std::uint8_t* left = bytes(panels) + n * group_bytes;
        const std::uint8_t* right = left + group_bytes;
        const Factors factors[] = {
            {x, left, right}, {x + columns * 2, left, right}, {x, left + rest, right + rest}};
        multiply_tiles<tiles.value, false>(factors, steps, columns * sizeof(float),
                                           scores + m * kKeyBlock + n * kGroupRows, kKeyBlock);
      }
    });
  }

  void mix(const AttentionSpan& span, std::size_t begin, std::size_t end, float* weights,
           std::size_t rows, float* panels, float* sums, std::size_t stride) const {
    constexpr std::size_t steps = kKeyBlock / kStepColumns, group_bytes = steps * kTileBytes;
    pair_values(span, begin, end, bytes(panels));
    for (std::size_t m = 0; m < in_row_tiles(rows); ++m) {  // each row where its first half was
      float* row = weights + m * kKeyBlock;
      for (std::size_t t = 0; t < kKeyBlock; t += kStepColumns)
        V::store_cell(bytes(row) + t * 2,
                      side_by_side(V::f_load(row + t), V::f_load(row + t + 16)));
    }
    before_tiles();
    for_row_tiles(rows, [&](auto tiles, std::size_t m) {
      for (std::size_t d = 0; d < span.head_size; d += 2 * kGroupRows) {
        const std::uint8_t* left = bytes(panels) + d / kGroupRows * group_bytes;
        const Factors factors[] = {{bytes(weights + m * kKeyBlock), left, left + group_bytes}};
        multiply_tiles<tiles.value, true>(factors, steps, kKeyBlock * sizeof(float),
                                          sums + m * stride + d, stride);
      }
    });
  }

 private:
  static constexpr std::size_t kKeyGroups = kKeyBlock / kGroupRows;
  static_assert(kKeyGroups % 2 == 0 && kKeyBlock % kStepColumns == 0);

  static V::F zeros() { return V::f_set1(0.0F); }
  static std::uint8_t* bytes(float* p) { return reinterpret_cast<std::uint8_t*>(p); }
  static const std::uint8_t* bytes(const float* p) {
    return reinterpret_cast<const std::uint8_t*>(p);
  }

  // Panels [upper halves, rests][key groups][steps] of tiles: two dimensions of 16 positions in
  // each of their rows, zero where there is nothing.
  static void transpose_keys(const AttentionSpan& span, std::size_t begin, std::size_t end,
                             std::uint8_t* panels) {
    const std::size_t size = span.head_size, columns = query_floats(size);
    for (std::size_t t = 0; t < kKeyBlock; t += kGroupRows) {
      for (std::size_t d = 0; d < columns; d += kStepColumns) {
        V::F upper[kGroupRows], rest[kGroupRows];
        for (std::size_t r = 0; r < kGroupRows; ++r) {
          const TwoHalves halves(value_at(span.keys, span, begin + t + r, end, d),
                                 value_at(span.keys, span, begin + t + r, end, d + 16));
          upper[r] = _mm512_castsi512_ps(halves.upper);
          rest[r] = _mm512_castsi512_ps(halves.rest);
        }
        std::uint8_t* tile = panels + (t / kGroupRows * columns + d) / kStepColumns * kTileBytes;
        store_turned(upper, tile);
        store_turned(rest, tile + kKeyGroups * columns / kStepColumns * kTileBytes);
      }
    }
  }

  static void store_turned(V::F (&rows)[kGroupRows], std::uint8_t* tile) {
    V::transpose16(rows);
    for (std::size_t r = 0; r < kGroupRows; ++r)
      V::store_cell(tile + r * kStepBytes, _mm512_castps_si512(rows[r]));
  }

  // Panels [groups of 16 dimensions][steps] of tiles: two positions in each of their rows.
  static void pair_values(const AttentionSpan& span, std::size_t begin, std::size_t end,
                          std::uint8_t* panels) {
    for (std::size_t d = 0; d < query_floats(span.head_size); d += kGroupRows)
      for (std::size_t t = begin; t < begin + kKeyBlock; t += 2, panels += kStepBytes)
        V::store_cell(panels, in_turns(value_at(span.values, span, t, end, d),
                                       value_at(span.values, span, t + 1, end, d)));
  }

  // 16 of a position's keys or values from dimension d on; zeros where there are none.
  static V::F value_at(const void* base, const AttentionSpan& span, std::size_t t, std::size_t end,
                       std::size_t d) {
    if (t >= end || d >= span.head_size) return zeros();
    return load_cache<V>(span.cache, base, t * span.head_size + d);
  }

  Tiles tiles_;
};

}  // namespace
}  // namespace owl
