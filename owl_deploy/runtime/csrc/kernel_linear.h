// Linear layers: activations as each type of weight wants them, one row of them times a weight, a
// few rows, and many.
#pragma once

#include "kernel_common.h"

namespace owl {
namespace {

// ---- Activations -------------------------------------------------------------------------------

// Bytes of activations that one cell of a weight meets, by the width of its values in the cell.
template <class V>
constexpr std::size_t activation_bytes(Bits<8>) {
  return 4;
}
template <class V>
constexpr std::size_t activation_bytes(Bits<16>) {
  return 2 * sizeof(typename V::Half);
}
template <class V>
constexpr std::size_t activation_bytes(Bits<32>) {
  return sizeof(float);
}

template <class V>
ActivationLayout activation_layout(const PackedMatrix& w, bool) {
  ActivationLayout layout;
  with_type(w.type, [&](auto type) {
    if constexpr (type.kTraits.integer()) {
      layout.blocks = round_up(w.blocks(), 2);
      layout.scale_offset = layout.blocks * kBlockColumns;
      layout.correction_offset = layout.scale_offset + round_up(layout.blocks * 4, 64);
      layout.stride = layout.correction_offset + round_up(layout.blocks * 4, 64);
    } else {
      constexpr std::size_t bytes = activation_bytes<V>(Bits<type.kTraits.cell_bits>{});
      layout.stride = round_up(w.cells * bytes, 64);
    }
  });
  return layout;
}

// One block of 32 columns -> int8 [32] in [-127, 127], its scale, and the correction -128 * sum
// that kernels need which multiply weights biased by 128. `bad` becomes NaN where x has an infinity
// or NaN, and what is written is worth nothing then.
template <class V>
OWL_INLINE void quantize_block(const float* x, std::int8_t* q, float* scale,
                               std::int32_t* correction, typename V::F* bad) {
  using F = typename V::F;
  const F zero = V::f_set1(0.0F);
  const F parts[2] = {V::f_load(x), V::f_load(x + 16)};
  *bad = V::f_fma(parts[0], zero, V::f_fma(parts[1], zero, *bad));
  const float largest = V::f_hmax(V::f_max(V::f_abs(parts[0]), V::f_abs(parts[1])));
  const bool usable = largest > 1e-30F;
  const F inverse = V::f_set1(usable ? 127.0F / largest : 0.0F);
  const typename V::I sums = V::i_add(V::store_int8(q, V::f_mul(parts[0], inverse)),
                                      V::store_int8(q + 16, V::f_mul(parts[1], inverse)));
  *scale = usable ? largest / 127.0F : 0.0F;
  // So small, they add up exactly as floats; what is worth nothing may be large.
  constexpr bool wanted = V::kBiased || V::kNarrowRows > 0;
  const auto total = wanted ? static_cast<std::int64_t>(V::f_hsum(V::to_float(sums))) : 0;
  *correction = static_cast<std::int32_t>(-128 * total);
}

// Blocks with an infinity or NaN get the scale NaN, so that all that they meet becomes NaN.
inline void poison_blocks(const float* x, std::size_t cols, std::int8_t* q, float* scales,
                          std::int32_t* corrections) {
  for (std::size_t begin = 0; begin < cols; begin += kBlockColumns) {
    const std::size_t size = smaller(kBlockColumns, cols - begin), b = begin / kBlockColumns;
    float bad = 0.0F;
    for (std::size_t i = 0; i < size; ++i) bad += x[begin + i] * 0.0F;
    if (bad == 0.0F) continue;
    std::memset(q + begin, 0, kBlockColumns);
    scales[b] = __builtin_nanf("");
    corrections[b] = 0;
  }
}

template <class V>
void prepare_values(Bits<8>, const PackedMatrix& w, const ActivationLayout& layout, const float* x,
                    std::uint8_t* row) {
  auto* q = reinterpret_cast<std::int8_t*>(row);
  auto* scales = reinterpret_cast<float*>(row + layout.scale_offset);
  auto* corrections = reinterpret_cast<std::int32_t*>(row + layout.correction_offset);
  typename V::F bad = V::f_set1(0.0F);
  auto quantize = [&](std::size_t b, const float* from) OWL_ALWAYS_INLINE {
    quantize_block<V>(from, q + kBlockColumns * b, scales + b, corrections + b, &bad);
  };
  const std::size_t whole = w.cols / kBlockColumns;
  for (std::size_t b = 0; b < whole; ++b) quantize(b, x + kBlockColumns * b);
  for (std::size_t b = whole; b < layout.blocks; ++b) {
    const std::size_t at = smaller(w.cols, kBlockColumns * b);
    alignas(64) float padded[kBlockColumns] = {};
    std::memcpy(padded, x + at, smaller(kBlockColumns, w.cols - at) * sizeof(float));
    quantize(b, padded);
  }
  if (!(V::f_hsum(bad) == 0.0F)) poison_blocks(x, w.cols, q, scales, corrections);
}

template <class V>
void prepare_values(Bits<16>, const PackedMatrix& w, const ActivationLayout& layout, const float* x,
                    std::uint8_t* row) {
  using Half = typename V::Half;
  auto* half = reinterpret_cast<Half*>(row);
  const std::size_t columns = layout.stride / sizeof(Half);
  std::size_t i = 0;
  for (; i + 16 <= w.cols; i += 16) V::store_half_row(half + i, V::f_load(x + i));
  alignas(64) float tail[16] = {};
  std::memcpy(tail, x + i, (w.cols - i) * sizeof(float));
  alignas(64) Half converted[16];
  V::store_half_row(converted, V::f_load(tail));
  for (std::size_t j = i; j < columns; ++j) half[j] = j - i < 16 ? converted[j - i] : Half{};
}

template <class V>
void prepare_values(Bits<32>, const PackedMatrix& w, const ActivationLayout&, const float* x,
                    std::uint8_t* row) {
  auto* values = reinterpret_cast<float*>(row);
  std::memcpy(values, x, w.cols * sizeof(float));
  for (std::size_t i = w.cols; i < w.cells; ++i) values[i] = 0.0F;
}

template <class V>
void prepare_row(const PackedMatrix& w, const ActivationLayout& layout, const float* x,
                 std::uint8_t* row) {
  with_type(w.type, [&](auto type) {
    prepare_values<V>(Bits<type.kTraits.cell_bits>{}, w, layout, x, row);
  });
}

// ---- One row -----------------------------------------------------------------------------------

// One block of cells: exact integer sums.
template <class V, class P, class Stream>
OWL_INLINE typename V::I block_sums(Stream& stream, const std::uint8_t* x, std::size_t cells,
                                    std::int32_t correction) {
  typename V::I a = P::begin(correction);
  typename V::I c = P::begin(0);
  for (std::size_t i = 0; i < cells; i += 4, x += 16) {
    stream.template prefetch_ahead<false>();
    a = P::add(a, stream.template next<0>(), V::broadcast(x));
    c = P::add(c, stream.template next<1>(), V::broadcast(x + 4));
    a = P::add(a, stream.template next<2>(), V::broadcast(x + 8));
    c = P::add(c, stream.template next<3>(), V::broadcast(x + 12));
  }
  return P::end(P::join(a, c), correction);
}

// A group's scales are few, but far from its values: unforeseen, they would cost a memory latency
// for each group.
inline void prefetch_scales(const PackedMatrix& w, std::size_t group) {
  const char* p = reinterpret_cast<const char*>(w.group_scales(group));
  for (std::size_t i = 0; i < w.scale_blocks * kGroupRows; i += 64) prefetch(p + i);
}

template <class V, class Form>
void matvec_integer(const PackedMatrix& w, std::size_t begin, std::size_t end,
                    const ActivationLayout& layout, const std::uint8_t* row, float* sums) {
  const auto* scales = reinterpret_cast<const float*>(row + layout.scale_offset);
  const auto* corrections = reinterpret_cast<const std::int32_t*>(row + layout.correction_offset);
  const std::size_t whole = w.cells / kBlockCells;
  Widened<CellStream<V, Form>::kWidens> room;
  for (std::size_t g = begin; g < end; ++g, sums += kGroupRows) {
    CellStream<V, Form> stream(w, g, room);
    const std::uint8_t* weight_scales = w.group_scales(g);
    prefetch_scales(w, g + 2);
    typename V::F total = V::f_set1(0.0F);
    auto add = [&](std::size_t b, typename V::I sum) {
      const typename V::F scale =
          V::f_load_scales(weight_scales + (b >> w.scale_shift) * kGroupRows, w.scale_code);
      total = V::f_fma(V::to_float(sum), V::f_mul(scale, V::f_set1(scales[b])), total);
    };
    auto sums_of = [&](std::size_t b, std::size_t cells) OWL_ALWAYS_INLINE {
      return block_sums<V, Products<V, Form>>(stream, row + b * kBlockColumns, cells,
                                              corrections[b]);
    };
    for (std::size_t b = 0; b < whole; ++b) add(b, sums_of(b, kBlockCells));
    if (w.cells > whole * kBlockCells) add(whole, sums_of(whole, w.cells - whole * kBlockCells));
    V::f_store(sums, total);
  }
}

constexpr std::size_t kTableBlocks = 64;  // blocks whose scales for 16 rows are kept at a time

// What the lower bits of row r contribute in `blocks` blocks from `first` on: 64 columns at a time,
// each half of the lanes under its block's scale. scales [blocks][16].
template <class V>
float low_product(const PackedMatrix& w, std::size_t r, std::size_t first, std::size_t blocks,
                  const std::uint8_t* row, const float* scales) {
  const std::uint8_t* low = w.low_row(r);
  scales += r % kGroupRows;
  typename V::F total = V::f_set1(0.0F);
  for (std::size_t b = first; b < first + blocks; b += 2, scales += 2 * kGroupRows) {
    const typename V::Cell both = V::load_cell(low + b / 4 * kCellBytes);
    const typename V::Cell cell =
        b % 4 == 0 ? V::template nibbles<false>(both) : V::template nibbles<true>(both);
    const typename V::I sum =
        V::dot(Bits<8>{}, V::i_set1(0), V::bias8(cell), V::load_cell(row + b * kBlockColumns));
    total = V::f_fma(V::to_float(sum), V::f_halves(scales[0], scales[kGroupRows]), total);
  }
  return V::f_hsum(total);
}

// Adds the lower bits' share to y of some rows of one group; `before(i)` is called before the i-th.
template <class V, class Before>
void refine_group(const PackedMatrix& w, const std::size_t* rows, std::size_t count,
                  const ActivationLayout& layout, const std::uint8_t* row, float* y,
                  const Before& before) {
  const auto* x_scales = reinterpret_cast<const float*>(row + layout.scale_offset);
  const auto* corrections = reinterpret_cast<const std::int32_t*>(row + layout.correction_offset);
  const std::uint8_t* weight_scales = w.group_scales(rows[0] / kGroupRows);
  alignas(64) float scales[kTableBlocks * kGroupRows];
  alignas(64) float bias[kGroupRows];
  float sums[kGroupRows] = {};
  typename V::F total_bias = V::f_set1(0.0F);
  for (std::size_t first = 0; first < layout.blocks; first += kTableBlocks) {
    const std::size_t blocks = smaller(kTableBlocks, layout.blocks - first);
    for (std::size_t b = first; b < first + blocks; ++b) {
      typename V::F scale =
          V::f_set1(0.0F);  // the even number of blocks may be one more than there are
      if (b < w.blocks())
        scale = V::f_mul(V::f_load_scales(weight_scales + b * kGroupRows, w.scale_code),
                         V::f_set1(x_scales[b]));
      V::f_store(scales + (b - first) * kGroupRows, scale);
      if (V::kBiased)
        total_bias = V::f_fma(scale, V::f_set1(static_cast<float>(corrections[b])), total_bias);
    }
    for (std::size_t i = 0; i < count; ++i) {
      if (first == 0) before(i);
      sums[i] += low_product<V>(w, rows[i], first, blocks, row, scales);
    }
  }
  V::f_store(bias, total_bias);
  // nibbles() yields sixteenfold values
  for (std::size_t i = 0; i < count; ++i)
    y[rows[i]] += (sums[i] + bias[rows[i] % kGroupRows]) * 0.0625F;
}

// Of the i-th of some rows in order: its group's scales too, unless the row before it has asked for
// them.
inline void prefetch_low(const PackedMatrix& w, const std::size_t* rows, std::size_t i) {
  const std::uint8_t* low = w.low_row(rows[i]);
  for (std::size_t at = 0; at < w.low_row_bytes(); at += 64) prefetch(low + at);
  const std::size_t group = rows[i] / kGroupRows;
  if (i == 0 || rows[i - 1] / kGroupRows != group) prefetch_scales(w, group);
}

template <class V>
float largest(const float* x, std::size_t size) {
  typename V::F peak = V::f_set1(x[0]);
  std::size_t i = 0;
  for (; i + 16 <= size; i += 16) peak = V::f_max(peak, V::f_load(x + i));
  float found = V::f_hmax(peak);
  for (; i < size; ++i) found = x[i] > found ? x[i] : found;
  return found;
}

template <class V>
void refine(const PackedMatrix& w, std::size_t begin, std::size_t end,
            const ActivationLayout& layout, const std::uint8_t* row, float least, float* y,
            std::size_t outputs) {
  // Found first, so that the memory of the next ones, which lie far apart, can be asked for early.
  constexpr std::size_t kAhead = 6;
  std::size_t found[kScreenGroups * kGroupRows];
  std::size_t count = 0;
  for (std::size_t from = begin * kGroupRows; from < smaller(outputs, end * kGroupRows);
       from += kGroupRows) {
    const std::size_t to = smaller(outputs, from + kGroupRows);
    if (largest<V>(y + from, to - from) < least) continue;
    for (std::size_t r = from; r < to; ++r)
      if (y[r] >= least) found[count++] = r;
  }
  for (std::size_t i = 0; i < smaller(count, kAhead); ++i) prefetch_low(w, found, i);
  for (std::size_t i = 0, next; i < count; i = next) {
    for (next = i + 1; next < count && found[next] / kGroupRows == found[i] / kGroupRows;) ++next;
    refine_group<V>(w, found + i, next - i, layout, row, y, [&](std::size_t n) {
      if (i + n + kAhead < count) prefetch_low(w, found, i + n + kAhead);
    });
  }
}

// Four independent sums hide the latency of the multiply-add.
template <class V, class Form>
void matvec_float(const PackedMatrix& w, std::size_t begin, std::size_t end,
                  const std::uint8_t* row, float* sums) {
  constexpr Bits<Form::kTraits.cell_bits> width;
  constexpr std::size_t step = activation_bytes<V>(width);
  Widened<false> room;
  for (std::size_t g = begin; g < end; ++g, sums += kGroupRows) {
    CellStream<V, Form> stream(w, g, room);
    typename V::F a = V::f_set1(0.0F), b = a, c = a, d = a;
    const std::uint8_t* x = row;
    for (std::size_t i = 0; i < w.cells; i += 4, x += 4 * step) {
      stream.template prefetch_ahead<false>();
      a = V::dot(width, a, stream.template next<0>(), x);
      b = V::dot(width, b, stream.template next<1>(), x + step);
      c = V::dot(width, c, stream.template next<2>(), x + 2 * step);
      d = V::dot(width, d, stream.template next<3>(), x + 3 * step);
    }
    V::f_store(sums, V::f_add(V::f_add(a, b), V::f_add(c, d)));
  }
}

template <class V>
void matvec(const PackedMatrix& w, std::size_t begin, std::size_t end,
            const ActivationLayout& layout, const std::uint8_t* row, float* sums) {
  with_form(w, [&](auto form) {
    using Form = decltype(form);
    if constexpr (Form::kTraits.integer())
      matvec_integer<V, Form>(w, begin, end, layout, row, sums);
    else
      matvec_float<V, Form>(w, begin, end, row, sums);
  });
}

// ---- A few rows: a cell is expanded once, and meets all of them -------------------------------

// The next cells of a group. An instruction set with few registers keeps some of them in the
// first-level cache; what expanding them took is saved all the same.
template <class V, std::size_t Cells>
struct CellBlock {
  typename V::Cell cell[Cells];

  template <class Stream>
  OWL_INLINE explicit CellBlock(Stream& stream) {
#pragma GCC unroll 8
    for (std::size_t i = 0; i < Cells; i += 4) {
      stream.template prefetch_ahead<true>();
      cell[i] = stream.template next<0>();
      cell[i + 1] = stream.template next<1>();
      cell[i + 2] = stream.template next<2>();
      cell[i + 3] = stream.template next<3>();
    }
  }

  // Exact integer sums over the cells.
  template <class P>
  OWL_INLINE typename V::I sums(const std::uint8_t* x, std::int32_t correction) const {
    typename V::I a = P::begin(correction);
    typename V::I c = P::begin(0);
#pragma GCC unroll 8
    for (std::size_t i = 0; i < Cells; i += 2) {
      a = P::add(a, cell[i], V::broadcast(x + 4 * i));
      c = P::add(c, cell[i + 1], V::broadcast(x + 4 * i + 4));
    }
    return P::end(P::join(a, c), correction);
  }

  // Added to the four sums that one row by itself has.
  template <std::size_t CellBits>
  OWL_INLINE void add_to(typename V::F* sums, const std::uint8_t* x) const {
    constexpr Bits<CellBits> width;
    typename V::F s[4] = {sums[0], sums[1], sums[2], sums[3]};
#pragma GCC unroll 8
    for (std::size_t i = 0; i < Cells; ++i)
      s[i % 4] = V::dot(width, s[i % 4], cell[i], x + i * activation_bytes<V>(width));
    for (std::size_t i = 0; i < 4; ++i) sums[i] = s[i];
  }
};

// Calls work(block, its first cell) for all cells of a group.
template <class V, class Stream, class Work>
OWL_INLINE void for_each_block(Stream& stream, std::size_t cells, const Work& work) {
  const std::size_t whole = cells / kBlockCells * kBlockCells;
  for (std::size_t c = 0; c < whole; c += kBlockCells) work(CellBlock<V, kBlockCells>(stream), c);
  if (whole < cells) work(CellBlock<V, kBlockCells / 2>(stream), whole);
}

// sums [count, stride floats]. Each row's are those of `matvec` to the last bit.
template <class V, class Form>
void few_integer(const PackedMatrix& w, std::size_t begin, std::size_t end,
                 const ActivationLayout& layout, const std::uint8_t* rows, std::size_t count,
                 float* sums, std::size_t stride) {
  using P = Products<V, Form>;
  Widened<CellStream<V, Form>::kWidens> room;
  for (std::size_t g = begin; g < end; ++g, sums += kGroupRows) {
    CellStream<V, Form> stream(w, g, room);
    const std::uint8_t* weight_scales = w.group_scales(g);
    prefetch_scales(w, g + 2);
    typename V::F total[kFewRows];
    for (std::size_t m = 0; m < count; ++m) total[m] = V::f_set1(0.0F);
    for_each_block<V>(stream, w.cells, [&](const auto& block, std::size_t c) OWL_ALWAYS_INLINE {
      const std::size_t b = c / kBlockCells;
      const typename V::F weight_scale =
          V::f_load_scales(weight_scales + (b >> w.scale_shift) * kGroupRows, w.scale_code);
      const std::uint8_t* row = rows;
      for (std::size_t m = 0; m < count; ++m, row += layout.stride) {
        float scale;
        std::memcpy(&scale, row + layout.scale_offset + 4 * b, 4);
        std::int32_t correction = 0;
        if (P::kCorrected) std::memcpy(&correction, row + layout.correction_offset + 4 * b, 4);
        const typename V::I sum = block.template sums<P>(row + b * kBlockColumns, correction);
        total[m] = V::f_fma(V::to_float(sum), V::f_mul(weight_scale, V::f_set1(scale)), total[m]);
      }
    });
    for (std::size_t m = 0; m < count; ++m) V::f_store(sums + m * stride, total[m]);
  }
}

template <class V, class Form>
void few_float(const PackedMatrix& w, std::size_t begin, std::size_t end,
               const ActivationLayout& layout, const std::uint8_t* rows, std::size_t count,
               float* sums, std::size_t stride) {
  constexpr std::size_t cell_bits = Form::kTraits.cell_bits;
  Widened<false> room;
  for (std::size_t g = begin; g < end; ++g, sums += kGroupRows) {
    CellStream<V, Form> stream(w, g, room);
    typename V::F total[kFewRows][4];
    for (std::size_t m = 0; m < count; ++m)
      for (typename V::F& sum : total[m]) sum = V::f_set1(0.0F);
    for_each_block<V>(stream, w.cells, [&](const auto& block, std::size_t c) OWL_ALWAYS_INLINE {
      const std::uint8_t* x = rows + c * activation_bytes<V>(Bits<cell_bits>{});
      for (std::size_t m = 0; m < count; ++m, x += layout.stride)
        block.template add_to<cell_bits>(total[m], x);
    });
    for (std::size_t m = 0; m < count; ++m)
      V::f_store(sums + m * stride,
                 V::f_add(V::f_add(total[m][0], total[m][1]), V::f_add(total[m][2], total[m][3])));
  }
}

template <class V>
void few(const PackedMatrix& w, std::size_t begin, std::size_t end, const ActivationLayout& layout,
         const std::uint8_t* rows, std::size_t count, float* sums, std::size_t stride) {
  with_form(w, [&](auto form) {
    using Form = decltype(form);
    if constexpr (Form::kTraits.integer())
      few_integer<V, Form>(w, begin, end, layout, rows, count, sums, stride);
    else
      few_float<V, Form>(w, begin, end, layout, rows, count, sums, stride);
  });
}

// ---- Many rows: unpack a tile of weights into the first-level cache, then multiply densely -----

// Rows [M] x panel: tile [cells][Groups][64 bytes], x rows `stride` bytes apart, sums [M, Groups *
// 16].
template <class V, std::size_t CellBits, int M>
inline void multiply_float(const std::uint8_t* tile, std::size_t cells, const std::uint8_t* x,
                           std::size_t stride, float* sums, std::size_t sums_stride) {
  constexpr int N = V::kPanelGroups;
  constexpr Bits<CellBits> width;
  typename V::F acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m][n] = V::f_load(sums + m * sums_stride + n * kGroupRows);
  for (std::size_t c = 0; c < cells; ++c, tile += N * kCellBytes, x += activation_bytes<V>(width)) {
    typename V::Cell w[N];
    for (int n = 0; n < N; ++n) w[n] = V::load_cell(tile + n * kCellBytes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[m][n] = V::dot(width, acc[m][n], w[n], x + m * stride);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) V::f_store(sums + m * sums_stride + n * kGroupRows, acc[m][n]);
}

template <class V, class P, int M>
inline void multiply_integer(const std::uint8_t* tile, const float* tile_scales, std::size_t cells,
                             std::size_t first_block, const ActivationLayout& layout,
                             const std::uint8_t* row, const std::uint8_t* x, float* sums,
                             std::size_t sums_stride) {
  constexpr int N = V::kPanelGroups;
  const std::size_t stride = layout.stride;
  auto place = [&](int m, int n) { return sums + m * sums_stride + n * kGroupRows; };
  typename V::F total[M][N];
  if constexpr (P::kKeepsTotals)
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) total[m][n] = V::f_load(place(m, n));
  for (std::size_t done = 0, b = first_block; done < cells; done += kBlockCells, ++b) {
    typename V::I acc[M][N];
    float scale[M];
    std::int32_t correction[M] = {};
    for (int m = 0; m < M; ++m) {
      const std::uint8_t* r = row + m * stride;
      std::memcpy(&scale[m], r + layout.scale_offset + 4 * b, 4);
      if (P::kCorrected) std::memcpy(&correction[m], r + layout.correction_offset + 4 * b, 4);
      for (int n = 0; n < N; ++n) acc[m][n] = P::begin(correction[m]);
    }
    const std::size_t block = smaller(kBlockCells, cells - done);
    for (std::size_t c = 0; c < block; ++c, tile += N * kCellBytes, x += 4) {
      typename V::Cell w[N];
      for (int n = 0; n < N; ++n) w[n] = V::held_cell(tile + n * kCellBytes);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n)
          acc[m][n] = P::add(acc[m][n], w[n], V::broadcast(x + m * stride));
      }
    }
    const float* weight_scale = tile_scales + done / kBlockCells * N * kGroupRows;
    for (int n = 0; n < N; ++n) {
      const typename V::F s = V::f_load(weight_scale + n * kGroupRows);
      for (int m = 0; m < M; ++m) {
        if constexpr (!P::kKeepsTotals) total[m][n] = V::f_load(place(m, n));
        total[m][n] = V::f_fma(V::to_float(P::end(acc[m][n], correction[m])),
                               V::f_mul(s, V::f_set1(scale[m])), total[m][n]);
        if constexpr (!P::kKeepsTotals) V::f_store(place(m, n), total[m][n]);
      }
    }
  }
  if constexpr (P::kKeepsTotals)
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) V::f_store(place(m, n), total[m][n]);
}

// fp32 rows x [count, stride floats] times tile [cells][Groups * 16], added to sums.
template <class V>
void multiply_fp32_rows(const float* tile, std::size_t cells, const float* x, std::size_t stride,
                        std::size_t count, float* sums, std::size_t sums_stride) {
  constexpr int M = V::kFloatRows;
  const auto* t = reinterpret_cast<const std::uint8_t*>(tile);
  std::size_t m = 0;
  for (; m + M <= count; m += M)
    multiply_float<V, 32, M>(t, cells, reinterpret_cast<const std::uint8_t*>(x + m * stride),
                             stride * sizeof(float), sums + m * sums_stride, sums_stride);
  for (; m < count; ++m)
    multiply_float<V, 32, 1>(t, cells, reinterpret_cast<const std::uint8_t*>(x + m * stride),
                             stride * sizeof(float), sums + m * sums_stride, sums_stride);
}

// A cell of upper bits with its lower bits, which lie in 16 different rows.
template <class V>
inline typename V::Cell add_low(const PackedMatrix& w, std::size_t group, std::size_t c,
                                typename V::Cell cell) {
  const std::size_t column = 4 * c, place = column % kLowColumns;
  const std::uint8_t* low =
      w.low_row(group * kGroupRows) + column / kLowColumns * kCellBytes + place % kCellBytes;
  alignas(64) std::uint8_t both[kCellBytes];
  for (std::size_t r = 0; r < kGroupRows; ++r)
    std::memcpy(both + 4 * r, low + r * w.low_row_bytes(), 4);
  return place < kCellBytes ? V::template add_nibbles<false>(cell, V::load_cell(both))
                            : V::template add_nibbles<true>(cell, V::load_cell(both));
}

// Calls put(i, cell) for each of `cells` cells of a group from `first` on, which are the stream's
// next.
template <class V, class Form, class Put>
void unpack_cells(const PackedMatrix& w, std::size_t group, std::size_t first, std::size_t cells,
                  CellStream<V, Form>& from, const Put& put) {
  CellStream<V, Form> stream = from;  // whose places stay in registers, whatever is put
  for (std::size_t c = 0; c < cells; c += 4) {
    if constexpr (Form::kStorage == Storage::kPlanes) {
      for (std::size_t i = c; i < c + 4; i += 2) {
        const typename V::Cell high =
            V::load_cell(w.group_values(group) + (first + i) / 2 * kCellBytes);
        put(i, V::bias8(add_low<V>(w, group, first + i, V::template nibbles<false>(high))));
        put(i + 1, V::bias8(add_low<V>(w, group, first + i + 1, V::template nibbles<true>(high))));
      }
    } else {
      stream.template prefetch_ahead<true>();
      put(c, stream.template next<0>());
      put(c + 1, stream.template next<1>());
      put(c + 2, stream.template next<2>());
      put(c + 3, stream.template next<3>());
    }
  }
  from = stream;
}

// Scales of a tile's groups for its blocks of activations from `first` on: [blocks][Groups][16].
template <class V>
void unpack_scales(const PackedMatrix& w, std::size_t begin, std::size_t groups, std::size_t first,
                   std::size_t cells, float* scales) {
  for (std::size_t b = 0; b < (cells + kBlockCells - 1) / kBlockCells; ++b) {
    const std::size_t place = ((first + b) >> w.scale_shift) * kGroupRows;
    for (std::size_t n = 0; n < groups; ++n)
      V::f_store(scales + (b * V::kPanelGroups + n) * kGroupRows,
                 V::f_load_scales(w.group_scales(begin + n) + place, w.scale_code));
  }
}

template <class V, class Form>
void panel_of(const PackedMatrix& w, std::size_t begin, std::size_t groups,
              const ActivationLayout& layout, const std::uint8_t* rows, std::size_t count,
              std::uint8_t* scratch, float* sums, std::size_t sums_stride) {
  constexpr std::size_t N = V::kPanelGroups;
  constexpr std::size_t cell_bits = Form::kTraits.cell_bits;
  const std::size_t stride = layout.stride;
  for (std::size_t m = 0; m < count; ++m)
    std::memset(sums + m * sums_stride, 0, N * kGroupRows * sizeof(float));
  if (groups < N) std::memset(scratch, 0, kPanelBlockCells * N * kCellBytes);
  CellStream<V, Form> streams[N];
  Widened<CellStream<V, Form>::kWidens> rooms[N];
  for (std::size_t n = 0; n < groups; ++n) streams[n] = CellStream<V, Form>(w, begin + n, rooms[n]);
  for (std::size_t done = 0; done < w.cells; done += kPanelBlockCells) {
    const std::size_t cells = smaller(kPanelBlockCells, w.cells - done);
    for (std::size_t n = 0; n < groups; ++n)
      unpack_cells(w, begin + n, done, cells, streams[n],
                   [&](std::size_t c, typename V::Cell cell) {
                     V::store_cell(scratch + (c * N + n) * kCellBytes, cell);
                   });
    const std::uint8_t* x = rows + done * activation_bytes<V>(Bits<cell_bits>{});
    std::size_t m = 0;
    if constexpr (Form::kTraits.integer()) {
      // Planes are put together again before.
      using P = std::conditional_t<Form::kStorage == Storage::kPlanes, Wide<V>, Products<V, Form>>;
      constexpr int M = P::kRows;
      const std::size_t block = done / kBlockCells;
      alignas(64) float scales[kPanelBlockCells / kBlockCells * N * kGroupRows] = {};
      unpack_scales<V>(w, begin, groups, block, cells, scales);
      for (; m + M <= count; m += M)
        multiply_integer<V, P, M>(scratch, scales, cells, block, layout, rows + m * stride,
                                  x + m * stride, sums + m * sums_stride, sums_stride);
      for (; m < count; ++m)
        multiply_integer<V, P, 1>(scratch, scales, cells, block, layout, rows + m * stride,
                                  x + m * stride, sums + m * sums_stride, sums_stride);
    } else {
      constexpr int M = V::kFloatRows;
      for (; m + M <= count; m += M)
        multiply_float<V, cell_bits, M>(scratch, cells, x + m * stride, stride,
                                        sums + m * sums_stride, sums_stride);
      for (; m < count; ++m)
        multiply_float<V, cell_bits, 1>(scratch, cells, x + m * stride, stride,
                                        sums + m * sums_stride, sums_stride);
    }
  }
}

template <class V>
void panel(const PackedMatrix& w, std::size_t begin, std::size_t groups,
           const ActivationLayout& layout, const std::uint8_t* rows, std::size_t count,
           std::uint8_t* scratch, float* sums, std::size_t stride) {
  with_form(w, [&](auto form) {
    panel_of<V, decltype(form)>(w, begin, groups, layout, rows, count, scratch, sums, stride);
  });
}

}  // namespace
}  // namespace owl
