// The kernels, written once over a small set of vector operations `V` that each instruction set
// provides.
//
// V has: F (16 floats), I (16 int32), Cell (64 bytes of weights), their elementary operations,
// `expand8/16/32` (packed values + mask -> cell) and `dot8/16/32` (cell times broadcast
// activations, added to 16 sums). Everything here is in an anonymous namespace and calls nothing
// that the linker could share between files: each kernel file is compiled with flags of its own,
// and a shared inline function would carry one file's instructions to every processor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace owl {
namespace {

constexpr std::size_t kPrefetchBytes =
    2048;  // hides memory latency; without it the loops reach a third of it

inline std::size_t smaller(std::size_t a, std::size_t b) { return a < b ? a : b; }
inline std::size_t round_up(std::size_t n, std::size_t to) { return (n + to - 1) / to * to; }
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
// Into the second-level cache: more of these can be under way at once, for what is needed some
// microseconds later.
inline void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

// ---- Weights -----------------------------------------------------------------------------------

// Walks the cells of one row group, expanding each.
template <class V, ValueType T, Storage S>
struct CellStream {
  const std::uint8_t* mask = nullptr;
  const std::uint8_t* value = nullptr;

  CellStream() = default;
  CellStream(const PackedMatrix& w, std::size_t group)
      : mask(S == Storage::kSparse ? w.group_masks(group) : nullptr),
        value(w.group_values(group)) {}

  // Cells come in turn from an even place and from an odd one.
  template <bool Odd>
  inline typename V::Cell next() {
    if constexpr (S == Storage::kPlanes) {
      const typename V::Cell cell = V::template nibbles<Odd>(V::load_cell(value));
      if constexpr (Odd) value += kCellBytes;
      return cell;
    } else if constexpr (S == Storage::kDense) {
      const typename V::Cell cell = V::load_cell(value);
      value += kCellBytes;
      return cell;
    } else if constexpr (T == ValueType::kInt8) {
      std::uint64_t bits;
      std::memcpy(&bits, mask, 8);
      mask += 8;
      const typename V::Cell cell = V::expand8(value, bits);
      value += static_cast<std::size_t>(__builtin_popcountll(bits));
      return cell;
    } else if constexpr (T == ValueType::kBf16) {
      std::uint32_t bits;
      std::memcpy(&bits, mask, 4);
      mask += 4;
      const typename V::Cell cell = V::expand16(value, bits);
      value += 2 * static_cast<std::size_t>(__builtin_popcount(bits));
      return cell;
    } else {
      std::uint16_t bits;
      std::memcpy(&bits, mask, 2);
      mask += 2;
      const typename V::Cell cell = V::expand32(value, bits);
      value += 4 * static_cast<std::size_t>(__builtin_popcount(bits));
      return cell;
    }
  }

  // Called once for every four cells; a prefetch past the end of the block is harmless, it never
  // faults.
  inline void prefetch_ahead() const {
    const char* p = reinterpret_cast<const char*>(value) + kPrefetchBytes;
    prefetch(p);
    prefetch(p + 64);
    if constexpr (S == Storage::kDense || T != ValueType::kInt8) {
      prefetch(p + 128);
      prefetch(p + 192);
    }
    if constexpr (S == Storage::kSparse) prefetch(mask + kPrefetchBytes / 2);
  }
};

// ---- Activations -------------------------------------------------------------------------------

template <class V>
ActivationLayout activation_layout(const PackedMatrix& w) {
  ActivationLayout layout;
  const std::size_t columns = w.cells * columns_per_cell(w.type);
  if (w.type == ValueType::kInt8) {
    layout.blocks = round_up(w.scale_blocks(), 2);
    layout.scale_offset = layout.blocks * kBlockColumns;
    layout.correction_offset = layout.scale_offset + round_up(layout.blocks * 4, 64);
    layout.stride = layout.correction_offset + round_up(layout.blocks * 4, 64);
  } else {
    const std::size_t bytes = w.type == ValueType::kBf16 ? sizeof(typename V::Half) : sizeof(float);
    layout.stride = round_up(columns * bytes, 64);
  }
  return layout;
}

// One block of 32 columns -> int8 [32] in [-127, 127], its scale, and the correction -128 * sum
// that kernels need which multiply weights biased by 128. A block with an infinity or NaN gets the
// scale NaN.
template <class V>
void quantize_block(const float* x, std::size_t size, std::int8_t* q, float* scale,
                    std::int32_t* correction) {
  using F = typename V::F;
  alignas(64) float padded[kBlockColumns] = {};
  if (size < kBlockColumns) {
    std::memcpy(padded, x, size * sizeof(float));
    x = padded;
  }
  const F zero = V::f_set1(0.0F);
  const F parts[2] = {V::f_load(x), V::f_load(x + 16)};
  const F peak = V::f_max(V::f_abs(parts[0]), V::f_abs(parts[1]));
  const F bad =
      V::f_add(V::f_mul(parts[0], zero), V::f_mul(parts[1], zero));  // 0 * inf and 0 * NaN are NaN
  const float largest = V::f_hmax(peak);
  const float poison = V::f_hsum(bad);
  const bool usable = largest > 1e-30F && poison == 0.0F;
  const F inverse = V::f_set1(usable ? 127.0F / largest : 0.0F);
  for (int i = 0; i < 2; ++i)
    V::store_int8(q + 16 * i, poison == 0.0F ? V::f_mul(parts[i], inverse) : zero);
  std::int32_t sum = 0;
  for (std::size_t i = 0; i < kBlockColumns; ++i) sum += q[i];
  *scale = poison == 0.0F ? (usable ? largest / 127.0F : 0.0F) : __builtin_nanf("");
  *correction = -128 * sum;
}

template <class V>
void prepare_row(const PackedMatrix& w, const ActivationLayout& layout, const float* x,
                 std::uint8_t* row) {
  if (w.type == ValueType::kInt8) {
    auto* q = reinterpret_cast<std::int8_t*>(row);
    auto* scales = reinterpret_cast<float*>(row + layout.scale_offset);
    auto* corrections = reinterpret_cast<std::int32_t*>(row + layout.correction_offset);
    for (std::size_t b = 0; b < layout.blocks; ++b) {
      const std::size_t at = smaller(w.cols, kBlockColumns * b);
      quantize_block<V>(x + at, smaller(kBlockColumns, w.cols - at), q + kBlockColumns * b,
                        scales + b, corrections + b);
    }
  } else if (w.type == ValueType::kBf16) {
    auto* half = reinterpret_cast<typename V::Half*>(row);
    std::size_t i = 0;
    for (; i + 16 <= w.cols; i += 16) V::store_half_row(half + i, V::f_load(x + i));
    if (i < w.cols) {
      alignas(64) float tail[16] = {};
      std::memcpy(tail, x + i, (w.cols - i) * sizeof(float));
      alignas(64) typename V::Half converted[16];
      V::store_half_row(converted, V::f_load(tail));
      const std::size_t columns = w.cells * 2;
      for (std::size_t j = i; j < columns; ++j)
        half[j] = j - i < 16 ? converted[j - i] : typename V::Half{};
    } else {
      for (; i < w.cells * 2; ++i) half[i] = typename V::Half{};
    }
  } else {
    auto* values = reinterpret_cast<float*>(row);
    std::memcpy(values, x, w.cols * sizeof(float));
    for (std::size_t i = w.cols; i < w.cells; ++i) values[i] = 0.0F;
  }
}

// ---- One row -----------------------------------------------------------------------------------

// One block of cells: exact integer sums.
template <class V, class Stream>
OWL_INLINE typename V::I block_int8(Stream& stream, const std::uint8_t* x, std::size_t cells,
                                    std::int32_t correction) {
  typename V::I a = V::i_set1(V::kBiased ? correction : 0);
  typename V::I c = V::i_set1(0);
  for (std::size_t i = 0; i < cells; i += 4, x += 16) {
    stream.prefetch_ahead();
    a = V::dot8(a, V::bias8(stream.template next<false>()), V::broadcast(x));
    c = V::dot8(c, V::bias8(stream.template next<true>()), V::broadcast(x + 4));
    a = V::dot8(a, V::bias8(stream.template next<false>()), V::broadcast(x + 8));
    c = V::dot8(c, V::bias8(stream.template next<true>()), V::broadcast(x + 12));
  }
  return V::i_add(a, c);
}

// A group's scales are few, but far from its values: unforeseen, they would cost a memory latency
// for each group.
inline void prefetch_scales(const PackedMatrix& w, std::size_t group) {
  const char* p = reinterpret_cast<const char*>(w.group_scales(group));
  for (std::size_t i = 0; i < w.scale_blocks() * kGroupRows; i += 64) prefetch(p + i);
}

template <class V, Storage S>
void matvec_int8(const PackedMatrix& w, std::size_t begin, std::size_t end,
                 const ActivationLayout& layout, const std::uint8_t* row, float* sums) {
  const auto* scales = reinterpret_cast<const float*>(row + layout.scale_offset);
  const auto* corrections = reinterpret_cast<const std::int32_t*>(row + layout.correction_offset);
  const std::size_t whole = w.cells / kBlockCells;
  for (std::size_t g = begin; g < end; ++g, sums += kGroupRows) {
    CellStream<V, ValueType::kInt8, S> stream(w, g);
    const std::uint8_t* weight_scales = w.group_scales(g);
    prefetch_scales(w, g + 2);
    typename V::F total = V::f_set1(0.0F);
    auto add = [&](std::size_t b, typename V::I sum) {
      const typename V::F scale =
          V::f_load_scales(weight_scales + b * kGroupRows, w.scale_exponent);
      total = V::f_fma(V::to_float(sum), V::f_mul(scale, V::f_set1(scales[b])), total);
    };
    for (std::size_t b = 0; b < whole; ++b)
      add(b, block_int8<V>(stream, row + b * kBlockColumns, kBlockCells, corrections[b]));
    if (w.cells > whole * kBlockCells)
      add(whole, block_int8<V>(stream, row + whole * kBlockColumns, w.cells - whole * kBlockCells,
                               corrections[whole]));
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
        V::dot8(V::i_set1(0), V::bias8(cell), V::load_cell(row + b * kBlockColumns));
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
      if (b < w.scale_blocks())
        scale = V::f_mul(V::f_load_scales(weight_scales + b * kGroupRows, w.scale_exponent),
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

// fp32 and bf16: four independent sums hide the latency of the multiply-add.
template <class V, ValueType T, Storage S>
void matvec_float(const PackedMatrix& w, std::size_t begin, std::size_t end,
                  const std::uint8_t* row, float* sums) {
  constexpr std::size_t step = T == ValueType::kBf16 ? 2 * sizeof(typename V::Half) : sizeof(float);
  for (std::size_t g = begin; g < end; ++g, sums += kGroupRows) {
    CellStream<V, T, S> stream(w, g);
    typename V::F a = V::f_set1(0.0F), b = a, c = a, d = a;
    const std::uint8_t* x = row;
    for (std::size_t i = 0; i < w.cells; i += 4, x += 4 * step) {
      stream.prefetch_ahead();
      if constexpr (T == ValueType::kBf16) {
        a = V::dot16(a, stream.template next<false>(), x);
        b = V::dot16(b, stream.template next<true>(), x + step);
        c = V::dot16(c, stream.template next<false>(), x + 2 * step);
        d = V::dot16(d, stream.template next<true>(), x + 3 * step);
      } else {
        a = V::dot32(a, stream.template next<false>(), x);
        b = V::dot32(b, stream.template next<true>(), x + step);
        c = V::dot32(c, stream.template next<false>(), x + 2 * step);
        d = V::dot32(d, stream.template next<true>(), x + 3 * step);
      }
    }
    V::f_store(sums, V::f_add(V::f_add(a, b), V::f_add(c, d)));
  }
}

template <ValueType T, Storage S>
struct Form {
  static constexpr ValueType type = T;
  static constexpr Storage storage = S;
};

// Calls work(Form) with a weight's type and storage as constants.
template <class Work>
inline void with_form(const PackedMatrix& w, const Work& work) {
  constexpr ValueType kFp32 = ValueType::kFp32, kBf16 = ValueType::kBf16, kInt8 = ValueType::kInt8;
  constexpr Storage kSparse = Storage::kSparse, kDense = Storage::kDense;
  switch (w.type) {
    case kInt8:
      if (w.storage == Storage::kPlanes) return work(Form<kInt8, Storage::kPlanes>{});
      return w.sparse() ? work(Form<kInt8, kSparse>{}) : work(Form<kInt8, kDense>{});
    case kBf16: return w.sparse() ? work(Form<kBf16, kSparse>{}) : work(Form<kBf16, kDense>{});
    case kFp32: return w.sparse() ? work(Form<kFp32, kSparse>{}) : work(Form<kFp32, kDense>{});
  }
}

template <class V>
void matvec(const PackedMatrix& w, std::size_t begin, std::size_t end,
            const ActivationLayout& layout, const std::uint8_t* row, float* sums) {
  with_form(w, [&](auto form) {
    if constexpr (form.type == ValueType::kInt8)
      matvec_int8<V, form.storage>(w, begin, end, layout, row, sums);
    else
      matvec_float<V, form.type, form.storage>(w, begin, end, row, sums);
  });
}

// ---- Many rows: unpack a tile of weights into the first-level cache, then multiply densely -----

// Rows [M] x panel: tile [cells][Groups][64 bytes], x rows `stride` bytes apart, sums [M, Groups *
// 16].
template <class V, ValueType T, int M>
inline void multiply_float(const std::uint8_t* tile, std::size_t cells, const std::uint8_t* x,
                           std::size_t stride, float* sums, std::size_t sums_stride) {
  constexpr int N = V::kPanelGroups;
  constexpr std::size_t step = T == ValueType::kBf16 ? 2 * sizeof(typename V::Half) : sizeof(float);
  typename V::F acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m][n] = V::f_load(sums + m * sums_stride + n * kGroupRows);
  for (std::size_t c = 0; c < cells; ++c, tile += N * kCellBytes, x += step) {
    typename V::Cell w[N];
    for (int n = 0; n < N; ++n) w[n] = V::load_cell(tile + n * kCellBytes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        if constexpr (T == ValueType::kBf16)
          acc[m][n] = V::dot16(acc[m][n], w[n], x + m * stride);
        else
          acc[m][n] = V::dot32(acc[m][n], w[n], x + m * stride);
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) V::f_store(sums + m * sums_stride + n * kGroupRows, acc[m][n]);
}

template <class V, int M>
inline void multiply_int8(const std::uint8_t* tile, const float* tile_scales, std::size_t cells,
                          std::size_t first_block, const ActivationLayout& layout,
                          const std::uint8_t* row, const std::uint8_t* x, float* sums,
                          std::size_t sums_stride) {
  constexpr int N = V::kPanelGroups;
  const std::size_t stride = layout.stride;
  typename V::F total[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) total[m][n] = V::f_load(sums + m * sums_stride + n * kGroupRows);
  for (std::size_t done = 0, b = first_block; done < cells; done += kBlockCells, ++b) {
    typename V::I acc[M][N];
    float scale[M];
    for (int m = 0; m < M; ++m) {
      const std::uint8_t* r = row + m * stride;
      std::memcpy(&scale[m], r + layout.scale_offset + 4 * b, 4);
      std::int32_t correction = 0;
      if (V::kBiased) std::memcpy(&correction, r + layout.correction_offset + 4 * b, 4);
      for (int n = 0; n < N; ++n) acc[m][n] = V::i_set1(correction);
    }
    const std::size_t block = smaller(kBlockCells, cells - done);
    for (std::size_t c = 0; c < block; ++c, tile += N * kCellBytes, x += 4) {
      typename V::Cell w[N];
      for (int n = 0; n < N; ++n) w[n] = V::load_cell(tile + n * kCellBytes);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n)
          acc[m][n] = V::dot8(acc[m][n], w[n], V::broadcast(x + m * stride));
      }
    }
    const float* weight_scale = tile_scales + done / kBlockCells * N * kGroupRows;
    for (int n = 0; n < N; ++n) {
      const typename V::F s = V::f_load(weight_scale + n * kGroupRows);
      for (int m = 0; m < M; ++m)
        total[m][n] =
            V::f_fma(V::to_float(acc[m][n]), V::f_mul(s, V::f_set1(scale[m])), total[m][n]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) V::f_store(sums + m * sums_stride + n * kGroupRows, total[m][n]);
}

// fp32 rows x [count, stride floats] times tile [cells][Groups * 16], added to sums.
template <class V>
void multiply_fp32_rows(const float* tile, std::size_t cells, const float* x, std::size_t stride,
                        std::size_t count, float* sums, std::size_t sums_stride) {
  constexpr int M = V::kFloatRows;
  const auto* t = reinterpret_cast<const std::uint8_t*>(tile);
  std::size_t m = 0;
  for (; m + M <= count; m += M)
    multiply_float<V, ValueType::kFp32, M>(
        t, cells, reinterpret_cast<const std::uint8_t*>(x + m * stride), stride * sizeof(float),
        sums + m * sums_stride, sums_stride);
  for (; m < count; ++m)
    multiply_float<V, ValueType::kFp32, 1>(
        t, cells, reinterpret_cast<const std::uint8_t*>(x + m * stride), stride * sizeof(float),
        sums + m * sums_stride, sums_stride);
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

template <class V, ValueType T, Storage S>
void unpack_cells(const PackedMatrix& w, std::size_t group, std::size_t first, std::size_t cells,
                  std::size_t step, CellStream<V, T, S>& stream, std::uint8_t* tile) {
  auto put = [&](std::size_t c, typename V::Cell cell) {
    if constexpr (T == ValueType::kInt8) cell = V::bias8(cell);
    V::store_cell(tile + c * step, cell);
  };
  for (std::size_t c = 0; c < cells; c += 2) {
    if constexpr (S == Storage::kPlanes) {
      const typename V::Cell high =
          V::load_cell(w.group_values(group) + (first + c) / 2 * kCellBytes);
      put(c, add_low<V>(w, group, first + c, V::template nibbles<false>(high)));
      put(c + 1, add_low<V>(w, group, first + c + 1, V::template nibbles<true>(high)));
    } else {
      put(c, stream.template next<false>());
      put(c + 1, stream.template next<true>());
    }
  }
}

template <class V, ValueType T, Storage S>
void panel_of(const PackedMatrix& w, std::size_t begin, std::size_t groups,
              const ActivationLayout& layout, const std::uint8_t* rows, std::size_t count,
              std::uint8_t* scratch, float* sums) {
  constexpr std::size_t N = V::kPanelGroups;
  constexpr std::size_t width = N * kGroupRows;
  constexpr std::size_t step = T == ValueType::kInt8   ? 4
                               : T == ValueType::kBf16 ? 2 * sizeof(typename V::Half)
                                                       : 4;
  std::memset(sums, 0, count * width * sizeof(float));
  if (groups < N) std::memset(scratch, 0, kPanelBlockCells * N * kCellBytes);
  CellStream<V, T, S> streams[N];
  for (std::size_t n = 0; n < groups; ++n) streams[n] = CellStream<V, T, S>(w, begin + n);
  for (std::size_t done = 0; done < w.cells; done += kPanelBlockCells) {
    const std::size_t cells = smaller(kPanelBlockCells, w.cells - done);
    for (std::size_t n = 0; n < groups; ++n)
      unpack_cells(w, begin + n, done, cells, N * kCellBytes, streams[n], scratch + n * kCellBytes);
    const std::uint8_t* x = rows + done * step;
    if constexpr (T == ValueType::kInt8) {
      constexpr int M = V::kInt8Rows;
      const std::size_t block = done / kBlockCells;
      alignas(64) float scales[kPanelBlockCells / kBlockCells * N * kGroupRows] = {};
      for (std::size_t b = 0; b < (cells + kBlockCells - 1) / kBlockCells; ++b)
        for (std::size_t n = 0; n < groups; ++n)
          V::f_store(scales + (b * N + n) * kGroupRows,
                     V::f_load_scales(w.group_scales(begin + n) + (block + b) * kGroupRows,
                                      w.scale_exponent));
      std::size_t m = 0;
      for (; m + M <= count; m += M)
        multiply_int8<V, M>(scratch, scales, cells, block, layout, rows + m * layout.stride,
                            x + m * layout.stride, sums + m * width, width);
      for (; m < count; ++m)
        multiply_int8<V, 1>(scratch, scales, cells, block, layout, rows + m * layout.stride,
                            x + m * layout.stride, sums + m * width, width);
    } else {
      constexpr int M = V::kFloatRows;
      std::size_t m = 0;
      for (; m + M <= count; m += M)
        multiply_float<V, T, M>(scratch, cells, x + m * layout.stride, layout.stride,
                                sums + m * width, width);
      for (; m < count; ++m)
        multiply_float<V, T, 1>(scratch, cells, x + m * layout.stride, layout.stride,
                                sums + m * width, width);
    }
  }
}

template <class V>
void panel(const PackedMatrix& w, std::size_t begin, std::size_t groups,
           const ActivationLayout& layout, const std::uint8_t* rows, std::size_t count,
           std::uint8_t* scratch, float* sums) {
  with_form(w, [&](auto form) {
    panel_of<V, form.type, form.storage>(w, begin, groups, layout, rows, count, scratch, sums);
  });
}

// ---- Elementwise -------------------------------------------------------------------------------

// e^x to about 2 units in the last place, x held to [-87.3, 88.3]. NaN stays NaN: f_min and f_max
// return their second operand when either is NaN, as the x86 instructions do.
template <class V>
inline typename V::F exponential(typename V::F x) {
  using F = typename V::F;
  const F clamped = V::f_max(V::f_set1(-87.3F), V::f_min(V::f_set1(88.3F), x));
  // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer.
  const F magic = V::f_set1(12582912.0F);
  const F shifted = V::f_fma(clamped, V::f_set1(1.44269504F), magic);
  const F n = V::f_sub(shifted, magic);
  F r = V::f_fma(n, V::f_set1(-0.693359375F), clamped);
  r = V::f_fma(n, V::f_set1(2.12194440e-4F), r);
  F p = V::f_set1(1.9875691500e-4F);
  p = V::f_fma(p, r, V::f_set1(1.3981999507e-3F));
  p = V::f_fma(p, r, V::f_set1(8.3334519073e-3F));
  p = V::f_fma(p, r, V::f_set1(4.1665795894e-2F));
  p = V::f_fma(p, r, V::f_set1(1.6666665459e-1F));
  p = V::f_fma(p, r, V::f_set1(5.0000001201e-1F));
  p = V::f_fma(V::f_mul(p, r), r, V::f_add(r, V::f_set1(1.0F)));
  return V::scale_by_power(p, shifted);
}

template <class V>
inline typename V::F gated(Epilogue epilogue, typename V::F gate, typename V::F up) {
  using F = typename V::F;
  F inner = gate;  // silu(g) = g / (1 + e^-g)
  if (epilogue ==
      Epilogue::kGeluMul) {  // tanh form: g / (1 + e^(-2 sqrt(2/pi) (g + 0.044715 g^3)))
    const F cubic = V::f_mul(V::f_mul(gate, gate), V::f_mul(gate, V::f_set1(0.044715F)));
    inner = V::f_mul(V::f_add(gate, cubic), V::f_set1(1.5957691216F));
  }
  const F e = exponential<V>(V::f_sub(V::f_set1(0.0F), inner));
  return V::f_mul(V::f_div(gate, V::f_add(V::f_set1(1.0F), e)), up);
}

// Stores the lanes of one row group that exist.
template <class V>
inline void store_lanes(float* out, std::size_t lanes, typename V::F value) {
  if (lanes >= kGroupRows) return V::f_store(out, value);
  alignas(64) float buffer[kGroupRows];
  V::f_store(buffer, value);
  std::memcpy(out, buffer, lanes * sizeof(float));
}

template <class V>
inline typename V::F load_lanes(const float* x, std::size_t lanes) {
  if (lanes >= kGroupRows) return V::f_load(x);
  alignas(64) float buffer[kGroupRows] = {};
  std::memcpy(buffer, x, lanes * sizeof(float));
  return V::f_load(buffer);
}

template <class V>
void finish(std::size_t begin, std::size_t end, const float* sums, std::size_t sums_stride,
            std::size_t first, std::size_t count, const Output& output) {
  const std::size_t step = output.epilogue == Epilogue::kNone ? 1 : 2;
  for (std::size_t m = 0; m < count; ++m, sums += sums_stride) {
    float* out = output.data + (first + m) * output.cols;
    for (std::size_t g = begin; g < end; g += step) {
      const float* s = sums + (g - begin) * kGroupRows;
      typename V::F value = V::f_load(s);
      if (step == 2) value = gated<V>(output.epilogue, value, V::f_load(s + kGroupRows));
      const std::size_t column = g / step * kGroupRows;
      if (column >= output.cols) continue;
      const std::size_t lanes = output.cols - column;
      if (output.bias != nullptr)
        value = V::f_add(value, load_lanes<V>(output.bias + column, lanes));
      store_lanes<V>(out + column, lanes, value);
    }
  }
}

template <class V>
void rms_norm(const float* x, const float* skip, const float* gamma, std::size_t size,
              float epsilon, float* sum, float* y) {
  using F = typename V::F;
  F squares = V::f_set1(0.0F);
  for (std::size_t i = 0; i < size; i += kGroupRows) {
    F v = load_lanes<V>(x + i, size - i);
    if (skip != nullptr) v = V::f_add(v, load_lanes<V>(skip + i, size - i));
    if (sum != nullptr) store_lanes<V>(sum + i, size - i, v);
    store_lanes<V>(y + i, size - i, v);
    squares = V::f_fma(v, v, squares);
  }
  const F inverse =
      V::f_set1(1.0F / __builtin_sqrtf(V::f_hsum(squares) / static_cast<float>(size) + epsilon));
  for (std::size_t i = 0; i < size; i += kGroupRows) {
    const F v = V::f_mul(load_lanes<V>(y + i, size - i), inverse);
    store_lanes<V>(y + i, size - i, V::f_mul(v, load_lanes<V>(gamma + i, size - i)));
  }
}

// ---- Attention ---------------------------------------------------------------------------------

template <class V>
inline typename V::F load_cache(CacheType type, const void* base, std::size_t index) {
  return type == CacheType::kFp32 ? V::f_load(static_cast<const float*>(base) + index)
                                  : V::f_load_fp16(static_cast<const std::uint16_t*>(base) + index);
}

template <class V>
void store_cache(CacheType type, const float* x, std::size_t size, void* cache) {
  for (std::size_t i = 0; i < size; i += 16) {
    if (type == CacheType::kFp32)
      V::f_store(static_cast<float*>(cache) + i, V::f_load(x + i));
    else
      V::f_store_fp16(static_cast<std::uint16_t*>(cache) + i, V::f_load(x + i));
  }
}

template <class V>
void rotate(const float* x, std::size_t size, const float* cosines, const float* sines,
            std::size_t half, bool interleaved, float* out) {
  if (interleaved) {
    for (std::size_t i = 0; i < half; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      out[2 * i] = a * cosines[i] - b * sines[i];
      out[2 * i + 1] = a * sines[i] + b * cosines[i];
    }
  } else {
    for (std::size_t i = 0; i < half; i += kGroupRows) {
      const std::size_t lanes = half - i;
      const typename V::F a = load_lanes<V>(x + i, lanes), b = load_lanes<V>(x + half + i, lanes);
      const typename V::F c = load_lanes<V>(cosines + i, lanes),
                          s = load_lanes<V>(sines + i, lanes);
      store_lanes<V>(out + i, lanes, V::f_sub(V::f_mul(a, c), V::f_mul(b, s)));
      store_lanes<V>(out + half + i, lanes, V::f_fma(a, s, V::f_mul(b, c)));
    }
  }
  std::memcpy(out + 2 * half, x + 2 * half, (size - 2 * half) * sizeof(float));
}

template <class V>
void join_chunks(std::size_t chunks, std::size_t stride, std::size_t size, const float* values,
                 const float* maxima, const float* sums, float* out) {
  float peak = maxima[0];
  for (std::size_t c = 1; c < chunks; ++c)
    peak = maxima[c * stride] > peak ? maxima[c * stride] : peak;
  float total = 0.0F;
  std::memset(out, 0, size * sizeof(float));
  for (std::size_t c = 0; c < chunks; ++c) {
    const float share = __builtin_expf(maxima[c * stride] - peak);
    total += share * sums[c * stride];
    for (std::size_t d = 0; d < size; d += kGroupRows)
      V::f_store(out + d, V::f_fma(V::f_load(values + c * stride + d), V::f_set1(share),
                                   V::f_load(out + d)));
  }
  const typename V::F inverse = V::f_set1(1.0F / total);
  for (std::size_t d = 0; d < size; d += kGroupRows)
    V::f_store(out + d, V::f_mul(V::f_load(out + d), inverse));
}

inline void prefetch_cache(CacheType type, const void* base, std::size_t index, std::size_t size) {
  const std::size_t bytes = cache_bytes(type);
  const char* p = static_cast<const char*>(base) + index * bytes;
  for (std::size_t i = 0; i < size * bytes; i += 64) prefetch_far(p + i);
}

template <class V>
inline typename V::F cap(typename V::F score, float softcap) {  // softcap * tanh(score / softcap)
  if (softcap == 0.0F) return score;
  using F = typename V::F;
  const F e = exponential<V>(V::f_mul(score, V::f_set1(2.0F / softcap)));
  const F t = V::f_div(V::f_sub(e, V::f_set1(1.0F)), V::f_add(e, V::f_set1(1.0F)));
  return V::f_mul(t, V::f_set1(softcap));
}

// Scores of 8 positions (Full) or fewer from `keys` on for each of some heads, as V::f_sum8 leaves
// them: converting keys costs as much as multiplying them, so heads share it. Size: the head size
// where it is known, else 0. `values`: of the same positions, to ask memory for, or null.
template <class V, CacheType Type, std::size_t Size, int Heads, bool Full>
inline void score_rows(const std::uint8_t* keys, const float* q, std::size_t head_size,
                       std::size_t rows, const std::uint8_t* values, typename V::F* scores) {
  const std::size_t size = Size != 0 ? Size : head_size;
  constexpr std::size_t bytes = cache_bytes(Type);
  typename V::F acc[Heads][8];
#pragma GCC unroll 4
  for (int h = 0; h < Heads; ++h)
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) acc[h][r] = V::f_set1(0.0F);
  for (std::size_t d = 0; d < size; d += 16) {
#pragma GCC unroll 8
    for (std::size_t r = 0; r < 8; ++r) {
      if (values != nullptr && d * bytes % 64 == 0) prefetch_far(values + (r * size + d) * bytes);
      const typename V::F key =
          load_cache<V>(Type, keys, (Full ? r : smaller(r, rows - 1)) * size + d);
#pragma GCC unroll 4
      for (int h = 0; h < Heads; ++h)
        acc[h][r] = V::f_fma(V::f_load(q + h * size + d), key, acc[h][r]);
    }
  }
  for (int h = 0; h < Heads; ++h) scores[h] = V::f_sum8(acc[h]);
}

// scores [Heads, kDecodeChunk] of positions [begin, end).
template <class V, CacheType Type, std::size_t Size, int Heads>
void score_heads(const AttentionSpan& span, const float* q, std::size_t begin, std::size_t end,
                 float* scores, bool prefetch_values) {
  const std::size_t size = Size != 0 ? Size : span.head_size;
  const std::size_t row_bytes = size * cache_bytes(Type);
  for (std::size_t t = begin; t < end; t += 16) {
    const auto* keys = static_cast<const std::uint8_t*>(span.keys) + t * row_bytes;
    const std::uint8_t *values = nullptr, *later_values = nullptr;
    if (prefetch_values) {
      values = static_cast<const std::uint8_t*>(span.values) + t * row_bytes;
      later_values = values + 8 * row_bytes;
    }
    typename V::F low[Heads], high[Heads];
    if (end - t >= 16) {
      score_rows<V, Type, Size, Heads, true>(keys, q, size, 8, values, low);
      score_rows<V, Type, Size, Heads, true>(keys + 8 * row_bytes, q, size, 8, later_values, high);
    } else {
      const std::size_t rows = end - t, first = smaller(rows, 8);
      score_rows<V, Type, Size, Heads, false>(keys, q, size, first, values, low);
      // With no row left, the last one again: what it scores is dropped.
      const std::size_t at = rows > 8 ? 8 : rows - 1;
      score_rows<V, Type, Size, Heads, false>(keys + at * row_bytes, q, size, rows - at, nullptr,
                                              high);
    }
    for (int h = 0; h < Heads; ++h) {
      const typename V::F score = V::f_mul(V::f_join8(low[h], high[h]), V::f_set1(span.scale));
      V::f_store(scores + h * kDecodeChunk + (t - begin), cap<V>(score, span.softcap));
    }
  }
}

template <class V, CacheType Type, std::size_t Size>
void score_chunk(const AttentionSpan& span, const float* q, std::size_t begin, std::size_t end,
                 float* scores) {
  std::size_t h = 0;
  auto at = [&](std::size_t head) { return q + head * span.head_size; };
  for (; h + 4 < span.heads || h + 3 == span.heads; h += 3)
    score_heads<V, Type, Size, 3>(span, at(h), begin, end, scores + h * kDecodeChunk, h == 0);
  for (; h + 2 <= span.heads; h += 2)
    score_heads<V, Type, Size, 2>(span, at(h), begin, end, scores + h * kDecodeChunk, h == 0);
  for (; h < span.heads; ++h)
    score_heads<V, Type, Size, 1>(span, at(h), begin, end, scores + h * kDecodeChunk, h == 0);
}

template <class V, CacheType Type>
void score_chunk(const AttentionSpan& span, const float* q, std::size_t begin, std::size_t end,
                 float* scores) {
  switch (span.head_size) {
    case 64: return score_chunk<V, Type, 64>(span, q, begin, end, scores);
    case 128: return score_chunk<V, Type, 128>(span, q, begin, end, scores);
    default: return score_chunk<V, Type, 0>(span, q, begin, end, scores);
  }
}

// Turns scores [size] into exponentials under their maximum.
template <class V>
void soften(float* scores, std::size_t size, float* maximum, float* total) {
  using F = typename V::F;
  const std::size_t padded = round_up(size, 16);
  for (std::size_t i = size; i < padded; ++i) scores[i] = -__builtin_inff();
  F peak = V::f_set1(-__builtin_inff());
  for (std::size_t i = 0; i < padded; i += 16) peak = V::f_max(peak, V::f_load(scores + i));
  *maximum = V::f_hmax(peak);
  F sum = V::f_set1(0.0F);
  for (std::size_t i = 0; i < padded; i += 16) {
    const F e = exponential<V>(V::f_sub(V::f_load(scores + i), V::f_set1(*maximum)));
    V::f_store(scores + i, e);
    sum = V::f_add(sum, e);
  }
  for (std::size_t i = size; i < padded; ++i) scores[i] = 0.0F;
  *total = V::f_hsum(sum);
}

// out [Heads, head_size], dimensions [d, d + 16 * Parts): the weighted sums of the values of
// positions [begin, end).
template <class V, CacheType Type, int Heads, int Parts>
void mix_part(const AttentionSpan& span, const float* weights, std::size_t begin, std::size_t end,
              std::size_t d, float* out) {
  const std::size_t size = span.head_size;
  typename V::F acc[Heads][Parts];
  for (int h = 0; h < Heads; ++h)
    for (int p = 0; p < Parts; ++p) acc[h][p] = V::f_set1(0.0F);
  for (std::size_t t = begin; t < end; ++t) {
    if (span.next != nullptr) prefetch_cache(Type, span.next, (t - begin) * size + d, 16 * Parts);
#pragma GCC unroll 4
    for (std::size_t p = 0; p < Parts; ++p) {
      const typename V::F value = load_cache<V>(Type, span.values, t * size + d + 16 * p);
#pragma GCC unroll 4
      for (int h = 0; h < Heads; ++h)
        acc[h][p] = V::f_fma(value, V::f_set1(weights[h * kDecodeChunk + (t - begin)]), acc[h][p]);
    }
  }
  for (int h = 0; h < Heads; ++h)
    for (int p = 0; p < Parts; ++p) V::f_store(out + h * size + d + 16 * p, acc[h][p]);
}

template <class V, CacheType Type, int Heads>
void mix_values(const AttentionSpan& span, const float* weights, std::size_t begin, std::size_t end,
                float* out) {
  std::size_t d = 0;
  for (; d + 64 <= span.head_size; d += 64)
    mix_part<V, Type, Heads, 4>(span, weights, begin, end, d, out);
  for (; d < span.head_size; d += 16)
    mix_part<V, Type, Heads, 1>(span, weights, begin, end, d, out);
}

template <class V, CacheType Type>
void attend_chunk(const AttentionSpan& span, const float* q, std::size_t begin, std::size_t end,
                  float* scores, float* out, float* maxima, float* sums) {
  score_chunk<V, Type>(span, q, begin, end, scores);
  for (std::size_t h = 0; h < span.heads; ++h)
    soften<V>(scores + h * kDecodeChunk, end - begin, maxima + h, sums + h);
  AttentionSpan asking = span;  // the first pass asks for all that comes next
  std::size_t h = 0;
  auto mix = [&](auto values, std::size_t heads) {
    for (; h + heads <= span.heads; h += heads, asking.next = nullptr)
      values(asking, scores + h * kDecodeChunk, begin, end, out + h * span.head_size);
  };
  mix(mix_values<V, Type, 4>, 4);
  mix(mix_values<V, Type, 3>, 3);
  mix(mix_values<V, Type, 1>, 1);
}

template <class V>
void attend_one(const AttentionSpan& span, const float* q, std::size_t begin, std::size_t end,
                float* scratch, float* out, float* maxima, float* sums) {
  span.cache == CacheType::kFp32
      ? attend_chunk<V, CacheType::kFp32>(span, q, begin, end, scratch, out, maxima, sums)
      : attend_chunk<V, CacheType::kFp16>(span, q, begin, end, scratch, out, maxima, sums);
}

// One tile of keys, transposed: panels [ceil(kKeyBlock / width)][head_size][width].
template <class V>
void transpose_keys(const AttentionSpan& span, std::size_t begin, std::size_t end, float* panels) {
  constexpr std::size_t width = V::kPanelGroups * kGroupRows;
  const std::size_t size = span.head_size;
  for (std::size_t t = 0; t < kKeyBlock; t += 16) {
    float* panel = panels + t / width * size * width + t % width;
    for (std::size_t d = 0; d < size; d += 16) {
      typename V::F rows[16];
      for (std::size_t r = 0; r < 16; ++r)
        rows[r] = begin + t + r < end
                      ? load_cache<V>(span.cache, span.keys, (begin + t + r) * size + d)
                      : V::f_set1(0.0F);
      V::transpose16(rows);
      for (std::size_t r = 0; r < 16; ++r) V::f_store(panel + (d + r) * width, rows[r]);
    }
  }
}

// One tile of values: panels [ceil(head_size / width)][kKeyBlock][width], zero where there is
// nothing.
template <class V>
void copy_values(const AttentionSpan& span, std::size_t begin, std::size_t end, float* panels) {
  constexpr std::size_t width = V::kPanelGroups * kGroupRows;
  const std::size_t size = span.head_size;
  for (std::size_t d = 0; d < round_up(size, width); d += 16) {
    float* panel = panels + d / width * kKeyBlock * width + d % width;
    for (std::size_t t = 0; t < kKeyBlock; ++t) {
      const bool inside = d < size && begin + t < end;
      V::f_store(panel + t * width,
                 inside ? load_cache<V>(span.cache, span.values, (begin + t) * size + d)
                        : V::f_set1(0.0F));
    }
  }
}

// Masks scores [rows, kKeyBlock], takes exponentials under the running maximum and rescales what
// was summed before.
template <class V>
void soften_tile(const AttentionSpan& span, std::size_t rows, std::size_t count, std::size_t tile,
                 std::size_t position, std::size_t window, float* scores, float* maxima,
                 float* totals, float* out, std::size_t out_stride) {
  using F = typename V::F;
  for (std::size_t m = 0; m < rows; ++m) {
    float* s = scores + m * kKeyBlock;
    const std::size_t own = position + m % count;  // rows are [heads][count]
    const std::size_t oldest = window != 0 && own + 1 > window ? own + 1 - window : 0;
    F peak = V::f_set1(maxima[m]);
    for (std::size_t i = 0; i < kKeyBlock; i += 16)
      V::f_store(s + i, cap<V>(V::f_mul(V::f_load(s + i), V::f_set1(span.scale)), span.softcap));
    for (std::size_t i = 0; i < kKeyBlock; ++i)
      if (tile + i > own || tile + i < oldest) s[i] = -__builtin_inff();
    for (std::size_t i = 0; i < kKeyBlock; i += 16) peak = V::f_max(peak, V::f_load(s + i));
    const float maximum = V::f_hmax(peak);
    if (maximum == -__builtin_inff()) {  // nothing of this tile is visible, and nothing was before
      std::memset(s, 0, kKeyBlock * sizeof(float));
      continue;
    }
    F sum = V::f_set1(0.0F);
    for (std::size_t i = 0; i < kKeyBlock; i += 16) {
      const F x = V::f_load(s + i);
      const F e = exponential<V>(
          V::f_sub(x, V::f_set1(maximum)));  // 1e-38 where masked: below any rounding
      V::f_store(s + i, e);
      sum = V::f_add(sum, e);
    }
    const float fade = maxima[m] == -__builtin_inff() ? 0.0F : __builtin_expf(maxima[m] - maximum);
    totals[m] = totals[m] * fade + V::f_hsum(sum);
    maxima[m] = maximum;
    if (fade != 1.0F)
      for (std::size_t d = 0; d < out_stride; d += 16)
        V::f_store(out + m * out_stride + d,
                   V::f_mul(V::f_load(out + m * out_stride + d), V::f_set1(fade)));
  }
}

template <class V>
void attend_many(const AttentionSpan& span, const float* q, std::size_t q_stride, std::size_t count,
                 std::size_t position, std::size_t window, std::uint8_t* scratch, float* out,
                 std::size_t out_stride) {
  constexpr std::size_t width = V::kPanelGroups * kGroupRows;
  const std::size_t size = span.head_size;
  const std::size_t sums_stride = round_up(size, width);
  const std::size_t rows = span.heads * count;
  auto* queries = reinterpret_cast<float*>(scratch);                 // [heads * count, head_size]
  float* mixed = queries + kQueryBlock * span.heads * kMaxHeadSize;  // [heads * count, sums_stride]
  float* scores = mixed + kQueryBlock * span.heads * kMaxHeadSize;   // [heads * count, kKeyBlock]
  float* panels = scores + kQueryBlock * span.heads * kKeyBlock;     // keys, later values
  float* maxima = panels + 2 * kKeyBlock * kMaxHeadSize;
  float* totals = maxima + kQueryBlock * span.heads;
  for (std::size_t h = 0; h < span.heads; ++h)
    for (std::size_t s = 0; s < count; ++s)
      std::memcpy(queries + (h * count + s) * size, q + s * q_stride + h * size,
                  size * sizeof(float));
  std::memset(mixed, 0, rows * sums_stride * sizeof(float));
  for (std::size_t m = 0; m < rows; ++m) {
    maxima[m] = -__builtin_inff();
    totals[m] = 0.0F;
  }
  const std::size_t end = position + count;
  const std::size_t start =
      window != 0 && position + 1 > window ? (position + 1 - window) / kKeyBlock * kKeyBlock : 0;
  for (std::size_t tile = start; tile < end; tile += kKeyBlock) {
    transpose_keys<V>(span, tile, end, panels);
    std::memset(scores, 0, rows * kKeyBlock * sizeof(float));
    for (std::size_t p = 0; p < kKeyBlock / width; ++p)
      multiply_fp32_rows<V>(panels + p * size * width, size, queries, size, rows,
                            scores + p * width, kKeyBlock);
    soften_tile<V>(span, rows, count, tile, position, window, scores, maxima, totals, mixed,
                   sums_stride);
    copy_values<V>(span, tile, end, panels);
    for (std::size_t p = 0; p < sums_stride / width; ++p)
      multiply_fp32_rows<V>(panels + p * kKeyBlock * width, kKeyBlock, scores, kKeyBlock, rows,
                            mixed + p * width, sums_stride);
  }
  for (std::size_t h = 0; h < span.heads; ++h)
    for (std::size_t s = 0; s < count; ++s) {
      const std::size_t m = h * count + s;
      const typename V::F inverse = V::f_set1(1.0F / totals[m]);
      for (std::size_t d = 0; d < size; d += 16)
        V::f_store(out + s * out_stride + h * size + d,
                   V::f_mul(V::f_load(mixed + m * sums_stride + d), inverse));
    }
}

template <class V>
constexpr Kernels make_kernels(const char* name) {
  return Kernels{name,      V::kPanelGroups, activation_layout<V>, prepare_row<V>,
                 matvec<V>, refine<V>,       largest<V>,           panel<V>,
                 finish<V>, rms_norm<V>,     attend_one<V>,        attend_many<V>,
                 rotate<V>, join_chunks<V>,  store_cache<V>};
}

}  // namespace
}  // namespace owl
