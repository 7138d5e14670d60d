#include "format.h"

#include <cstring>

namespace owl {
namespace {

constexpr char kMagic[8] = {'O', 'W', 'L', 'P', 'A', 'C', 'K', '\0'};
constexpr std::uint32_t kVersion = 2;
constexpr std::uint32_t kFlagSparse = 1, kFlagPlanes = 2;
constexpr std::uint32_t kMaxScaleExponent = 254 - 15;  // the largest scale is finite
constexpr std::uint64_t kMaxExtent =
    1ull << 28;  // rows or columns; keeps every product below in 64 bits

struct Header {
  char magic[8];
  std::uint32_t version, value_type, flags, group_rows;
  std::uint64_t rows, cols, cells, nonzeros;
  std::uint64_t mask_offset, index_offset, scale_offset, value_offset, total_bytes;
  std::uint32_t scale_exponent;
  std::uint8_t reserved[28];
};
static_assert(sizeof(Header) == 128, "the header is 128 bytes on every platform");

// One region of the block: starts on a 64-byte boundary and lies inside.
bool fits(std::uint64_t offset, std::uint64_t bytes, std::uint64_t total) {
  return offset % 64 == 0 && offset >= sizeof(Header) && offset <= total && bytes <= total - offset;
}

std::uint64_t count_bits(const std::uint8_t* bytes, std::size_t size) {
  std::uint64_t count = 0;
  std::size_t i = 0;
  for (; i + 8 <= size; i += 8) {
    std::uint64_t word;
    std::memcpy(&word, bytes + i, 8);
    count += static_cast<std::uint64_t>(__builtin_popcountll(word));
  }
  for (; i < size; ++i) count += static_cast<std::uint64_t>(__builtin_popcount(bytes[i]));
  return count;
}

// Every group's masks must ask for no more values than lie between its start and the next group's.
std::string check_groups(const PackedMatrix& m, std::uint64_t value_space) {
  const std::size_t mask_bytes = m.cells * m.mask_bytes_per_cell();
  std::uint64_t total = 0;
  if (static_cast<std::uint64_t>(m.index[m.groups]) * kCellBytes > value_space)
    return "the index points past the values";
  for (std::size_t g = 0; g < m.groups; ++g) {
    if (m.index[g + 1] < m.index[g]) return "the index is not ascending";
    const std::uint64_t room = static_cast<std::uint64_t>(m.index[g + 1] - m.index[g]) * kCellBytes;
    const std::uint64_t count = count_bits(m.group_masks(g), mask_bytes);
    if (count * value_bytes(m.type) > room) return "a mask has more bits than its group has values";
    total += count;
  }
  return total == m.nonzeros ? "" : "the masks do not add up to the number of non-zeros";
}

}  // namespace

std::string parse_packed(const void* data, std::size_t size, PackedMatrix* matrix) {
  const auto* bytes = static_cast<const std::uint8_t*>(data);
  Header h;
  if (data == nullptr || size < sizeof(Header)) return "the block is shorter than its header";
  if (reinterpret_cast<std::uintptr_t>(data) % 16 != 0)
    return "the block is not aligned to 16 bytes";
  std::memcpy(&h, data, sizeof(Header));
  if (std::memcmp(h.magic, kMagic, sizeof(kMagic)) != 0)
    return "the block does not start with OWLPACK";
  if (h.version != kVersion)
    return "format version " + std::to_string(h.version) + " is not supported (2 is): export again";
  if (h.value_type < 1 || h.value_type > 3)
    return "unknown value type " + std::to_string(h.value_type);
  if (h.flags > kFlagPlanes) return "unknown flags";
  if (h.flags == kFlagPlanes && h.value_type != static_cast<std::uint32_t>(ValueType::kInt8))
    return "only int8 comes in planes";
  if (h.scale_exponent > kMaxScaleExponent) return "the scales' exponent is out of range";
  if (h.group_rows != kGroupRows) return "only groups of 16 rows are supported";
  if (h.rows == 0 || h.cols == 0 || h.rows > kMaxExtent || h.cols > kMaxExtent)
    return "rows and columns must lie between 1 and 2^28";
  if (h.total_bytes != size)
    return "the block's length differs from what its header says (truncated?)";

  PackedMatrix m;
  m.type = static_cast<ValueType>(h.value_type);
  m.data = bytes;
  m.size = size;
  m.storage = h.flags == kFlagSparse   ? Storage::kSparse
              : h.flags == kFlagPlanes ? Storage::kPlanes
                                       : Storage::kDense;
  m.scale_exponent = h.scale_exponent;
  m.rows = h.rows;
  m.cols = h.cols;
  m.groups = (m.rows + kGroupRows - 1) / kGroupRows;
  const std::size_t pack = columns_per_cell(m.type);
  m.cells = ((m.cols + pack - 1) / pack + 3) / 4 * 4;
  m.nonzeros = h.nonzeros;
  if (h.cells != m.cells) return "the number of cells does not match the columns";

  const std::uint64_t cells = static_cast<std::uint64_t>(m.groups) * m.cells;
  // 64 bytes after the last value: kernels load whole registers.
  std::uint64_t value_space = kCellBytes;
  if (!m.sparse()) value_space += m.groups * m.whole_group_bytes();
  if (m.storage == Storage::kPlanes) value_space += m.groups * kGroupRows * m.low_row_bytes();
  if (!fits(h.value_offset, value_space, size)) return "the values lie outside the block";
  m.values = bytes + h.value_offset;
  if (m.type == ValueType::kInt8) {
    if (!fits(h.scale_offset, m.groups * m.scale_blocks() * kGroupRows, size))
      return "the scales lie outside the block";
    m.scales = bytes + h.scale_offset;
  }
  if ((m.type != ValueType::kInt8 && h.scale_offset != 0) ||
      (!m.sparse() && (h.mask_offset | h.index_offset) != 0))
    return "a region that this weight does not have is given a place";
  if (m.sparse()) {
    if (!fits(h.mask_offset, cells * m.mask_bytes_per_cell(), size))
      return "the masks lie outside the block";
    if (!fits(h.index_offset, (m.groups + 1) * sizeof(std::uint32_t), size))
      return "the index lies outside the block";
    m.masks = bytes + h.mask_offset;
    m.index = reinterpret_cast<const std::uint32_t*>(bytes + h.index_offset);
    const std::string wrong = check_groups(m, size - h.value_offset - kCellBytes);
    if (!wrong.empty()) return wrong;
  }
  *matrix = m;
  return "";
}

}  // namespace owl
