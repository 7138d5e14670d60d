// How cells of integers meet int8 activations, in exact sums over a block, and which way a form's
// cells take on an instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format.h"

namespace owl {
namespace {

// In sums of 32 bits. A block's correction, -128 times the sum of its activations, makes up for a
// bias that the weights were given, so that they are unsigned.
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

}  // namespace
}  // namespace owl
