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

#include "kernel_products.h"
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

// 3-bit values, and 4-bit ones for an instruction set that expands bytes, but not halves of them:
// so many as bytes at a time. For a load of what has just been stored in parts waits until that has
// reached the cache; here most of it did long before.
constexpr std::size_t kWidened = 1024;

template <bool Needed>
struct Widened {
  alignas(64) std::uint8_t values[kWidened];
};
template <>
struct Widened<false> {};

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
      kStorage == Storage::kSparse &&
      (kTraits.stored_bits == 3 || (kTraits.stored_bits == 4 && V::kWidens));
  static constexpr bool kNarrow = !std::is_same_v<Products<V, Form>, Wide<V>>;

  const std::uint8_t* mask = nullptr;
  const std::uint8_t* value = nullptr;
  // Of those that are widened, whose first was made of what is at `value`: their bytes, the next
  // cell's place among them, and where the group ends.
  std::uint8_t* widened = nullptr;
  std::size_t at = 0;
  const std::uint8_t* end = nullptr;

  CellStream() = default;
  CellStream(const PackedMatrix& w, std::size_t group, Widened<kWidens>& room)
      : mask(kStorage == Storage::kSparse ? w.group_masks(group) : nullptr),
        value(w.group_values(group)) {
    if constexpr (kWidens) {
      widened = room.values;
      end = w.group_values(group + 1);
      widen();
    }
  }

  // The next cell, at the places 0 to 3 in turn; integers as their `Products` take them.
  template <std::size_t Place>
  typename V::Cell next() {
    if constexpr (kStorage == Storage::kSparse) {
      Mask<kTraits.columns_per_cell()> bits;
      std::memcpy(&bits, mask, sizeof(bits));
      mask += sizeof(bits);
      return ready(expand(bits));
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
    const std::size_t count = set_bits(bits);
    if constexpr (kWidens) {
      if (at > kWidened - kCellBytes) {
        value = position();
        at = kTraits.unbroken() ? at % 8 : 0;
        widen();
      }
      const typename V::Cell cell = V::expand(Bits<8>{}, widened + at, bits);
      at += kTraits.unbroken() ? count : round_up(count, 2);
      return cell;
    } else {
      const typename V::Cell cell = V::expand(Bits<kTraits.stored_bits>{}, value, bits);
      value += kTraits.stored_bytes(count);
      return cell;
    }
  }

  // The byte with the next value; where cells do not begin on one, that with the first of its
  // eight.
  const std::uint8_t* position() const {
    if constexpr (!kWidens)
      return value;
    else
      return value + (kTraits.unbroken() ? at / 8 * 3 : at / 2);
  }

  void widen() {
    constexpr Bits<kTraits.stored_bits> width;
    const auto left = static_cast<std::size_t>(end - value);
    V::widen(width, value, smaller(kTraits.stored_bytes(kWidened), left), widened);
  }

  static typename V::Cell ready(typename V::Cell cell) {
    if constexpr (kNarrow)
      return V::narrow_expanded(Bits<kTraits.stored_bits>{}, cell);
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
    const char* p = reinterpret_cast<const char*>(position());
    for (std::size_t i = 0; i < bytes; i += 64)
      far ? prefetch_far(p + kPrefetchFarBytes + i) : prefetch(p + kPrefetchBytes + i);
    if constexpr (kStorage == Storage::kSparse) prefetch(mask + kPrefetchBytes / 2);
  }
};

}  // namespace
}  // namespace owl
