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

// Of wider values, `Lanes` of them in the 16 bytes.
template <int Lanes>
struct LaneTable {
  alignas(64) std::uint8_t entry[1 << Lanes][16];
};
template <int Lanes>
constexpr LaneTable<Lanes> make_lane_table() {
  constexpr int bytes = 16 / Lanes;
  LaneTable<Lanes> table{};
  for (int mask = 0; mask < 1 << Lanes; ++mask) {
    std::uint8_t next = 0;
    for (int i = 0; i < 16; ++i)
      table.entry[mask][i] = (mask >> i / bytes & 1) ? next++ : std::uint8_t{0x80};
  }
  return table;
}

constexpr HalfTable kLowerHalf = make_half_table(false);
constexpr HalfTable kUpperHalf = make_half_table(true);
constexpr LaneTable<8> kWords = make_lane_table<8>();
constexpr LaneTable<4> kQuads = make_lane_table<4>();

}  // namespace
}  // namespace owl
