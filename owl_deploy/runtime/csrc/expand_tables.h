// Byte shuffles that expand packed values, for processors without an expand instruction: entry
// `mask` moves the i-th packed value to the position of the mask's i-th set bit; 0x80 leaves a zero
// (PSHUFB and TBL alike).
#pragma once

#include <cstdint>

namespace owl {
namespace {

// The shuffle of 16 bytes is the sum of an entry for the lower half's mask, whose upper half counts
// the values that it uses, and one for the upper half's mask.
struct HalfTable {
  alignas(64) std::uint8_t entry[256][16];
};
constexpr HalfTable make_half_table(bool upper) {
  HalfTable table{};
  for (int mask = 0; mask < 256; ++mask) {
    std::uint8_t next = 0;
    for (int i = 0; i < 8; ++i)
      table.entry[mask][i + 8 * upper] = (mask >> i & 1) ? next++ : std::uint8_t{0x80};
    for (int i = 0; i < 8; ++i) table.entry[mask][i + 8 * !upper] = upper ? std::uint8_t{0} : next;
  }
  return table;
}

struct WordTable {  // 8 words of 2 bytes a mask
  alignas(64) std::uint8_t entry[256][16];
};
constexpr WordTable make_word_table() {
  WordTable table{};
  for (int mask = 0; mask < 256; ++mask) {
    std::uint8_t next = 0;
    for (int i = 0; i < 8; ++i)
      for (int b = 0; b < 2; ++b)
        table.entry[mask][2 * i + b] = (mask >> i & 1) ? next++ : std::uint8_t{0x80};
  }
  return table;
}

struct QuadTable {  // 4 floats of 4 bytes a mask
  alignas(64) std::uint8_t entry[16][16];
};
constexpr QuadTable make_quad_table() {
  QuadTable table{};
  for (int mask = 0; mask < 16; ++mask) {
    std::uint8_t next = 0;
    for (int i = 0; i < 4; ++i)
      for (int b = 0; b < 4; ++b)
        table.entry[mask][4 * i + b] = (mask >> i & 1) ? next++ : std::uint8_t{0x80};
  }
  return table;
}

constexpr HalfTable kLowerHalf = make_half_table(false);
constexpr HalfTable kUpperHalf = make_half_table(true);
constexpr WordTable kWords = make_word_table();
constexpr QuadTable kQuads = make_quad_table();

}  // namespace
}  // namespace owl
