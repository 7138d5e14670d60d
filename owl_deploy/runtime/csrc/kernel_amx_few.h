// A few rows in AMX's tiles of bytes: all of them meet a block of a weight at once. The integer
// sums of a block leave the tiles to be scaled, which is less work than to make them; they are
// exact, and scaled in the order in which one row's are, so that a row says the same.
#pragma once

#include "x86_amx.h"

namespace owl {
namespace {

constexpr std::size_t kBlockBytes = kBlockCells * kCellBytes;  // of a tile of weights, 8 rows
// Blocks under way at once: one is unpacked, one multiplied, and one added up, which so does not
// wait for what has just been stored.
constexpr std::size_t kUnderWay = 4;

template <class Form, std::size_t Rows>
struct FewInTiles {
  using Stream = CellStream<V, Form>;
  using Total = V::F[Rows];

  const PackedMatrix& w;
  const ActivationLayout& layout;
  const std::uint8_t* rows;
  alignas(64) std::uint8_t cells[2][kUnderWay][kBlockBytes];
  alignas(64) std::int32_t products[2][kUnderWay][Rows * kGroupRows];

  FewInTiles(const PackedMatrix& weight, const ActivationLayout& x_layout, const std::uint8_t* x)
      : w(weight), layout(x_layout), rows(x) {}

  // Signed bytes, as they are in `dot` but for the bias; zeros where a block is only half there.
  OWL_INLINE void unpack(Stream& stream, std::size_t b, std::uint8_t* to) const {
    const auto store = [&](const auto& block) OWL_ALWAYS_INLINE {
      for (std::size_t i = 0; i < std::size(block.cell); ++i)
        V::store_cell(to + i * kCellBytes, V::bias8(block.cell[i]));
    };
    if ((b + 1) * kBlockCells <= w.cells) {
      store(CellBlock<V, kBlockCells>(stream));
    } else {
      std::memset(to, 0, kBlockBytes);
      store(CellBlock<V, kBlockCells / 2>(stream));
    }
  }

  OWL_INLINE void multiply(std::size_t b) {
    constexpr std::size_t row_bytes = kGroupRows * sizeof(std::int32_t);
    before_tiles();
    _tile_zero(0);
    _tile_zero(1);
    _tile_loadd(2, rows + b * kBlockColumns, layout.stride);
    _tile_loadd(3, cells[0][b % kUnderWay], kCellBytes);
    _tile_loadd(4, cells[1][b % kUnderWay], kCellBytes);
    _tile_dpbssd(0, 2, 3);
    _tile_dpbssd(1, 2, 4);
    _tile_stored(0, products[0][b % kUnderWay], row_bytes);
    _tile_stored(1, products[1][b % kUnderWay], row_bytes);
  }

  OWL_INLINE void add(std::size_t b, const std::uint8_t* const (&scales)[2],
                      Total (&total)[2]) const {
    const std::size_t at = (b >> w.scale_shift) * kGroupRows;
    const V::F left = V::f_load_scales(scales[0] + at, w.scale_code),
               right = V::f_load_scales(scales[1] + at, w.scale_code);
    const std::uint8_t* row = rows + layout.scale_offset + b * sizeof(float);
#pragma GCC unroll 16
    for (std::size_t m = 0; m < Rows; ++m, row += layout.stride) {
      float scale;
      std::memcpy(&scale, row, sizeof(scale));
      const V::F own = V::f_set1(scale);
      const auto sums = [&](std::size_t n) OWL_ALWAYS_INLINE {
        return V::to_float(V::load_cell(products[n][b % kUnderWay] + m * kGroupRows));
      };
      total[0][m] = V::f_fma(sums(0), V::f_mul(left, own), total[0][m]);
      total[1][m] = V::f_fma(sums(1), V::f_mul(right, own), total[1][m]);
    }
  }

  // Groups g and `second`, which may be the same.
  void groups(std::size_t g, std::size_t second, float* sums, std::size_t stride,
              std::size_t count) {
    Widened<Stream::kWidens> rooms[2];
    Stream left(w, g, rooms[0]), right(w, second, rooms[1]);
    const std::uint8_t* const scales[2] = {w.group_scales(g), w.group_scales(second)};
    prefetch_scales(w, g + 2);
    prefetch_scales(w, g + 3);
    const std::size_t blocks = divide_up(w.cells, kBlockCells);
    Total total[2];
    for (std::size_t m = 0; m < Rows; ++m) total[0][m] = total[1][m] = V::f_set1(0.0F);
    const auto next = [&](std::size_t b) OWL_ALWAYS_INLINE {
      unpack(left, b, cells[0][b % kUnderWay]);
      unpack(right, b, cells[1][b % kUnderWay]);
    };
    next(0);
    for (std::size_t b = 0; b < blocks; ++b) {
      if (b + 1 < blocks) next(b + 1);
      multiply(b);
      if (b > 0) add(b - 1, scales, total);
    }
    before_tiles();
    add(blocks - 1, scales, total);
    for (std::size_t m = 0; m < count; ++m) {
      V::f_store(sums + m * stride, total[0][m]);
      if (second != g) V::f_store(sums + m * stride + kGroupRows, total[1][m]);
    }
  }
};

template <class Form, std::size_t Rows>
void few_in_tiles(const PackedMatrix& w, std::size_t begin, std::size_t end,
                  const ActivationLayout& layout, const std::uint8_t* rows, std::size_t count,
                  float* sums, std::size_t stride) {
  constexpr auto some = static_cast<std::uint8_t>(Rows);
  const TileShape sum{some}, x{some, kBlockColumns}, weights{kBlockCells};
  const Tiles tiles(sum, sum, x, weights, weights);
  FewInTiles<Form, Rows> work(w, layout, rows);
  for (std::size_t g = begin; g < end; g += 2, sums += 2 * kGroupRows)
    work.groups(g, smaller(g + 1, end - 1), sums, stride, count);
}

// Fewer rows meet a block sooner one by one.
void few_of_any(const PackedMatrix& w, std::size_t begin, std::size_t end,
                const ActivationLayout& layout, const std::uint8_t* rows, std::size_t count,
                float* sums, std::size_t stride) {
  with_form(w, [&](auto form) {
    using Form = decltype(form);
    constexpr bool expands_halves =
        Form::kStorage == Storage::kSparse && Form::kTraits.stored_bits < 8;
    constexpr std::size_t least = expands_halves ? 9 : 8;
    const auto in_tiles = [&](auto most) OWL_ALWAYS_INLINE {
      few_in_tiles<Form, most.value>(w, begin, end, layout, rows, count, sums, stride);
    };
    if constexpr (!Form::kTraits.integer())
      few_float<V, Form>(w, begin, end, layout, rows, count, sums, stride);
    else if (count < least)
      few_integer<V, Form>(w, begin, end, layout, rows, count, sums, stride);
    else if (count <= 8)
      in_tiles(std::integral_constant<std::size_t, 8>{});
    else if (count <= 12)
      in_tiles(std::integral_constant<std::size_t, 12>{});
    else
      in_tiles(std::integral_constant<std::size_t, kFewRows>{});
  });
}

}  // namespace
}  // namespace owl
