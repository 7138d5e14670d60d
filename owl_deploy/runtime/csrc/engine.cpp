#include "engine.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace owl {
namespace {

// Denormal operands cost some processors a hundred cycles; inside a task they count as zero.
class DenormalsAreZero {
 public:
#if defined(__x86_64__)
  DenormalsAreZero() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~DenormalsAreZero() { _mm_setcsr(saved_); }
  DenormalsAreZero(const DenormalsAreZero&) = delete;
  DenormalsAreZero& operator=(const DenormalsAreZero&) = delete;

 private:
  unsigned saved_;
#else
  DenormalsAreZero() {}
  ~DenormalsAreZero() {}
#endif
};

// A thread's memory for one purpose: grows, is kept, and is aligned to 64 bytes.
class Scratch {
 public:
  template <class T>
  T* get(std::size_t count) {
    const std::size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      memory_.reset(static_cast<std::uint8_t*>(std::aligned_alloc(64, bytes)));
      if (!memory_) throw std::bad_alloc();
      size_ = bytes;
    }
    return reinterpret_cast<T*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(std::uint8_t* p) const { std::free(p); }
  };
  std::unique_ptr<std::uint8_t, Free> memory_;
  std::size_t size_ = 0;
};

thread_local Scratch caller_rows;   // activations, shared with the tasks
thread_local Scratch caller_extra;
thread_local Scratch task_sums;
thread_local Scratch task_tile;

template <class Task>
void parallel(const Pool& pool, std::size_t count, Task& task) {
  auto call = [](void* argument, std::size_t i) {
    DenormalsAreZero guard;
    (*static_cast<Task*>(argument))(i);
  };
  if (count == 1) return call(&task, 0);
  pool.run(pool.context, count, call, &task);
}

std::size_t divide_up(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

constexpr std::size_t kTaskBytes = 24 * 1024;  // weights that one task of a matrix-vector product reads, at least
constexpr std::size_t kMaxTasks = 256;
constexpr std::size_t kRowChunk = 128;         // activation rows of one task of a matrix-matrix product

std::size_t group_bytes(const PackedMatrix& w) {
  if (!w.sparse) return w.cells * kCellBytes;
  const std::size_t values = static_cast<std::size_t>(w.index[w.groups]) * kCellBytes;
  return values / w.groups + w.cells * w.mask_bytes_per_cell();
}

void normalise(const Kernels& kernels, const Linear& op, const float* x, std::size_t row, float* sum, float* y) {
  const std::size_t cols = op.weight.cols;
  kernels.rms_norm(x + row * cols, op.skip == nullptr ? nullptr : op.skip + row * cols, op.gamma, cols, op.epsilon,
                   sum == nullptr ? nullptr : sum + row * cols, y);
}

Output output_of(const Linear& op, float* y) {
  Output output;
  output.epilogue = op.epilogue;
  output.bias = op.bias;
  output.data = y;
  output.cols = op.outputs;
  return output;
}

void run_one_row(const Kernels& kernels, const Pool& pool, const Linear& op, const float* x, float* y, float* sum) {
  const PackedMatrix& w = op.weight;
  const ActivationLayout layout = kernels.layout(w);
  auto* row = caller_rows.get<std::uint8_t>(layout.stride);
  {
    DenormalsAreZero guard;
    if (op.gamma != nullptr) {
      auto* normed = caller_extra.get<float>(w.cols);
      normalise(kernels, op, x, 0, sum, normed);
      x = normed;
    }
    kernels.prepare(w, layout, x, row);
  }
  const Output output = output_of(op, y);
  // Even, so that gate and up stay together.
  const std::size_t at_least = divide_up(kTaskBytes, std::max<std::size_t>(1, group_bytes(w)));
  const std::size_t groups = divide_up(std::max(at_least, divide_up(w.groups, kMaxTasks)), 2) * 2;
  auto task = [&](std::size_t i) {
    const std::size_t begin = i * groups, end = std::min(w.groups, begin + groups);
    auto* sums = task_sums.get<float>(groups * kGroupRows);
    kernels.matvec(w, begin, end, layout, row, sums);
    kernels.finish(begin, end, sums, 0, 0, 1, output);
  };
  parallel(pool, divide_up(w.groups, groups), task);
}

void run_many_rows(const Kernels& kernels, const Pool& pool, const Linear& op, const float* x, std::size_t rows,
                   float* y, float* sum) {
  const PackedMatrix& w = op.weight;
  const ActivationLayout layout = kernels.layout(w);
  auto* prepared = caller_rows.get<std::uint8_t>(layout.stride * rows);
  constexpr std::size_t kPrepareRows = 4;
  auto prepare = [&](std::size_t i) {
    auto* normed = task_sums.get<float>(w.cols);
    for (std::size_t r = i * kPrepareRows; r < std::min(rows, (i + 1) * kPrepareRows); ++r) {
      if (op.gamma != nullptr) normalise(kernels, op, x, r, sum, normed);
      kernels.prepare(w, layout, op.gamma != nullptr ? normed : x + r * w.cols, prepared + r * layout.stride);
    }
  };
  parallel(pool, divide_up(rows, kPrepareRows), prepare);

  const Output output = output_of(op, y);
  const std::size_t width = kernels.panel_groups * kGroupRows;
  // A gated epilogue needs both halves of a pair of groups.
  const std::size_t per_panel = op.epilogue == Epilogue::kNone ? kernels.panel_groups : divide_up(kernels.panel_groups, 2) * 2;
  const std::size_t panels = divide_up(w.groups, per_panel);
  const std::size_t chunk = std::min(rows, kRowChunk);
  auto multiply = [&](std::size_t i) {
    const std::size_t first = i / panels * chunk, count = std::min(chunk, rows - first);
    const std::size_t begin = i % panels * per_panel, end = std::min(w.groups, begin + per_panel);
    const std::size_t parts = divide_up(end - begin, kernels.panel_groups);
    auto* tile = task_tile.get<std::uint8_t>(kPanelScratch);
    auto* sums = task_sums.get<float>(count * width * (parts + 1));
    for (std::size_t p = 0; p < parts; ++p) {
      const std::size_t from = begin + p * kernels.panel_groups;
      kernels.panel(w, from, std::min(end - from, kernels.panel_groups), layout, prepared + first * layout.stride,
                    count, tile, sums + p * count * width);
    }
    if (parts == 1) return kernels.finish(begin, end, sums, width, first, count, output);
    // Narrow panels: put the halves of each row side by side.
    float* joined = sums + parts * count * width;
    for (std::size_t m = 0; m < count; ++m) {
      for (std::size_t p = 0; p < parts; ++p)
        std::memcpy(joined + p * width, sums + (p * count + m) * width, width * sizeof(float));
      kernels.finish(begin, end, joined, parts * width, first + m, 1, output);
    }
  };
  parallel(pool, panels * divide_up(rows, chunk), multiply);
}

// ---- Attention -------------------------------------------------------------------------------------------

void rotate(const Attention& op, std::size_t position, const float* x, float* out) {
  const std::size_t half = op.rotary_size / 2;
  const float* c = op.cosines + position * half;
  const float* s = op.sines + position * half;
  for (std::size_t i = 0; i < half; ++i) {
    const std::size_t a = op.interleaved ? 2 * i : i;
    const std::size_t b = op.interleaved ? 2 * i + 1 : i + half;
    const float first = x[a], second = x[b];
    out[a] = first * c[i] - second * s[i];
    out[b] = first * s[i] + second * c[i];
  }
  for (std::size_t i = op.rotary_size; i < op.head_size; ++i) out[i] = x[i];
}

std::size_t cache_bytes(CacheType type) { return type == CacheType::kFp32 ? 4 : 2; }

void* cache_at(const Attention& op, void* cache, std::size_t head, std::size_t position) {
  return static_cast<std::uint8_t*>(cache) +
         (head * op.capacity + position) * op.head_size * cache_bytes(op.cache);
}

AttentionSpan span_of(const Attention& op, const AttentionInput& in, std::size_t head) {
  AttentionSpan span;
  span.cache = op.cache;
  span.keys = cache_at(op, in.keys, head, 0);
  span.values = cache_at(op, in.values, head, 0);
  span.head_size = op.head_size;
  span.heads = op.heads / op.kv_heads;
  span.scale = op.scale;
  span.softcap = op.softcap;
  return span;
}

// Rotates one new position's queries into `q`, and stores its keys and values.
void enter_position(const Kernels& kernels, const Attention& op, const AttentionInput& in, std::size_t s, float* q) {
  const std::size_t size = op.head_size, position = in.past + s;
  alignas(64) float rotated[kMaxHeadSize];
  for (std::size_t h = 0; h < op.heads; ++h) {
    const float* x = in.q + s * in.q_stride + h * size;
    if (op.rotary)
      rotate(op, position, x, q + h * size);
    else
      std::memcpy(q + h * size, x, size * sizeof(float));
  }
  for (std::size_t h = 0; h < op.kv_heads; ++h) {
    const float* k = in.k + s * in.kv_stride + h * size;
    if (op.rotary) {
      rotate(op, position, k, rotated);
      k = rotated;
    }
    kernels.store_cache(op.cache, k, size, cache_at(op, in.keys, h, position));
    kernels.store_cache(op.cache, in.v + s * in.kv_stride + h * size, size, cache_at(op, in.values, h, position));
  }
}

// Joins one head's partial results, in order of position.
void join_chunks(std::size_t chunks, std::size_t stride, std::size_t size, const float* partial, const float* maxima,
                 const float* sums, std::size_t stat_stride, float* out) {
  float peak = maxima[0];
  for (std::size_t c = 1; c < chunks; ++c) peak = std::max(peak, maxima[c * stat_stride]);
  float total = 0.0F;
  std::fill(out, out + size, 0.0F);
  for (std::size_t c = 0; c < chunks; ++c) {
    const float share = std::exp(maxima[c * stat_stride] - peak);
    total += share * sums[c * stat_stride];
    for (std::size_t d = 0; d < size; ++d) out[d] += share * partial[c * stride + d];
  }
  for (std::size_t d = 0; d < size; ++d) out[d] /= total;
}

void attend_decode(const Kernels& kernels, const Pool& pool, const Attention& op, const AttentionInput& in, float* out) {
  const std::size_t size = op.head_size, shared = op.heads / op.kv_heads, width = op.heads * size;
  const std::size_t end = in.past + 1;
  const std::size_t start = op.window != 0 && end > op.window ? end - op.window : 0;
  const std::size_t first = start / kDecodeChunk, chunks = divide_up(end, kDecodeChunk) - first;
  // Results of chunk c: [heads, size] values, then a maximum and a sum for each head.
  const std::size_t stride = width + 2 * op.heads;
  float* q = caller_extra.get<float>(width + chunks * stride);
  float* partial = q + width;
  enter_position(kernels, op, in, 0, q);
  auto task = [&](std::size_t i) {
    const std::size_t chunk = i / op.kv_heads, head = i % op.kv_heads;
    const std::size_t begin = std::max(start, (first + chunk) * kDecodeChunk);
    const std::size_t stop = std::min(end, (first + chunk + 1) * kDecodeChunk);
    float* result = partial + chunk * stride;
    auto* scratch = task_sums.get<float>(attend_one_scratch(shared));
    kernels.attend_one(span_of(op, in, head), q + head * shared * size, begin, stop, scratch,
                       result + head * shared * size, result + width + head * shared,
                       result + width + op.heads + head * shared);
  };
  parallel(pool, chunks * op.kv_heads, task);
  for (std::size_t h = 0; h < op.heads; ++h)
    join_chunks(chunks, stride, size, partial + h * size, partial + width + h, partial + width + op.heads + h, stride,
                out + h * size);
}

void attend_prefill(const Kernels& kernels, const Pool& pool, const Attention& op, const AttentionInput& in, float* out) {
  const std::size_t size = op.head_size, shared = op.heads / op.kv_heads, width = op.heads * size;
  float* q = caller_extra.get<float>(in.length * width);
  auto enter = [&](std::size_t i) {
    for (std::size_t s = i * kQueryBlock; s < std::min(in.length, (i + 1) * kQueryBlock); ++s)
      enter_position(kernels, op, in, s, q + s * width);
  };
  const std::size_t blocks = divide_up(in.length, kQueryBlock);
  parallel(pool, blocks, enter);
  auto attend = [&](std::size_t i) {
    // The last blocks see the most and are started first, so that threads finish together.
    const std::size_t block = blocks - 1 - i / op.kv_heads, head = i % op.kv_heads;
    const std::size_t s = block * kQueryBlock, count = std::min(kQueryBlock, in.length - s);
    auto* scratch = task_sums.get<float>(attend_many_scratch(shared));
    kernels.attend_many(span_of(op, in, head), q + s * width + head * shared * size, width, count, in.past + s,
                        op.window, reinterpret_cast<std::uint8_t*>(scratch), out + s * width + head * shared * size,
                        width);
  };
  parallel(pool, blocks * op.kv_heads, attend);
}

}  // namespace

std::size_t linear_outputs(const PackedMatrix& weight, Epilogue epilogue) {
  return epilogue == Epilogue::kNone ? weight.rows : weight.rows / 2;
}

void run_linear(const Kernels& kernels, const Pool& pool, const Linear& op, const float* x, std::size_t rows, float* y,
                float* sum) {
  if (rows == 1) return run_one_row(kernels, pool, op, x, y, sum);
  if (rows > 1) run_many_rows(kernels, pool, op, x, rows, y, sum);
}

void gather_row(const PackedMatrix& w, std::size_t row, float* out) {
  const std::size_t pack = columns_per_cell(w.type), lane = row % kGroupRows;
  const std::uint8_t* cells = w.group_values(row / kGroupRows) + lane * 4;
  const std::uint16_t* scales = w.scales == nullptr ? nullptr : w.group_scales(row / kGroupRows) + lane;
  for (std::size_t c = 0; c < w.cells; ++c, cells += kCellBytes)
    for (std::size_t j = 0; j < pack && c * pack + j < w.cols; ++j) {
      float value = 0.0F;
      if (w.type == ValueType::kFp32) {
        std::memcpy(&value, cells, 4);
      } else if (w.type == ValueType::kBf16) {
        std::uint32_t bits = 0;
        std::memcpy(reinterpret_cast<std::uint8_t*>(&bits) + 2, cells + 2 * j, 2);
        std::memcpy(&value, &bits, 4);
      } else {
        std::uint32_t bits = static_cast<std::uint32_t>(scales[c / kScaleCells * kGroupRows]) << 16;
        std::memcpy(&value, &bits, 4);
        value *= static_cast<float>(static_cast<std::int8_t>(cells[j]));
      }
      out[c * pack + j] = value;
    }
}

void run_attention(const Kernels& kernels, const Pool& pool, const Attention& op, const AttentionInput& input,
                   float* out) {
  if (input.length == 1)
    attend_decode(kernels, pool, op, input, out);
  else if (input.length > 1)
    attend_prefill(kernels, pool, op, input, out);
}

}  // namespace owl
