// AVX-512, and AMX for several rows: Sapphire Rapids and later. A few meet integers in bytes, many
// in bf16, and rows of bf16 too. Integers meet whole rows in bf16 there, weights with their scales:
// sums need not leave the tiles for the scales of each block, which is what takes the time of
// products of bytes. In 4 and 3 bits that rounds no weight, for a scale has 4 significant bits; in
// 8 by less than they were rounded by before. Of activations bf16 keeps more than int8 does.
#include "kernel_amx_attention.h"
#include "kernel_amx_few.h"
#include "kernel_table.h"

namespace owl {
namespace {

constexpr std::size_t kStepCells = kTileBytes / kCellBytes;
constexpr std::size_t kGroups = V::kPanelGroups;  // of a tile of weights, as unpacked
// Of a panel: rows of activations are fetched once for all of them, a part that stays in the
// second-level cache. Not so many that the sums, which go there too, leave no room for it; and no
// power of two, so that a tile's rows of sums do not all want the same places in the first.
constexpr std::size_t kPanelGroups = 3 * kGroups;
constexpr std::size_t kChunkCells = kPanelScratch / (kGroups * kCellBytes);
static_assert(kGroups % 2 == 0);

// Activations of many rows are bf16 whatever the weight; without `blocks` a layout is of those.
// An odd number of cache lines, so that a tile's rows do not all want the same places in the cache.
ActivationLayout layout_of(const PackedMatrix& w, bool many) {
  if (!many || w.traits().cell_bits == 32) return activation_layout<V>(w, many);
  const std::size_t columns = w.cells * w.traits().columns_per_cell();
  ActivationLayout layout;
  layout.stride = round_up(columns * sizeof(V::Half), kStepBytes) | kStepBytes;
  return layout;
}

void prepare(const PackedMatrix& w, const ActivationLayout& layout, const float* x,
             std::uint8_t* row) {
  if (w.traits().integer() && layout.blocks == 0)
    prepare_values<V>(Bits<16>{}, w, layout, x, row);
  else
    prepare_row<V>(w, layout, x, row);
}

// One output's scale for each of 16, and what makes up for the bias of a cell and for the powers
// of two that its bytes are put behind.
struct Scales {
  V::F scale, behind_23, behind_15;
  explicit Scales(const float* scales)
      : scale(V::f_load(scales)),
        behind_23(V::f_mul(scale, V::f_set1(-(8388608.0F + 128.0F)))),
        behind_15(V::f_mul(scale, V::f_set1(-(32768.0F + 128.0F)))) {}
};

// Two columns of a biased cell of integers, the lower half of each 32 bits, times their scales: as
// the lowest bits of 2^23 + u and 2^15 + u bytes are floats already. Only what bf16 cannot hold is
// rounded, at the end; `Exact`: nothing is.
template <bool Exact>
inline V::Cell to_halves(V::Cell cell, const Scales& s) {
  const auto behind = [&](int mask, int power) OWL_ALWAYS_INLINE {
    constexpr int kAndOr = 0xea;
    return _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(cell, _mm512_set1_epi32(mask), _mm512_set1_epi32(power), kAndOr));
  };
  const V::F first = V::f_fma(behind(0xff, 0x4b000000), s.scale, s.behind_23);
  const V::F second = V::f_fma(behind(0xff00, 0x47000000), s.scale, s.behind_15);
  if constexpr (Exact) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(_mm512_castps_si512(first), 16),
                                   _mm512_castps_si512(second));
  } else {
    return in_turns(first, second);
  }
}

// `steps` steps of `rows` rows x [.., stride bytes] times tile [groups][kChunkCells][64]: added to
// sums [.., sums_stride], or put there.
template <bool Add>
void multiply(const std::uint8_t* tile, std::size_t steps, const std::uint8_t* x,
              std::size_t stride, std::size_t rows, float* sums, std::size_t sums_stride) {
  constexpr std::size_t group_bytes = kChunkCells * kCellBytes;
  for_row_tiles(rows, [&](auto tiles, std::size_t m) OWL_ALWAYS_INLINE {
    for (std::size_t n = 0; n < kGroups; n += 2) {
      const Factors factors[] = {
          {x + m * stride, tile + n * group_bytes, tile + (n + 1) * group_bytes}};
      multiply_tiles<tiles.value, Add>(factors, steps, stride,
                                       sums + m * sums_stride + n * kGroupRows, sums_stride);
    }
  });
}

// Cells [first, first + cells) of `groups` groups as tiles of bf16; returns how many steps these
// are. Zeros fill the last one: what is left there of others could be no number.
template <class Form, class Streams>
std::size_t unpack(const PackedMatrix& w, std::size_t begin, std::size_t groups, std::size_t first,
                   std::size_t cells, Streams* streams, std::uint8_t* tile) {
  constexpr bool integer = Form::kTraits.integer();
  constexpr std::size_t halves = integer ? 2 : 1;  // cells of bf16 that a cell makes
  const std::size_t steps = divide_up(cells * halves, kStepCells);
  const auto place = [&](std::size_t c, std::size_t n) {
    return tile + (n * kChunkCells + c) * kCellBytes;
  };
  alignas(64) float scales[kChunkCells / kBlockCells / 2 * kGroups * kGroupRows];
  if constexpr (integer) unpack_scales<V>(w, begin, groups, first / kBlockCells, cells, scales);
  for (std::size_t n = 0; n < groups; ++n) {
    std::memset(place(cells * halves, n), 0, (steps * kStepCells - cells * halves) * kCellBytes);
    if constexpr (!integer) {
      unpack_cells(w, begin + n, first, cells, streams[n],
                   [&](std::size_t c, V::Cell cell) { V::store_cell(place(c, n), cell); });
    } else {
      for (std::size_t b = 0; b < cells; b += kBlockCells) {
        const Scales block(scales + (b / kBlockCells * kGroups + n) * kGroupRows);
        unpack_cells(w, begin + n, first + b, smaller(kBlockCells, cells - b), streams[n],
                     [&](std::size_t c, V::Cell cell) {
                       constexpr bool exact = Form::kTraits.stored_bits <= 4;
                       V::store_cell(place(2 * (b + c), n), to_halves<exact>(cell, block));
                       V::store_cell(place(2 * (b + c) + 1, n),
                                     to_halves<exact>(_mm512_srli_epi32(cell, 16), block));
                     });
      }
    }
  }
  return steps;
}

template <class Form>
void panel_in_tiles(const PackedMatrix& w, std::size_t begin, std::size_t groups,
                    const ActivationLayout& layout, const std::uint8_t* rows, std::size_t count,
                    std::uint8_t* scratch, float* sums, std::size_t sums_stride) {
  constexpr std::size_t chunk = Form::kTraits.integer() ? kChunkCells / 2 : kChunkCells;
  constexpr std::size_t bytes = Form::kTraits.columns_per_cell() * sizeof(V::Half);
  const std::size_t stride = layout.stride;
  CellStream<V, Form> streams[kPanelGroups];
  Widened<CellStream<V, Form>::kWidens> rooms[kPanelGroups];
  for (std::size_t n = 0; n < groups; ++n) streams[n] = CellStream<V, Form>(w, begin + n, rooms[n]);
  const Tiles tiles;
  for (std::size_t done = 0; done < w.cells; done += chunk) {
    const std::size_t cells = smaller(chunk, w.cells - done);
    const std::uint8_t* x = rows + done * bytes;
    for (std::size_t n = 0; n < groups; n += kGroups) {
      const std::size_t own = smaller(kGroups, groups - n);
      if (own < kGroups) std::memset(scratch, 0, kPanelScratch);
      const std::size_t steps = unpack<Form>(w, begin + n, own, done, cells, streams + n, scratch);
      float* to = sums + n * kGroupRows;
      before_tiles();
      if (done == 0)
        multiply<false>(scratch, steps, x, stride, count, to, sums_stride);
      else
        multiply<true>(scratch, steps, x, stride, count, to, sums_stride);
    }
  }
}

void panel_of_any(const PackedMatrix& w, std::size_t begin, std::size_t groups,
                  const ActivationLayout& layout, const std::uint8_t* rows, std::size_t count,
                  std::uint8_t* scratch, float* sums, std::size_t stride) {
  with_form(w, [&](auto form) {
    using Form = decltype(form);
    if constexpr (Form::kTraits.cell_bits == 32) {
      for (std::size_t n = 0; n < groups; n += kGroups)
        panel_of<V, Form>(w, begin + n, smaller(kGroups, groups - n), layout, rows, count, scratch,
                          sums + n * kGroupRows, stride);
    } else {
      panel_in_tiles<Form>(w, begin, groups, layout, rows, count, scratch, sums, stride);
    }
  });
}

// A cache in fp32 is that of weights in fp32: of such a model nothing is rounded.
void attend_many_of_any(const AttentionSpan& span, const float* q, std::size_t q_stride,
                        std::size_t count, std::size_t position, std::size_t window,
                        std::uint8_t* scratch, float* out, std::size_t out_stride) {
  const auto attend = span.cache == CacheType::kFp32 ? attend_many<V> : attend_many<V, Bf16Tiles>;
  attend(span, q, q_stride, count, position, window, scratch, out, out_stride);
}

consteval Kernels amx_kernels() noexcept {
  Kernels kernels = make_kernels<V>("amx");
  kernels.layout = layout_of;
  kernels.prepare = prepare;
  kernels.few = few_of_any;
  kernels.panel = panel_of_any;
  kernels.panel_groups = kPanelGroups;
  kernels.attend_many = attend_many_of_any;
  kernels.panel_rows = 512;  // what a tile of weights takes to unpack is for all of them
  kernels.pass_rows = 2 * kFewRows;
  return kernels;
}

}  // namespace

const Kernels kAmxKernels = amx_kernels();

}  // namespace owl
