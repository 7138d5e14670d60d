// The table of functions that every instruction set provides, and the plain data they work on.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format.h"

namespace owl {

// So many rows are multiplied one by one with cells expanded once, and so many new positions of a
// sequence attended to one by one: the bits are those of a row, or position, by itself. One number
// for all, so that this can be said. Measured with owl_time_matmul on Sapphire Rapids, weights in
// the cache: the way of many rows becomes the faster one at 8 to 16 rows for fp32, 16 to 32 for
// bf16, 32 to 64 for int8 and int4, with AVX-512 as with AVX2; for planes at none up to 64.
constexpr std::size_t kFewRows = 16;
// Up to so many rows meet integers in passes of a few, see `few_in_passes`, unless a table has a
// faster way. Measured on Zen 4 (docs/benchmarks.md): that takes 0.7 to 1.0 of the other way's
// time, but with AVX2 1.0 to 1.1 for sparse int4.
constexpr std::size_t kPassRows = 48;

enum class Epilogue { kNone = 0, kSiluMul = 1, kGeluMul = 2 };

// How a row of activations is laid out for one weight: values first, then (int8) one fp32 scale and
// one int32 correction per block of 32 columns, an even number of blocks. `stride` is the bytes of
// one row, a multiple of 64.
struct ActivationLayout {
  std::size_t blocks = 0;
  std::size_t scale_offset = 0;
  std::size_t correction_offset = 0;
  std::size_t stride = 0;
};

// What happens to finished sums. With a gated epilogue row groups alternate gate, up, gate, up, ...
struct Output {
  Epilogue epilogue = Epilogue::kNone;
  const float* bias = nullptr;  // [cols] or null
  float* data = nullptr;        // [rows, cols]
  std::size_t cols = 0;
};

enum class CacheType { kFp32, kFp16 };

OWL_INLINE constexpr std::size_t cache_bytes(CacheType type) {
  return type == CacheType::kFp32 ? 4 : 2;
}

// One (batch, kv head) of the cache and the queries that read it.
struct AttentionSpan {
  CacheType cache = CacheType::kFp32;
  const void* keys = nullptr;    // [positions, head_size]
  const void* values = nullptr;  // [positions, head_size]
  std::size_t head_size = 0;     // a multiple of 16, at most 256
  std::size_t heads = 0;         // query heads that share this kv head
  float scale = 1.0F;
  float softcap = 0.0F;        // 0: none
  const void* next = nullptr;  // the next call's keys, which attend_one asks memory for while it
                               // mixes values; or null
};

struct Kernels {
  const char* name;
  std::size_t tile_groups;   // row groups that are unpacked at once, for all rows of a `panel`
  std::size_t panel_groups;  // those that it computes at once, a multiple of these
  std::size_t panel_rows;    // activation rows that are best given to it at once
  std::size_t pass_rows;     // up to so many rows meet integers in passes of a few
  bool prefers_dense_int4;   // where memory keeps up, a sparse weight of 4 or 3 bits takes longer

  // `many`: of rows for `panel`, else for the others.
  ActivationLayout (*layout)(const PackedMatrix& w, bool many);
  // x [cols] -> one activation row.
  void (*prepare)(const PackedMatrix& w, const ActivationLayout& layout, const float* x,
                  std::uint8_t* row);
  // One row times groups [begin, end): sums [(end - begin) * 16].
  // Of a weight in planes only the upper bits count.
  void (*matvec)(const PackedMatrix& w, std::size_t begin, std::size_t end,
                 const ActivationLayout& layout, const std::uint8_t* row, float* sums);
  // `count` rows, at most kFewRows, times groups [begin, end): sums [count, stride], in each row
  // what `matvec` makes of it, to the last bit. Rows have room for a multiple of kRowTile, whatever
  // is in those past `count`.
  void (*few)(const PackedMatrix& w, std::size_t begin, std::size_t end,
              const ActivationLayout& layout, const std::uint8_t* rows, std::size_t count,
              float* sums, std::size_t stride);
  // Adds what the lower bits of a weight in planes contribute to those of y [outputs] in groups
  // [begin, end), at most kScreenGroups of them, that are `least` or more.
  void (*refine)(const PackedMatrix& w, std::size_t begin, std::size_t end,
                 const ActivationLayout& layout, const std::uint8_t* row, float least, float* y,
                 std::size_t outputs);
  // The largest of x [size], size > 0; anything if there are NaN.
  float (*largest)(const float* x, std::size_t size);
  // `count` rows times groups [begin, begin + groups), groups <= panel_groups: sums [count,
  // stride], of which it writes those of whole tile_groups; scratch: kPanelScratch bytes, 64-byte
  // aligned. Rows and sums have room for a multiple of kRowTile, whatever is in those past `count`.
  void (*panel)(const PackedMatrix& w, std::size_t begin, std::size_t groups,
                const ActivationLayout& layout, const std::uint8_t* rows, std::size_t count,
                std::uint8_t* scratch, float* sums, std::size_t stride);
  // Bias, epilogue: sums [count, sums_stride] of groups [begin, end) -> output rows from `first`.
  void (*finish)(std::size_t begin, std::size_t end, const float* sums, std::size_t sums_stride,
                 std::size_t first, std::size_t count, const Output& output);
  // sum = x + skip (skip may be null), y = sum * gamma / rms(sum); sum may be null.
  void (*rms_norm)(const float* x, const float* skip, const float* gamma, std::size_t size,
                   float epsilon, float* sum, float* y);
  // One query position: q [heads, head_size] against positions [begin, end).
  // Leaves unnormalised out [heads, head_size], and each head's maximum and sum of exponentials.
  void (*attend_one)(const AttentionSpan& span, const float* q, std::size_t begin, std::size_t end,
                     float* scratch, float* out, float* maxima, float* sums);
  // `count` query positions of all heads, q [count, q_stride] with the heads side by side, the
  // first at position `position`; the one at p sees positions (p - window, p], or all up to p
  // without a window. out [count, out_stride].
  void (*attend_many)(const AttentionSpan& span, const float* q, std::size_t q_stride,
                      std::size_t count, std::size_t position, std::size_t window,
                      std::uint8_t* scratch, float* out, std::size_t out_stride);
  // Rotary embedding of one head: the first 2 * half of x [size] turn, in pairs (i, i + half) or
  // neighbours, the rest is copied. cosines, sines [half].
  void (*rotate)(const float* x, std::size_t size, const float* cosines, const float* sines,
                 std::size_t half, bool interleaved, float* out);
  // Joins one head's results of attend_one over chunks, which lie `stride` floats apart: values
  // [size], maximum, sum.
  void (*join_chunks)(std::size_t chunks, std::size_t stride, std::size_t size, const float* values,
                      const float* maxima, const float* sums, float* out);
  void (*store_cache)(CacheType type, const float* x, std::size_t size, void* cache);
};

// `count` rows times groups [begin, end), sums as of `few`: in even passes of at most kFewRows,
// with so few groups that they are still in the cache for the next pass.
OWL_INLINE void few_in_passes(const Kernels& kernels, const PackedMatrix& w, std::size_t begin,
                              std::size_t end, const ActivationLayout& layout,
                              const std::uint8_t* rows, std::size_t count, float* sums,
                              std::size_t stride) {
  const std::size_t passes = divide_up(count, kFewRows), most = divide_up(count, passes);
  for (std::size_t m = 0; m < count; m += most)
    kernels.few(w, begin, end, layout, rows + m * layout.stride,
                count - m < most ? count - m : most, sums + m * stride, stride);
}

constexpr std::size_t kPanelBlockCells =
    64;  // cells unpacked at a time: the tile stays in the first-level cache
constexpr std::size_t kMaxTileGroups = 4;  // the largest tile_groups
// In tiles of bf16 twice as much, for then it pays to come back to the sums less often.
constexpr std::size_t kPanelScratch = 2 * kPanelBlockCells * kMaxTileGroups * kCellBytes;
constexpr std::size_t kRowChunk = 128;  // activation rows of one `panel`, unless more are better
constexpr std::size_t kRowTile = 16;    // rows that a matrix instruction takes at once
// The rows that `panel` needs room for.
OWL_INLINE constexpr std::size_t in_row_tiles(std::size_t rows) {
  return divide_up(rows, kRowTile) * kRowTile;
}
constexpr std::size_t kScreenGroups =
    32;  // row groups that are looked through for candidates at a time
constexpr std::size_t kDecodeChunk = 128;  // cache positions of one decode task
constexpr std::size_t kKeyBlock = 64;      // cache positions of one prefill tile
constexpr std::size_t kMaxHeadSize = 256;
constexpr std::size_t kMaxSharedHeads = 64;              // query heads for one kv head
constexpr std::size_t kMaxHeads = std::size_t{1} << 20;  // so that no width overflows

// Query positions of one prefill task, a multiple of kRowTile: more where few heads share the keys
// and values that it makes ready for all of its rows.
OWL_INLINE constexpr std::size_t query_block(std::size_t heads) {
  return heads <= 2 ? 64 : heads <= 4 ? 32 : 16;
}

// Floats of scratch that attend_one and attend_many need.
constexpr std::size_t attend_one_scratch(std::size_t heads) { return heads * kDecodeChunk; }
constexpr std::size_t attend_many_scratch(std::size_t heads) {
  return query_block(heads) * heads * (2 * kMaxHeadSize + kKeyBlock + 2) +
         2 * kKeyBlock * kMaxHeadSize + 64;
}

// One table a file; only those that the build's target architecture has are linked in.
extern const Kernels kAmxKernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512VnniKernels;
extern const Kernels kAvx512fKernels;
extern const Kernels kAvxVnniKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kNeonKernels;
extern const Kernels kPortableKernels;

// The fastest table that this processor runs, or the one that OWL_ISA names; a name that cannot be
// had is an error, as a benchmark would measure other kernels than it says.
const Kernels& best_kernels();
// In capitals or not; nullptr when there is no such table or this processor cannot run it.
const Kernels* find_kernels(const char* name);
// The same, or std::invalid_argument, which says that `asker` is this name, and which names there
// are.
const Kernels& kernels_named(const char* name, const char* asker);
// The name of the i-th table built in, best first; nullptr after the last.
const char* kernel_name(std::size_t i);

}  // namespace owl
