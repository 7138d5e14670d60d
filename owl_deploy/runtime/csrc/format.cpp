#include "format.h"

#include <bit>
#include <cstring>

namespace owl {
namespace {

constexpr char kMagic[8] = {'O', 'W', 'L', 'P', 'A', 'C', 'K', '\0'};
constexpr std::uint32_t kVersion = 4;
constexpr std::uint32_t kWithoutSigns = 3;  // of scales
constexpr std::uint32_t kOldest = 2;        // nor int4 and int3, and 32 columns share a scale
constexpr std::uint32_t kFlagSparse = 1, kFlagPlanes = 2;
constexpr std::uint32_t kMaxScaleExponent = 254 - 15;  // the largest scale is finite
constexpr std::uint64_t kMaxExtent =
    1ULL << 28;  // rows or columns; keeps every product below in 64 bits

struct Header {
  char magic[8];
  std::uint32_t version, value_type, flags, group_rows;
  std::uint64_t rows, cols, cells, nonzeros;
  std::uint64_t mask_offset, index_offset, scale_offset, value_offset, total_bytes;
  std::uint32_t scale_exponent, scale_columns, signed_scales;
  std::uint8_t reserved[20];
};
static_assert(sizeof(Header) == 128, "the header is 128 bytes on every platform");

// One region of the block: starts on a 64-byte boundary and lies inside.
bool fits(std::uint64_t offset, std::uint64_t bytes, std::uint64_t total) {
  return offset % 64 == 0 && offset >= sizeof(Header) && offset <= total && bytes <= total - offset;
}

struct Counted {
  std::uint64_t values = 0, bytes = 0;
};

// What a group's masks ask for. Where the values of each cell begin on a byte of their own, bytes
// are counted by cell.
Counted count_group(const PackedMatrix& m, std::size_t group) {
  Counted counted;
  const std::uint8_t* mask = m.group_masks(group);
  for (std::size_t c = 0; c < m.cells; ++c, mask += m.mask_bytes) {
    std::uint64_t bits = 0;
    std::memcpy(&bits, mask, m.mask_bytes);
    const auto values = static_cast<std::uint64_t>(__builtin_popcountll(bits));
    counted.values += values;
    counted.bytes += m.traits().stored_bytes(values);
  }
  if (m.traits().unbroken()) counted.bytes = m.traits().stored_bytes(counted.values);
  return counted;
}

// Every group's masks must ask for no more values than lie between its start and the next group's.
std::string check_groups(const PackedMatrix& m, std::uint64_t value_space) {
  std::uint64_t total = 0;
  if (static_cast<std::uint64_t>(m.index[m.groups]) * kCellBytes > value_space)
    return "the index points past the values";
  for (std::size_t g = 0; g < m.groups; ++g) {
    if (m.index[g + 1] < m.index[g]) return "the index is not ascending";
    const std::uint64_t room = static_cast<std::uint64_t>(m.index[g + 1] - m.index[g]) * kCellBytes;
    const Counted counted = count_group(m, g);
    if (counted.bytes > room) return "a mask has more bits than its group has values";
    total += counted.values;
  }
  return total == m.nonzeros ? "" : "the masks do not add up to the number of non-zeros";
}

// Columns that share a scale, 0 where there are none.
std::uint32_t scale_columns(const Header& h) {
  if (h.version != kOldest) return h.scale_columns;
  return traits_of(static_cast<ValueType>(h.value_type)).integer() ? kBlockColumns : 0;
}

std::uint32_t signed_scales(const Header& h) {
  return h.version > kWithoutSigns ? h.signed_scales : 0;
}

bool scale_columns_are_sound(const Header& h) {
  const std::uint32_t columns = scale_columns(h);
  if (!traits_of(static_cast<ValueType>(h.value_type)).integer()) return columns == 0;
  return columns == 32 || (h.flags != kFlagPlanes && (columns == 64 || columns == 128));
}

std::string check_header(const Header& h, std::size_t size) {
  if (std::memcmp(h.magic, kMagic, sizeof(kMagic)) != 0)
    return "the block does not start with OWLPACK";
  if (h.version < kOldest || h.version > kVersion)
    return "format version " + std::to_string(h.version) +
           " is not supported (2 to 4 are): export again";
  if (h.value_type < 1 || h.value_type > kValueTypes ||
      (h.version == kOldest && h.value_type > static_cast<std::uint32_t>(ValueType::kInt8)))
    return "unknown value type " + std::to_string(h.value_type);
  if (h.flags > kFlagPlanes) return "unknown flags";
  if (h.flags == kFlagPlanes && !traits_of(static_cast<ValueType>(h.value_type)).planes)
    return "only int8 comes in planes";
  if (!scale_columns_are_sound(h)) return "scales cannot be shared by so many columns";
  if (signed_scales(h) > traits_of(static_cast<ValueType>(h.value_type)).integer())
    return "scales have signs or have none, and only integers have scales";
  if (h.scale_exponent > kMaxScaleExponent) return "the scales' exponent is out of range";
  if (h.group_rows != kGroupRows) return "only groups of 16 rows are supported";
  if (h.rows == 0 || h.cols == 0 || h.rows > kMaxExtent || h.cols > kMaxExtent)
    return "rows and columns must lie between 1 and 2^28";
  if (h.total_bytes != size)
    return "the block's length differs from what its header says (truncated?)";
  return "";
}

// What follows from the header, without the places of the regions.
PackedMatrix describe(const Header& h) {
  PackedMatrix m;
  m.type = static_cast<ValueType>(h.value_type);
  m.storage = h.flags == kFlagSparse   ? Storage::kSparse
              : h.flags == kFlagPlanes ? Storage::kPlanes
                                       : Storage::kDense;
  const ValueTraits& traits = m.traits();
  const std::size_t columns = traits.columns_per_cell(), values = traits.values_per_cell();
  m.rows = h.rows;
  m.cols = h.cols;
  m.groups = divide_up(m.rows, kGroupRows);
  m.cells = 4 * divide_up(m.cols, 4 * columns);
  m.nonzeros = h.nonzeros;
  m.scale_code = ScaleCode::of(h.scale_exponent, signed_scales(h) != 0);
  m.mask_bytes = values / 8;
  if (const std::uint32_t shared = scale_columns(h); shared != 0) {
    m.scale_blocks = divide_up(m.cells * columns, shared);
    m.scale_shift = static_cast<unsigned>(std::countr_zero(shared / kBlockColumns));
  }
  m.group_bytes = m.storage == Storage::kPlanes ? m.cells / 2 * kCellBytes : m.dense_group_bytes();
  return m;
}

// Finds the regions of the block `m->data` [m->size]; returns "" or what is wrong with one.
std::string place_regions(const Header& h, PackedMatrix* m) {
  const std::size_t size = m->size;
  // 64 bytes after the last value: kernels load whole registers.
  std::uint64_t value_space = kCellBytes;
  if (!m->sparse()) value_space += m->groups * m->group_bytes;
  if (m->storage == Storage::kPlanes) value_space += m->groups * kGroupRows * m->low_row_bytes();
  if (!fits(h.value_offset, value_space, size)) return "the values lie outside the block";
  m->values = m->data + h.value_offset;
  if (m->scale_blocks != 0) {
    if (!fits(h.scale_offset, m->groups * m->scale_blocks * kGroupRows, size))
      return "the scales lie outside the block";
    m->scales = m->data + h.scale_offset;
  }
  if ((m->scale_blocks == 0 && h.scale_offset != 0) ||
      (!m->sparse() && (h.mask_offset | h.index_offset) != 0))
    return "a region that this weight does not have is given a place";
  if (m->sparse()) {
    if (!fits(h.mask_offset, m->groups * m->cells * m->mask_bytes, size))
      return "the masks lie outside the block";
    if (!fits(h.index_offset, (m->groups + 1) * sizeof(std::uint32_t), size))
      return "the index lies outside the block";
    m->masks = m->data + h.mask_offset;
    m->index = reinterpret_cast<const std::uint32_t*>(m->data + h.index_offset);
  }
  return "";
}

}  // namespace

std::string parse_packed(const void* data, std::size_t size, PackedMatrix* matrix) {
  Header h;
  if (data == nullptr || size < sizeof(Header)) return "the block is shorter than its header";
  if (reinterpret_cast<std::uintptr_t>(data) % 16 != 0)
    return "the block is not aligned to 16 bytes";
  std::memcpy(&h, data, sizeof(Header));
  std::string wrong = check_header(h, size);
  if (!wrong.empty()) return wrong;
  PackedMatrix m = describe(h);
  m.data = static_cast<const std::uint8_t*>(data);
  m.size = size;
  if (h.cells != m.cells) return "the number of cells does not match the columns";
  wrong = place_regions(h, &m);
  if (wrong.empty() && m.sparse()) wrong = check_groups(m, size - h.value_offset - kCellBytes);
  if (wrong.empty()) *matrix = m;
  return wrong;
}

}  // namespace owl
