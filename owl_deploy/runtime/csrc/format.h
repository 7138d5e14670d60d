// The packed weight format, version 2: one little-endian block of bytes, described in full in
// pack.py.
//
// A weight [rows, cols] is cut into groups of 16 output rows; a group is a sequence of *cells*. A
// cell is 16 rows x `pack` consecutive columns (pack = 1 fp32, 2 bf16, 4 int8), 64 bytes once
// expanded, row-major: one vector register whose every 32-bit lane belongs to one output. So a
// matrix-vector product keeps 16 outputs in one register and never adds across lanes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

// Functions that kernel files call must leave no symbol behind: the linker would pick one file's
// copy, with that file's instruction set, for every processor.
#define OWL_INLINE inline __attribute__((always_inline))

namespace owl {

enum class ValueType : std::uint32_t { kFp32 = 1, kBf16 = 2, kInt8 = 3 };

// How values lie: those of set mask bits; all of them; or int8 in two planes, its upper 4 bits in
// cells, from which alone a product can be had to within some percent, and its lower 4 bits row by
// row, for the rows that need them.
enum class Storage { kSparse, kDense, kPlanes };

constexpr std::size_t kGroupRows = 16;
constexpr std::size_t kCellBytes = 64;
constexpr std::size_t kBlockCells =
    8;  // int8: one scale for 8 cells = 32 columns, of activations and of each row
constexpr std::size_t kBlockColumns = 32;
constexpr std::size_t kLowColumns = 128;  // columns that 64 bytes of the low plane hold

// Columns in a cell, which is also how many values share one 32-bit lane.
OWL_INLINE constexpr std::size_t columns_per_cell(ValueType type) {
  return type == ValueType::kFp32 ? 1 : type == ValueType::kBf16 ? 2 : 4;
}

OWL_INLINE constexpr std::size_t value_bytes(ValueType type) { return 4 / columns_per_cell(type); }

// A validated view of a packed weight; it owns nothing.
struct PackedMatrix {
  ValueType type = ValueType::kFp32;
  Storage storage = Storage::kDense;
  std::size_t rows = 0;    // outputs
  std::size_t cols = 0;    // inputs
  std::size_t groups = 0;  // ceil(rows / 16)
  std::size_t cells = 0;   // in each group; a multiple of 4
  std::uint64_t nonzeros = 0;
  const std::uint8_t* data = nullptr;  // the block
  std::size_t size = 0;
  const std::uint8_t* masks =
      nullptr;  // sparse: [groups][cells][2 * pack] bytes, bit = row * pack + column
  const std::uint32_t* index =
      nullptr;  // sparse: [groups + 1], start of a group's values in units of 64 bytes
  const std::uint8_t* scales = nullptr;  // int8: [groups][scale_blocks][16], see scale_bits
  std::uint32_t scale_exponent = 0;
  const std::uint8_t* values = nullptr;  // packed values; 64 readable bytes follow the last

  OWL_INLINE bool sparse() const { return storage == Storage::kSparse; }
  OWL_INLINE std::size_t scale_blocks() const { return (cells + kBlockCells - 1) / kBlockCells; }
  OWL_INLINE const std::uint8_t* group_scales(std::size_t group) const {
    return scales + group * scale_blocks() * kGroupRows;
  }
  // The fp32 bits of a scale: 4 bits of exponent, counted from the weight's own, and 4 of mantissa.
  OWL_INLINE std::uint32_t scale_bits(std::uint8_t code) const {
    return (scale_exponent << 23) + (static_cast<std::uint32_t>(code) << 19);
  }
  OWL_INLINE std::size_t mask_bytes_per_cell() const { return 2 * columns_per_cell(type); }
  OWL_INLINE const std::uint8_t* group_masks(std::size_t group) const {
    return masks + group * cells * mask_bytes_per_cell();
  }
  OWL_INLINE const std::uint8_t* group_values(std::size_t group) const {
    if (storage == Storage::kSparse)
      return values + static_cast<std::size_t>(index[group]) * kCellBytes;
    return values + group * whole_group_bytes();
  }
  // Of a group that is not sparse; with planes, of its upper bits.
  OWL_INLINE std::size_t whole_group_bytes() const {
    return storage == Storage::kPlanes ? cells / 2 * kCellBytes : cells * kCellBytes;
  }
  OWL_INLINE std::size_t low_row_bytes() const {
    return (cols + kLowColumns - 1) / kLowColumns * kCellBytes;
  }
  OWL_INLINE const std::uint8_t* low_row(std::size_t row) const {
    return values + groups * whole_group_bytes() + row * low_row_bytes();
  }

  // One value of a weight in planes.
  OWL_INLINE int joined(std::size_t row, std::size_t column) const {
    const std::size_t cell = column / 4, place = column % kLowColumns;
    const std::uint8_t high =
        group_values(row / kGroupRows)[cell / 2 * kCellBytes + row % kGroupRows * 4 + column % 4];
    const std::uint8_t low = low_row(row)[column / kLowColumns * kCellBytes + place % kCellBytes];
    return 16 * ((high >> cell % 2 * 4 & 15) - 8) + (low >> place / kCellBytes * 4 & 15) - 8;
  }

  // Views a copy of the block instead.
  void move_to(const std::uint8_t* copy) {
    auto moved = [&](const void* p) { return copy + (static_cast<const std::uint8_t*>(p) - data); };
    if (masks != nullptr) masks = moved(masks);
    if (index != nullptr) index = reinterpret_cast<const std::uint32_t*>(moved(index));
    if (scales != nullptr) scales = moved(scales);
    values = moved(values);
    data = copy;
  }
};

// Checks every count, offset and mask of `data` [size] and fills `matrix`; returns "" or what is
// wrong. After success no kernel can read outside [data, data + size), whatever the bytes hold.
std::string parse_packed(const void* data, std::size_t size, PackedMatrix* matrix);

}  // namespace owl
