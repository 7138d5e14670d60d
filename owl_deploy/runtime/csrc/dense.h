// A sparse weight of 4 bits as a dense one, for processors on which that takes less time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format.h"

namespace owl {

// Whether `w` has a dense form: a sparse int4 weight.
OWL_INLINE bool has_dense_form(const PackedMatrix& w) {
  return w.sparse() && w.type == ValueType::kInt4;
}

// What the dense form takes: its scales and values, and the bytes that kernels load past these.
std::size_t dense_bytes(const PackedMatrix& w);

// Views the dense form of `w` at `place`, which `fill_dense` writes: the same products to the last
// bit.
PackedMatrix dense_at(const PackedMatrix& w, const std::uint8_t* place);

// Writes groups [begin, end) of it.
void fill_dense(const PackedMatrix& w, std::size_t begin, std::size_t end, std::uint8_t* place);

}  // namespace owl
