#include "dense.h"

#include <bit>
#include <cstring>

#include "threads.h"

namespace owl {
namespace {

constexpr std::uint8_t kZero = 8;  // as stored
constexpr std::size_t kFewThreads = 4;

std::size_t scale_bytes(const PackedMatrix& w) {
  return divide_up(w.groups * w.scale_blocks * kGroupRows, kCellBytes) * kCellBytes;
}

// A cell's values, a byte each; returns where the next cell's begin.
const std::uint8_t* spread(std::uint64_t mask, const std::uint8_t* values,
                           std::uint8_t cell[kCellBytes]) {
  std::memset(cell, kZero, kCellBytes);
  const auto count = static_cast<std::size_t>(std::popcount(mask));
  for (std::size_t i = 0; mask != 0; mask &= mask - 1, ++i)
    cell[std::countr_zero(mask)] = values[i / 2] >> (i % 2 == 0 ? 4 : 0) & 15;
  return values + traits_of(ValueType::kInt4).stored_bytes(count);
}

}  // namespace

bool lies_dense(const PackedMatrix& w, const Kernels& kernels) {
  return kernels.prefers_dense_int4 && likely_session_threads() <= kFewThreads && w.sparse() &&
         w.type == ValueType::kInt4 && dense_bytes(w) <= 2 * w.size;
}

std::size_t dense_bytes(const PackedMatrix& w) {
  return scale_bytes(w) + w.groups * w.dense_group_bytes() + kCellBytes;
}

PackedMatrix dense_at(const PackedMatrix& w, const std::uint8_t* place) {
  PackedMatrix dense = w;
  dense.storage = Storage::kDense;
  dense.mask_bytes = 0;
  dense.masks = nullptr;
  dense.index = nullptr;
  dense.group_bytes = w.dense_group_bytes();
  dense.data = place;
  dense.size = dense_bytes(w);
  dense.scales = place;
  dense.values = place + scale_bytes(w);
  return dense;
}

void fill_dense(const PackedMatrix& w, std::size_t begin, std::size_t end, std::uint8_t* place) {
  const std::size_t scales = w.scale_blocks * kGroupRows;
  std::memcpy(place + begin * scales, w.group_scales(begin), (end - begin) * scales);
  std::uint8_t* to = place + scale_bytes(w) + begin * w.dense_group_bytes();
  std::uint8_t first[kCellBytes], second[kCellBytes];
  for (std::size_t g = begin; g < end; ++g) {
    const std::uint8_t *mask = w.group_masks(g), *values = w.group_values(g);
    for (std::size_t c = 0; c < w.cells; c += 2, mask += 2 * sizeof(std::uint64_t)) {
      std::uint64_t masks[2];
      std::memcpy(masks, mask, sizeof(masks));
      values = spread(masks[1], spread(masks[0], values, first), second);
      for (std::size_t i = 0; i < kCellBytes; ++i)  // two cells share the halves of 64 bytes
        *to++ = static_cast<std::uint8_t>(first[i] | second[i] << 4);
    }
  }
}

}  // namespace owl
