// AMX's tiles, beside AVX-512.
#pragma once

#include "kernel_common.h"
#include "x86_avx512_bf16.h"

namespace owl {
namespace {

using V = Avx512;
constexpr std::size_t kStepBytes = 64;                     // of a row of activations in a tile
constexpr std::size_t kStepColumns = 32;                   // which are so many columns in bf16
constexpr std::size_t kTileBytes = kRowTile * kStepBytes;  // of activations, weights or sums
static_assert(kRowTile == 16 && kStepBytes == kStepColumns * sizeof(V::Half));

struct TileShape {
  std::uint8_t rows = kRowTile;
  std::uint16_t bytes = kStepBytes;  // of a row
};

// What LDTILECFG reads (Intel's manual, volume 1, "TILECFG"): the tiles' shapes, the first ones' as
// they are given.
class Tiles {
 public:
  template <class... Shapes>
  explicit Tiles(Shapes... first) {
    const TileShape shapes[8] = {first...};
    struct alignas(64) {
      std::uint8_t palette = 1, first_row = 0, reserved[14] = {};
      std::uint16_t bytes[16] = {};
      std::uint8_t rows[16] = {};
    } config;
    static_assert(sizeof(config) == 64);
    for (int i = 0; i < 8; ++i) {
      config.bytes[i] = shapes[i].bytes;
      config.rows[i] = shapes[i].rows;
    }
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// GCC 12 does not know that tiles are loaded from memory: what was written there is, before this.
inline void before_tiles() { __asm__ volatile("" ::: "memory"); }

// A tile of activations, and one of weights for each of two groups of 16 outputs.
struct Factors {
  const std::uint8_t *x, *left, *right;
};

// Rows * 16 rows of activations, `stride` bytes apart, times two groups of outputs, `steps` tiles
// of each of the factors: added to sums [.., sums_stride], or put there where nothing is yet.
template <std::size_t Rows, bool Add, std::size_t Count>
inline void multiply_tiles(const Factors (&factors)[Count], std::size_t steps, std::size_t stride,
                           float* left, std::size_t sums_stride) {
  const std::size_t row_bytes = sums_stride * sizeof(float);
  float* right = left + kGroupRows;
  if constexpr (Add) {
    _tile_loadd(0, left, row_bytes);
    _tile_loadd(1, right, row_bytes);
    if constexpr (Rows == 2) {
      _tile_loadd(2, left + kRowTile * sums_stride, row_bytes);
      _tile_loadd(3, right + kRowTile * sums_stride, row_bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (const Factors& f : factors) {
    for (std::size_t k = 0; k < steps; ++k) {
      _tile_loadd(4, f.x + k * kStepBytes, stride);
      _tile_loadd(6, f.left + k * kTileBytes, kStepBytes);
      _tile_loadd(7, f.right + k * kTileBytes, kStepBytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (Rows == 2) {
        _tile_loadd(5, f.x + kRowTile * stride + k * kStepBytes, stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, left, row_bytes);
  _tile_stored(1, right, row_bytes);
  if constexpr (Rows == 2) {
    _tile_stored(2, left + kRowTile * sums_stride, row_bytes);
    _tile_stored(3, right + kRowTile * sums_stride, row_bytes);
  }
}

// Calls multiply(how many tiles of rows at once, first row) for all of `rows`.
template <class Multiply>
void for_row_tiles(std::size_t rows, Multiply multiply) {
  std::size_t m = 0;
  for (; m + kRowTile < rows; m += 2 * kRowTile)
    multiply(std::integral_constant<std::size_t, 2>{}, m);
  if (m < rows) multiply(std::integral_constant<std::size_t, 1>{}, m);
}

// bf16 of 32 floats side by side.
inline V::Cell side_by_side(V::F first, V::F second) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}

// bf16 of two rows of 16 floats, a column of both in each 32 bits, as tiles of weights have them.
inline V::Cell in_turns(V::F first, V::F second) {
  const __m512i turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(turns, side_by_side(first, second));
}

}  // namespace
}  // namespace owl
