// A sparse weight of 4 or 3 bits as a dense one of 4, for processors on which that takes less time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace owl {

// Whether these kernels' sessions lay `w` dense in memory. Many threads share memory's bandwidth
// and have instructions to spare; of few it is the reverse: on two vCPUs of a Zen 3 half of a 1.5B
// decodes at a third of dense int4's speed, sparse. A weight that would more than double, of which
// three quarters and more are zero (in 3 bits seven tenths), is left alone.
bool lies_dense(const PackedMatrix& w, const Kernels& kernels);

// What the dense form takes: its scales and values, and the bytes that kernels load past these.
std::size_t dense_bytes(const PackedMatrix& w);

// Views the dense form of `w` at `place`, which `fill_dense` writes: the same products to the last
// bit.
PackedMatrix dense_at(const PackedMatrix& w, const std::uint8_t* place);

// Writes groups [begin, end) of it.
void fill_dense(const PackedMatrix& w, std::size_t begin, std::size_t end, std::uint8_t* place);

}  // namespace owl
