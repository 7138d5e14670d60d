// What all kernels share: they are written once, over a small set of vector operations `V` that
// each instruction set provides.
//
// V has: F (16 floats), I (16 int32), Cell (64 bytes of weights), their elementary operations,
// `expand` (packed values + mask -> cell) for each width of stored values, and `dot` (cell times
// activations, added to 16 sums) for each width in a cell.
//
// Everything here and in kernel_*.h is in an anonymous namespace and calls nothing that the linker
// could share between files: each kernel file is compiled with flags of its own, and a shared
// inline function would carry one file's instructions to every processor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace owl {
namespace {

constexpr std::size_t kPrefetchBytes = 2048;  // without it the loops reach a third of the bandwidth
// For several rows of a dense weight: into the second-level cache, which can wait for more lines
// than the first, from so far that memory stays busy while the rows are multiplied.
constexpr std::size_t kPrefetchFarBytes = 8192;

inline std::size_t smaller(std::size_t a, std::size_t b) { return a < b ? a : b; }
inline std::size_t round_up(std::size_t n, std::size_t to) { return (n + to - 1) / to * to; }
inline int load32(const void* p) {
  int v;
  std::memcpy(&v, p, 4);
  return v;
}
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
// Into the second-level cache: more of these can be under way at once, for what is needed some
// microseconds later.
inline void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

// A cell's mask: a bit for each of its 16 rows x 1, 2 or 4 columns.
template <std::size_t Columns>
using Mask = std::conditional_t<Columns == 4, std::uint64_t,
                                std::conditional_t<Columns == 2, std::uint32_t, std::uint16_t>>;

template <class M>
inline std::size_t set_bits(M mask) {
  static_assert(8 * sizeof(M) >= kGroupRows, "a mask has a bit for each row");
  if constexpr (sizeof(M) == 8)
    return static_cast<std::size_t>(__builtin_popcountll(mask));
  else
    return static_cast<std::size_t>(__builtin_popcount(mask));
}

// 4-bit values for an instruction set that expands bytes, but not halves of them: so many as bytes
// at a time. For a load of what has just been stored in parts waits until that has reached the
// cache; here most of it did long before.
constexpr std::size_t kWidenedBytes = 512;  // of packed values
constexpr std::size_t kCellNibbles = 32;    // bytes, at most

template <bool Needed>
struct Widened {
  alignas(64) std::uint8_t values[2 * kWidenedBytes];
};
template <>
struct Widened<false> {};

// How cells of integers meet int8 activations, in exact sums. A block's correction, -128 times the
// sum of its activations, makes up for a bias that the weights were given, so that they are
// unsigned.
//
// In sums of 32 bits:
template <class V>
struct Wide {
  static constexpr bool kCorrected = V::kBiased;
  static constexpr int kRows = V::kInt8Rows;  // that a panel multiplies at once
  static constexpr bool kKeepsTotals = true;  // of several blocks in registers

  static typename V::I begin(std::int32_t correction) {
    return V::i_set1(kCorrected ? correction : 0);
  }
  static typename V::I add(typename V::I sum, typename V::Cell w, typename V::Cell x) {
    return V::dot(Bits<8>{}, sum, w, x);
  }
  static typename V::I join(typename V::I a, typename V::I b) { return V::i_add(a, b); }
  static typename V::I end(typename V::I sum, std::int32_t) { return sum; }
};

// In sums of 16 bits, where no instruction adds products of bytes up in 32: values of at most 4
// bits leave room for a block's. A cell has its values less the least that there is, and not as
// multiples.
template <class V, std::size_t StoredBits>
struct Narrow {
  static constexpr bool kCorrected = true;
  static constexpr int kRows = V::kNarrowRows;
  static constexpr bool kKeepsTotals = false;
  static constexpr int kUnit = 1 << (8 - StoredBits);  // of what a value stands for
  static_assert(2 * kBlockCells * ((1 << StoredBits) - 1) * 127 < 1 << 15);

  static typename V::I begin(std::int32_t) { return V::i_set1(0); }
  static typename V::I add(typename V::I sum, typename V::Cell w, typename V::Cell x) {
    return V::narrow_dot(sum, w, x);
  }
  static typename V::I join(typename V::I a, typename V::I b) { return V::narrow_add(a, b); }
  static typename V::I end(typename V::I sum, std::int32_t correction) {
    return V::i_add(V::template narrow_sums<kUnit>(sum), V::i_set1(correction));
  }
};

constexpr std::size_t kPlaneBits = 4;  // of the upper plane

template <class V, class Form>
constexpr auto products_of() {
  constexpr ValueTraits kTraits = Form::kTraits;
  constexpr std::size_t bits =
      Form::kStorage == Storage::kPlanes ? kPlaneBits : kTraits.stored_bits;
  if constexpr (V::kNarrowRows > 0 && kTraits.integer() && bits <= 4)
    return Narrow<V, bits>{};
  else
    return Wide<V>{};
}
// Of what the cells of a form hold, which of planes is their upper bits.
template <class V, class Form>
using Products = decltype(products_of<V, Form>());

// Walks the cells of one row group, expanding each.
template <class V, class Form>
struct CellStream {
  static constexpr ValueTraits kTraits = Form::kTraits;
  static constexpr Storage kStorage = Form::kStorage;
  // Two cells in the halves of 64 bytes.
  static constexpr bool kPaired =
      kStorage == Storage::kPlanes || (kStorage == Storage::kDense && kTraits.stored_bits == 4);
  static constexpr bool kThreeBits = kStorage == Storage::kDense && kTraits.stored_bits == 3;
  static constexpr bool kWidens =
      kStorage == Storage::kSparse && kTraits.stored_bits == 4 && V::kWidens;
  static constexpr bool kNarrow = !std::is_same_v<Products<V, Form>, Wide<V>>;

  const std::uint8_t* mask = nullptr;
  const std::uint8_t* value = nullptr;
  // Of those that are widened: their bytes, what the first was made of, and where the group ends.
  std::uint8_t* widened = nullptr;
  std::uintptr_t first = 0;
  const std::uint8_t* end = nullptr;

  CellStream() = default;
  CellStream(const PackedMatrix& w, std::size_t group, Widened<kWidens>& room)
      : mask(kStorage == Storage::kSparse ? w.group_masks(group) : nullptr),
        value(w.group_values(group)) {
    if constexpr (kWidens) {
      widened = room.values;
      end = w.group_values(group + 1);
    }
  }

  // The next cell, at the places 0 to 3 in turn; integers as their `Products` take them.
  template <std::size_t Place>
  typename V::Cell next() {
    if constexpr (kStorage == Storage::kSparse) {
      Mask<kTraits.columns_per_cell()> bits;
      std::memcpy(&bits, mask, sizeof(bits));
      mask += sizeof(bits);
      const typename V::Cell cell = expand(bits);
      value += kTraits.stored_bytes(set_bits(bits));
      return ready(cell);
    } else if constexpr (kPaired) {
      constexpr bool upper = Place % 2 == 1;
      const typename V::Cell both = V::load_cell(value);
      if constexpr (upper) value += kCellBytes;
      if constexpr (kNarrow)
        return V::template narrow_nibbles<upper>(both);
      else
        return ready(V::template nibbles<upper>(both));
    } else if constexpr (kThreeBits) {
      const std::uint8_t* quad = value;
      if constexpr (Place == 3) value += kThreeBitBytes;
      if constexpr (kNarrow)
        return V::template narrow_three_bits<Place>(quad);
      else
        return ready(V::template three_bits<Place>(quad));
    } else {
      static_assert(kTraits.stored_bits == kTraits.cell_bits);
      const typename V::Cell cell = V::load_cell(value);
      value += kCellBytes;
      return ready(cell);
    }
  }

  template <class M>
  typename V::Cell expand(M bits) {
    if constexpr (kWidens) {
      std::size_t at = reinterpret_cast<std::uintptr_t>(value) - first;
      if (at > kWidenedBytes - kCellNibbles) {
        V::widen(value, smaller(kWidenedBytes, static_cast<std::size_t>(end - value)), widened);
        first = reinterpret_cast<std::uintptr_t>(value);
        at = 0;
      }
      return V::expand(Bits<8>{}, widened + 2 * at, bits);
    } else {
      return V::expand(Bits<kTraits.stored_bits>{}, value, bits);
    }
  }

  static typename V::Cell ready(typename V::Cell cell) {
    if constexpr (kNarrow)
      return V::narrow_expanded(cell);
    else if constexpr (kTraits.integer())
      return V::bias8(cell);
    else
      return cell;
  }

  // Called once for every four cells, which meet one row or `Several`; a prefetch past the end of
  // the block is harmless, it never faults. V::kAsksFar: measured to be faster.
  template <bool Several>
  void prefetch_ahead() const {
    constexpr bool far = Several && V::kAsksFar && kStorage != Storage::kSparse;
    constexpr std::size_t bytes =
        !kPaired && !kThreeBits && (kStorage == Storage::kDense || kTraits.stored_bits > 8) ? 256
                                                                                            : 128;
    const char* p = reinterpret_cast<const char*>(value);
    for (std::size_t i = 0; i < bytes; i += 64)
      far ? prefetch_far(p + kPrefetchFarBytes + i) : prefetch(p + kPrefetchBytes + i);
    if constexpr (kStorage == Storage::kSparse) prefetch(mask + kPrefetchBytes / 2);
  }
};

}  // namespace
}  // namespace owl
