// Attention over a cache of keys and values: of one query position, whose tasks are chunks of the
// past, and of many, tile by tile.
#pragma once

#include "kernel_elementwise.h"
#include "kernel_linear.h"

namespace owl {
namespace {

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
template <class V, CacheType Type, std::size_t Heads, std::size_t Parts>
void mix_part(const AttentionSpan& span, const float* weights, std::size_t begin, std::size_t end,
              std::size_t d, float* out) {
  const std::size_t size = span.head_size;
  typename V::F acc[Heads][Parts];
  for (std::size_t h = 0; h < Heads; ++h)
    for (std::size_t p = 0; p < Parts; ++p) acc[h][p] = V::f_set1(0.0F);
  for (std::size_t t = begin; t < end; ++t) {
    if (span.next != nullptr) prefetch_cache(Type, span.next, (t - begin) * size + d, 16 * Parts);
#pragma GCC unroll 4
    for (std::size_t p = 0; p < Parts; ++p) {
      const typename V::F value = load_cache<V>(Type, span.values, t * size + d + 16 * p);
#pragma GCC unroll 4
      for (std::size_t h = 0; h < Heads; ++h)
        acc[h][p] = V::f_fma(value, V::f_set1(weights[h * kDecodeChunk + (t - begin)]), acc[h][p]);
    }
  }
  for (std::size_t h = 0; h < Heads; ++h)
    for (std::size_t p = 0; p < Parts; ++p) V::f_store(out + h * size + d + 16 * p, acc[h][p]);
}

template <class V, CacheType Type, std::size_t Heads>
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
    values(asking, scores + h * kDecodeChunk, begin, end, out + h * span.head_size);
    h += heads;
    asking.next = nullptr;
  };
  // Values are converted once for each of these: as few as can be, and of one head only the last.
  while (span.heads - h == 4 || span.heads - h > 6) mix(mix_values<V, Type, 4>, 4);
  while (span.heads - h >= 3) mix(mix_values<V, Type, 3>, 3);
  if (span.heads - h == 2) mix(mix_values<V, Type, 2>, 2);
  if (span.heads - h == 1) mix(mix_values<V, Type, 1>, 1);
}

template <class V>
void attend_one(const AttentionSpan& span, const float* q, std::size_t begin, std::size_t end,
                float* scratch, float* out, float* maxima, float* sums) {
  span.cache == CacheType::kFp32
      ? attend_chunk<V, CacheType::kFp32>(span, q, begin, end, scratch, out, maxima, sums)
      : attend_chunk<V, CacheType::kFp16>(span, q, begin, end, scratch, out, maxima, sums);
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
    if (tile + kKeyBlock > own + 1 || tile < oldest)
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

// How attend_many multiplies queries by a tile of keys, and weights by one of values: in fp32.
template <class V>
class Fp32Tiles {
 public:
  // Floats of a query of `size`.
  static std::size_t query_floats(std::size_t size) { return size; }

  static void take_query(const float* q, std::size_t size, float* row) {
    std::memcpy(row, q, size * sizeof(float));
  }

  // Puts the scores of positions [begin, end) into `scores` [rows, kKeyBlock]. panels: room for
  // kKeyBlock * kMaxHeadSize floats.
  static void score(const AttentionSpan& span, std::size_t begin, std::size_t end,
                    const float* queries, std::size_t rows, float* panels, float* scores) {
    transpose_keys(span, begin, end, panels);
    std::memset(scores, 0, rows * kKeyBlock * sizeof(float));
    for (std::size_t p = 0; p < kKeyBlock / kWidth; ++p)
      multiply_fp32_rows<V>(panels + p * span.head_size * kWidth, span.head_size, queries,
                            span.head_size, rows, scores + p * kWidth, kKeyBlock);
  }

  // Adds the values of these positions by `weights` [rows, kKeyBlock] to `sums` [rows, stride];
  // weights are of no use afterwards.
  static void mix(const AttentionSpan& span, std::size_t begin, std::size_t end, float* weights,
                  std::size_t rows, float* panels, float* sums, std::size_t stride) {
    copy_values(span, begin, end, panels);
    for (std::size_t p = 0; p < stride / kWidth; ++p)
      multiply_fp32_rows<V>(panels + p * kKeyBlock * kWidth, kKeyBlock, weights, kKeyBlock, rows,
                            sums + p * kWidth, stride);
  }

 private:
  static constexpr std::size_t kWidth = V::kPanelGroups * kGroupRows;

  // Transposed: panels [ceil(kKeyBlock / width)][head_size][width].
  static void transpose_keys(const AttentionSpan& span, std::size_t begin, std::size_t end,
                             float* panels) {
    const std::size_t size = span.head_size;
    for (std::size_t t = 0; t < kKeyBlock; t += 16) {
      float* panel = panels + t / kWidth * size * kWidth + t % kWidth;
      for (std::size_t d = 0; d < size; d += 16) {
        typename V::F rows[16];
        for (std::size_t r = 0; r < 16; ++r)
          rows[r] = begin + t + r < end
                        ? load_cache<V>(span.cache, span.keys, (begin + t + r) * size + d)
                        : V::f_set1(0.0F);
        V::transpose16(rows);
        for (std::size_t r = 0; r < 16; ++r) V::f_store(panel + (d + r) * kWidth, rows[r]);
      }
    }
  }

  // Panels [ceil(head_size / width)][kKeyBlock][width], zero where there is nothing.
  static void copy_values(const AttentionSpan& span, std::size_t begin, std::size_t end,
                          float* panels) {
    const std::size_t size = span.head_size;
    for (std::size_t d = 0; d < round_up(size, kWidth); d += 16) {
      float* panel = panels + d / kWidth * kKeyBlock * kWidth + d % kWidth;
      for (std::size_t t = 0; t < kKeyBlock; ++t) {
        const bool inside = d < size && begin + t < end;
        V::f_store(panel + t * kWidth,
                   inside ? load_cache<V>(span.cache, span.values, (begin + t) * size + d)
                          : V::f_set1(0.0F));
      }
    }
  }
};

template <class V, class Products = Fp32Tiles<V>>
void attend_many(const AttentionSpan& span, const float* q, std::size_t q_stride, std::size_t count,
                 std::size_t position, std::size_t window, std::uint8_t* scratch, float* out,
                 std::size_t out_stride) {
  constexpr std::size_t width = V::kPanelGroups * kGroupRows;
  const Products products{};
  const std::size_t size = span.head_size, query = Products::query_floats(size);
  const std::size_t sums_stride = round_up(size, width);
  const std::size_t rows = span.heads * count, room = in_row_tiles(rows);
  const std::size_t most = span.heads * query_block(span.heads);
  auto* queries = reinterpret_cast<float*>(scratch);  // [heads * count, query]
  float* mixed = queries + most * kMaxHeadSize;       // [heads * count, sums_stride]
  float* scores = mixed + most * kMaxHeadSize;        // [heads * count, kKeyBlock]
  float* panels = scores + most * kKeyBlock;          // keys, later values
  float* maxima = panels + 2 * kKeyBlock * kMaxHeadSize;
  float* totals = maxima + most;
  for (std::size_t h = 0; h < span.heads; ++h)
    for (std::size_t s = 0; s < count; ++s)
      Products::take_query(q + s * q_stride + h * size, size, queries + (h * count + s) * query);
  std::memset(queries + rows * query, 0, (room - rows) * query * sizeof(float));
  std::memset(mixed, 0, room * sums_stride * sizeof(float));
  for (std::size_t m = 0; m < rows; ++m) {
    maxima[m] = -__builtin_inff();
    totals[m] = 0.0F;
  }
  const std::size_t end = position + count;
  const std::size_t start =
      window != 0 && position + 1 > window ? (position + 1 - window) / kKeyBlock * kKeyBlock : 0;
  for (std::size_t tile = start; tile < end; tile += kKeyBlock) {
    products.score(span, tile, end, queries, rows, panels, scores);
    soften_tile<V>(span, rows, count, tile, position, window, scores, maxima, totals, mixed,
                   sums_stride);
    products.mix(span, tile, end, scores, rows, panels, mixed, sums_stride);
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

}  // namespace
}  // namespace owl
