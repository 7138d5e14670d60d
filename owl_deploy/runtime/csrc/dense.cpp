#include "dense.h"

#include <bit>
#include <cstring>

#include "threads.h"

namespace owl {
namespace {

constexpr ValueTraits kDense = traits_of(ValueType::kInt4);
constexpr std::uint8_t kZero = 8;  // as stored
constexpr std::size_t kFewThreads = 4;

std::size_t group_bytes(const PackedMatrix& w) {
  return kDense.stored_bytes(w.cells * kDense.values_per_cell());
}

std::size_t scale_bytes(const PackedMatrix& w) {
  return divide_up(w.groups * w.scale_blocks * kGroupRows, kCellBytes) * kCellBytes;
}

// Walks the cells of a sparse group.
struct Cells {
  const ValueTraits& traits;
  const std::uint8_t* values;
  std::size_t at = 0;  // bits before the next value

  // A cell's values as they are stored in 4 bits, a byte each.
  void next(std::uint64_t mask, std::uint8_t cell[kCellBytes]) {
    std::memset(cell, kZero, kCellBytes);
    for (; mask != 0; mask &= mask - 1, at += traits.stored_bits)
      cell[std::countr_zero(mask)] = traits.stored_bits == 3 ? three() : four();
    if (!traits.unbroken()) at = divide_up(at, 8) * 8;
  }

 private:
  // In 3 bits a value counts for two of 4 bits, as does what is added to it.
  std::uint8_t three() const {
    const unsigned both = values[at / 8] | values[at / 8 + 1] << 8;
    return static_cast<std::uint8_t>(2 * (both >> at % 8 & 7));
  }
  std::uint8_t four() const { return values[at / 8] >> (at % 8 == 0 ? 4 : 0) & 15; }
};

}  // namespace

bool lies_dense(const PackedMatrix& w, const Kernels& kernels) {
  return kernels.prefers_dense_int4 && likely_session_threads() <= kFewThreads && w.sparse() &&
         (w.type == ValueType::kInt4 || w.type == ValueType::kInt3) && dense_bytes(w) <= 2 * w.size;
}

std::size_t dense_bytes(const PackedMatrix& w) {
  return scale_bytes(w) + w.groups * group_bytes(w) + kCellBytes;
}

PackedMatrix dense_at(const PackedMatrix& w, const std::uint8_t* place) {
  PackedMatrix dense = w;
  dense.type = kDense.type;
  dense.storage = Storage::kDense;
  dense.mask_bytes = 0;
  dense.masks = nullptr;
  dense.index = nullptr;
  dense.group_bytes = group_bytes(w);
  dense.data = place;
  dense.size = dense_bytes(w);
  dense.scales = place;
  dense.values = place + scale_bytes(w);
  return dense;
}

void fill_dense(const PackedMatrix& w, std::size_t begin, std::size_t end, std::uint8_t* place) {
  const std::size_t scales = w.scale_blocks * kGroupRows;
  std::memcpy(place + begin * scales, w.group_scales(begin), (end - begin) * scales);
  std::uint8_t* to = place + scale_bytes(w) + begin * group_bytes(w);
  std::uint8_t first[kCellBytes], second[kCellBytes];
  for (std::size_t g = begin; g < end; ++g) {
    const std::uint8_t* mask = w.group_masks(g);
    Cells cells{w.traits(), w.group_values(g)};
    for (std::size_t c = 0; c < w.cells; c += 2, mask += 2 * sizeof(std::uint64_t)) {
      std::uint64_t masks[2];
      std::memcpy(masks, mask, sizeof(masks));
      cells.next(masks[0], first);
      cells.next(masks[1], second);
      for (std::size_t i = 0; i < kCellBytes; ++i)  // two cells share the halves of 64 bytes
        *to++ = static_cast<std::uint8_t>(first[i] | second[i] << 4);
    }
  }
}

}  // namespace owl
