// The packed weight format, version 4: one little-endian block of bytes, described in full in
// pack.py.
//
// A weight [rows, cols] is cut into groups of 16 output rows; a group is a sequence of *cells*. A
// cell is 16 rows x `pack` consecutive columns (pack = 1 fp32, 2 bf16, 4 integers), 64 bytes
// once expanded, row-major: one vector register whose every 32-bit lane belongs to one output. So a
// matrix-vector product keeps 16 outputs in one register and never adds across lanes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>

// Functions that kernel files call must leave no symbol behind: the linker would pick one file's
// copy, with that file's instruction set, for every processor.
#define OWL_ALWAYS_INLINE __attribute__((always_inline))
#define OWL_INLINE inline OWL_ALWAYS_INLINE

namespace owl {

// Places in a block are checked in 64 bits and then used as std::size_t: where that is narrower, a
// weight that is too large would pass.
static_assert(sizeof(std::size_t) == 8, "the engine needs a processor of 64 bits");

OWL_INLINE constexpr std::size_t divide_up(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

enum class ValueType : std::uint32_t { kFp32 = 1, kBf16 = 2, kInt8 = 3, kInt4 = 4, kInt3 = 5 };

// How values lie: those of set mask bits; all of them; or int8 in two planes, its upper 4 bits in
// cells, from which alone a product can be had to within some percent, and its lower 4 bits row by
// row, for the rows that need them.
enum class Storage { kSparse, kDense, kPlanes };

constexpr std::size_t kGroupRows = 16;
constexpr std::size_t kCellBytes = 64;
constexpr std::size_t kBlockCells =
    8;  // integers: one scale of the activations for 8 cells = 32 columns
constexpr std::size_t kBlockColumns = 32;
constexpr std::size_t kLowColumns = 128;  // columns that 64 bytes of the low plane hold
// Four cells of 3 bits a value: the lower two bits of their values in the pairs of bits of 64
// bytes, the upper ones in four masks of 8 bytes behind these.
constexpr std::size_t kThreeBitBytes = 96;

// A width of values, to overload functions on.
template <std::size_t N>
struct Bits {};

// What tells the types of values apart. Whatever depends on the type asks its row in kValueTraits,
// or is overloaded on the Bits of that row: a type that lacks an overload does not compile.
struct ValueTraits {
  ValueType type;
  std::size_t stored_bits;  // of a value in the block
  std::size_t cell_bits;    // of a value in an expanded cell: 8 meet int8 activations, in integers
  bool planes = false;      // whether they may lie in planes

  // Which is also how many values share one 32-bit lane.
  OWL_INLINE constexpr std::size_t columns_per_cell() const { return 32 / cell_bits; }
  OWL_INLINE constexpr std::size_t values_per_cell() const {
    return kGroupRows * columns_per_cell();
  }
  OWL_INLINE constexpr std::size_t stored_bytes(std::size_t values) const {
    return stored_bits % 8 == 0 ? values * (stored_bits / 8) : (values * stored_bits + 7) / 8;
  }
  // Integers have scales.
  OWL_INLINE constexpr bool integer() const { return cell_bits == 8; }
  // Of a sparse group: whether the values of a cell begin where those of the one before it end, to
  // the bit, and not on a byte of their own.
  OWL_INLINE constexpr bool unbroken() const { return stored_bits == 3; }
};

// A type is known by its place here, counted from 1.
constexpr ValueTraits kValueTraits[] = {
    {.type = ValueType::kFp32, .stored_bits = 32, .cell_bits = 32},
    {.type = ValueType::kBf16, .stored_bits = 16, .cell_bits = 16},
    {.type = ValueType::kInt8, .stored_bits = 8, .cell_bits = 8, .planes = true},
    // In [-8, 7], stored plus 8; in a cell 16 times that, as the upper bits of planes are.
    {.type = ValueType::kInt4, .stored_bits = 4, .cell_bits = 8},
    // In [-4, 3], stored plus 4; in a cell 32 times that.
    {.type = ValueType::kInt3, .stored_bits = 3, .cell_bits = 8},
};
constexpr std::size_t kValueTypes = sizeof(kValueTraits) / sizeof(kValueTraits[0]);

OWL_INLINE constexpr const ValueTraits& traits_of(ValueType type) {
  return kValueTraits[static_cast<std::size_t>(type) - 1];
}

constexpr bool traits_are_sound() {
  for (std::size_t i = 0; i < kValueTypes; ++i) {
    const ValueTraits& t = kValueTraits[i];
    if (static_cast<std::size_t>(t.type) != i + 1) return false;
    if (t.planes && (t.stored_bits != 8 || !t.integer())) return false;
  }
  return true;
}
static_assert(traits_are_sound());

// How the fp32 bits of a scale are had from its byte: these bits of it as a signed integer, moved
// to the left, and the exponent that all scales of the weight begin with.
struct ScaleCode {
  std::uint32_t exponent_bits = 0;
  std::uint32_t mask = 0x07f80000;
  std::int32_t shift = 19;

  // 4 bits of exponent and 4 of mantissa, or a sign, 4 and 3.
  static ScaleCode of(std::uint32_t exponent, bool has_signs) {
    return has_signs ? ScaleCode{exponent << 23, 0x87f00000, 20}
                     : ScaleCode{exponent << 23, 0x07f80000, 19};
  }
  OWL_INLINE float decoded(std::uint8_t byte) const {
    const std::uint32_t wide = (std::uint32_t{byte} ^ 0x80U) - 0x80U;  // its sign in all upper bits
    const std::uint32_t bits = (wide << shift & mask) + exponent_bits;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return scale;
  }
};

// A validated view of a packed weight; it owns nothing.
struct PackedMatrix {
  ValueType type = ValueType::kFp32;
  Storage storage = Storage::kDense;
  std::size_t rows = 0;          // outputs
  std::size_t cols = 0;          // inputs
  std::size_t groups = 0;        // ceil(rows / 16)
  std::size_t cells = 0;         // in each group; a multiple of 4
  std::size_t scale_blocks = 0;  // scales of each row
  unsigned scale_shift = 0;      // 32 << scale_shift columns share a scale
  std::size_t mask_bytes = 0;    // of a cell, if sparse
  std::size_t group_bytes = 0;   // of a group that is not sparse; with planes, of its upper bits
  std::uint64_t nonzeros = 0;
  const std::uint8_t* data = nullptr;  // the block
  std::size_t size = 0;
  const std::uint8_t* masks =
      nullptr;  // sparse: [groups][cells][2 * pack] bytes, bit = row * pack + column
  const std::uint32_t* index =
      nullptr;  // sparse: [groups + 1], start of a group's values in units of 64 bytes
  const std::uint8_t* scales = nullptr;  // integers: [groups][scale_blocks][16]
  ScaleCode scale_code;
  const std::uint8_t* values = nullptr;  // packed values; 64 readable bytes follow the last

  OWL_INLINE const ValueTraits& traits() const { return traits_of(type); }
  OWL_INLINE bool sparse() const { return storage == Storage::kSparse; }
  // Blocks of int8 activations that meet a row.
  OWL_INLINE std::size_t blocks() const { return (cells + kBlockCells - 1) / kBlockCells; }
  // Of a group's values if all of them are stored.
  OWL_INLINE std::size_t dense_group_bytes() const {
    return traits().stored_bytes(cells * traits().values_per_cell());
  }
  OWL_INLINE const std::uint8_t* group_scales(std::size_t group) const {
    return scales + group * scale_blocks * kGroupRows;
  }
  OWL_INLINE const std::uint8_t* group_masks(std::size_t group) const {
    return masks + group * cells * mask_bytes;
  }
  OWL_INLINE const std::uint8_t* group_values(std::size_t group) const {
    if (storage == Storage::kSparse)
      return values + static_cast<std::size_t>(index[group]) * kCellBytes;
    return values + group * group_bytes;
  }
  OWL_INLINE std::size_t low_row_bytes() const {
    return (cols + kLowColumns - 1) / kLowColumns * kCellBytes;
  }
  OWL_INLINE const std::uint8_t* low_row(std::size_t row) const {
    return values + groups * group_bytes + row * low_row_bytes();
  }

  // 16 times one value of a dense int4 weight, or the upper bits of one in planes.
  OWL_INLINE int upper(std::size_t row, std::size_t column) const {
    const std::size_t cell = column / 4;
    const std::uint8_t both =
        group_values(row / kGroupRows)[cell / 2 * kCellBytes + row % kGroupRows * 4 + column % 4];
    return 16 * ((both >> cell % 2 * 4 & 15) - 8);
  }
  // 32 times one value of a dense int3 weight.
  OWL_INLINE int three_bits(std::size_t row, std::size_t column) const {
    const std::size_t cell = column / 4, place = cell % 4, lane = row % kGroupRows * 4 + column % 4;
    const std::uint8_t* quad = group_values(row / kGroupRows) + cell / 4 * kThreeBitBytes;
    const int lower = quad[lane] >> 2 * place & 3;
    const int upper = quad[kCellBytes + 8 * place + lane / 8] >> lane % 8 & 1;
    return 32 * (4 * upper + lower - 4);
  }
  // One value of a weight in planes.
  OWL_INLINE int joined(std::size_t row, std::size_t column) const {
    const std::size_t place = column % kLowColumns;
    const std::uint8_t low = low_row(row)[column / kLowColumns * kCellBytes + place % kCellBytes];
    return upper(row, column) + (low >> place / kCellBytes * 4 & 15) - 8;
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

template <ValueType T>
struct Type {
  static constexpr ValueTraits kTraits = traits_of(T);
};
template <ValueType T, Storage S>
struct Form : Type<T> {
  static constexpr Storage kStorage = S;
};

template <class Work, std::size_t... Row>
OWL_INLINE void with_row(ValueType type, const Work& work, std::index_sequence<Row...>) {
  ((type == kValueTraits[Row].type ? work(Type<kValueTraits[Row].type>{}) : void()), ...);
}

// Calls work(Type) with the traits of `type` as constants.
template <class Work>
OWL_INLINE void with_type(ValueType type, const Work& work) {
  with_row(type, work, std::make_index_sequence<kValueTypes>{});
}

// Calls work(Form) with a weight's traits and storage as constants.
template <class Work>
OWL_INLINE void with_form(const PackedMatrix& w, const Work& work) {
  with_type(w.type, [&](auto type) OWL_ALWAYS_INLINE {
    constexpr ValueTraits kTraits = type.kTraits;
    switch (w.storage) {
      case Storage::kSparse: return work(Form<kTraits.type, Storage::kSparse>{});
      case Storage::kDense: return work(Form<kTraits.type, Storage::kDense>{});
      case Storage::kPlanes:
        if constexpr (kTraits.planes) return work(Form<kTraits.type, Storage::kPlanes>{});
        return;
    }
  });
}

// Checks every count, offset and mask of `data` [size] and fills `matrix`; returns "" or what is
// wrong. After success no kernel can read outside [data, data + size), whatever the bytes hold.
std::string parse_packed(const void* data, std::size_t size, PackedMatrix* matrix);

}  // namespace owl
