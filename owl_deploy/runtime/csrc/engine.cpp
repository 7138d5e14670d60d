#include "engine.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "memory.h"
#include "threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace owl {
namespace {

// Denormal operands cost some x86 processors a hundred cycles; inside a task they count as zero
// there. Others take them as they are.
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

thread_local Scratch caller_rows;  // activations, shared with the tasks
thread_local Scratch caller_extra;
thread_local Scratch caller_counters;
thread_local Scratch task_sums;
thread_local Scratch task_tile;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// ---- Phases ------------------------------------------------------------------------------------

// Where the data of an item and of those behind it begin; null: nowhere.
struct Memory {
  const std::uint8_t* values = nullptr;
  const std::uint8_t* masks = nullptr;

  // Asks for four cache lines of values from line `first` on, and for the masks that may go with
  // them.
  void ask(std::size_t first) const {
    for (std::size_t i = 0; values != nullptr && i < 4; ++i)
      __builtin_prefetch(values + 64 * (first + i));
    if (masks != nullptr) __builtin_prefetch(masks + 16 * first);
  }
};

struct Phase {
  std::size_t count = 0;  // items
  std::size_t grain = 1;  // items that a thread takes at least
  bool in_runs = false;   // a thread takes long runs of items while many are left: weights are read
                          // in order then
  std::function<void(std::size_t, std::size_t)> items;  // [begin, end)
  std::function<void()> before, after;  // by one thread, before the first item and after the last
  std::function<Memory(std::size_t)> memory;  // of an item, for a thread that waits; may be empty
};

// What the threads of one run share; a phase's counters have a cache line of their own.
class Run {
 public:
  Run(const std::vector<Phase>& phases, std::size_t expected, std::uint8_t* memory)
      : phases_(phases), expected_(expected), counters_(reinterpret_cast<Counters*>(memory)) {
    for (std::size_t p = 0; p < phases.size(); ++p) new (counters_ + p) Counters;
    open(0);
  }
  static std::size_t bytes(std::size_t phases) { return phases * sizeof(Counters); }

  // Called by every thread that takes part, at any time and any number of times.
  void take_part() {
    if (over_.load(std::memory_order_relaxed)) return;
    DenormalsAreZero guard;
    threads_.fetch_add(1, std::memory_order_relaxed);
    for (std::size_t p = open_.load(std::memory_order_acquire); p < phases_.size(); ++p) {
      wait_for(p);
      work_on(p);
    }
    over_.store(true, std::memory_order_relaxed);
  }

  void rethrow() {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  struct alignas(64) Counters {
    std::atomic<std::size_t> taken{0}, done{0};
  };

  // The threads among which a phase is shared. Those that a pool wakes arrive during the first
  // phases, a preparation and its product: the first to arrive must leave them something.
  std::size_t sharers(std::size_t p) const {
    const std::size_t here = threads_.load(std::memory_order_relaxed);
    return p < kArriving ? std::max(here, expected_) : here;
  }

  // Weights and keys do not depend on what is waited for: meanwhile they come nearer. Whoever opens
  // the phase takes the first items, so that the next thread begins behind its share.
  void wait_for(std::size_t p) {
    const Phase& phase = phases_[p];
    const std::size_t likely = phase.count / sharers(p);
    const Memory next = phase.memory && likely < phase.count ? phase.memory(likely) : Memory{};
    for (std::size_t spins = 0; open_.load(std::memory_order_acquire) < p; ++spins) {
      if (spins < kAheadLines / 4) next.ask(4 * spins);
      relax();
      // Whoever has the last item may have lost its core to another process.
      if (spins > kSpins) std::this_thread::yield();
    }
  }

  void work_on(std::size_t p) {
    const Phase& phase = phases_[p];
    std::size_t finished = 0, begin, end;
    while (take(p, &begin, &end)) {
      guarded([&] { phase.items(begin, end); });
      finished += end - begin;
    }
    if (finished == 0) return;
    if (counters_[p].done.fetch_add(finished, std::memory_order_acq_rel) + finished < phase.count)
      return;
    if (phase.after) guarded(phase.after);
    open(p + 1);
  }

  void open(std::size_t p) {
    if (p < phases_.size() && phases_[p].before) guarded(phases_[p].before);
    open_.store(p, std::memory_order_release);
  }

  bool take(std::size_t p, std::size_t* begin, std::size_t* end) {
    const Phase& phase = phases_[p];
    std::atomic<std::size_t>& taken = counters_[p].taken;
    std::size_t at = taken.load(std::memory_order_relaxed), size;
    do {
      if (at >= phase.count) return false;
      size = phase.grain;
      if (phase.in_runs) size = std::max(size, (phase.count - at) / sharers(p));
      size = std::min(size, phase.count - at);
    } while (!taken.compare_exchange_weak(at, at + size, std::memory_order_relaxed));
    *begin = at;
    *end = at + size;
    return true;
  }

  // Memory may run out inside a task; the others must not wait for it for ever, nor may the
  // exception cross the pool.
  template <class Work>
  void guarded(const Work& work) {
    try {
      work();
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
  }

  static constexpr std::size_t kArriving = 2;  // phases
  static constexpr std::size_t kSpins = 2000;
  static constexpr std::size_t kAheadLines = 128;

  const std::vector<Phase>& phases_;
  const std::size_t expected_;  // threads
  Counters* counters_;
  std::atomic<std::size_t> open_{0};
  std::atomic<std::size_t> threads_{0};
  std::atomic<bool> over_{false};  // every item has been taken
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

// ---- Linear layers -----------------------------------------------------------------------------

constexpr std::size_t kTaskBytes =
    16384;  // weights that a thread takes at least, of a matrix-vector product
constexpr std::size_t kSumGroups =
    96;  // sums of so many row groups, over all rows, are kept until they are finished
static_assert(kSumGroups >= 2 * kPassRows);
constexpr std::size_t kPrepareRows = 4;
constexpr std::size_t kTasksPerThread = 4;  // of a matrix-matrix product, where it is large enough
constexpr std::size_t kScreenSample = 64;   // with a smaller sample every near output counts

std::size_t group_bytes(const PackedMatrix& w) {
  if (!w.sparse()) return w.group_bytes;
  const std::size_t values = static_cast<std::size_t>(w.index[w.groups]) * kCellBytes;
  return values / w.groups + w.cells * w.mask_bytes;
}

struct LinearStep {
  const Kernels& kernels;
  Linear op;
  const float* x;
  std::size_t rows;
  float* y;
  float* sum;
  ActivationLayout layout;

  // Integers' sums are exact, so that a row says the same in passes. Only a few rows are screened.
  bool are_few() const {
    const bool pass = op.weight.traits().integer() && op.weight.storage != Storage::kPlanes;
    return rows <= (pass ? kernels.pass_rows : kFewRows);
  }

  void normalise(std::size_t row, float* out) const {
    const std::size_t cols = op.weight.cols;
    kernels.rms_norm(x + row * cols, op.skip == nullptr ? nullptr : op.skip + row * cols, op.gamma,
                     cols, op.epsilon, sum == nullptr ? nullptr : sum + row * cols, out);
  }

  void prepare(std::size_t row, float* scratch, std::uint8_t* prepared) const {
    const float* from = x + row * op.weight.cols;
    if (op.gamma != nullptr) {
      normalise(row, scratch);
      from = scratch;
    }
    kernels.prepare(op.weight, layout, from, prepared + row * layout.stride);
  }

  Output output() const {
    Output o;
    o.epilogue = op.epilogue;
    o.bias = op.bias;
    o.data = y;
    o.cols = op.outputs;
    return o;
  }

  // Row groups come in pairs, so that gate and up stay together.
  void multiply_pairs(std::size_t first, std::size_t last, const std::uint8_t* prepared) const {
    const PackedMatrix& w = op.weight;
    float sums[kSumGroups * kGroupRows];
    const std::size_t stop = std::min(w.groups, 2 * last);
    const std::size_t step = kSumGroups / rows / 2 * 2, stride = step * kGroupRows;
    for (std::size_t begin = 2 * first; begin < stop; begin += step) {
      const std::size_t end = std::min(stop, begin + step);
      if (rows == 1)
        kernels.matvec(w, begin, end, layout, prepared, sums);
      else
        few_in_passes(kernels, w, begin, end, layout, prepared, rows, sums, stride);
      kernels.finish(begin, end, sums, stride, 0, rows, output());
    }
  }

  std::size_t pairs() const { return divide_up(op.weight.groups, 2); }

  // Of a weight in planes: each row's largest output of the pairs goes to the first one's place in
  // its maxima [rows, pairs()].
  void multiply_and_screen(std::size_t first, std::size_t last, const std::uint8_t* prepared,
                           float* maxima) const {
    multiply_pairs(first, last, prepared);
    const std::size_t begin = 2 * first * kGroupRows,
                      end = std::min(op.outputs, 2 * last * kGroupRows);
    for (std::size_t m = 0; m < rows; ++m, maxima += pairs()) {
      std::fill(maxima + first, maxima + last, -std::numeric_limits<float>::infinity());
      if (begin < end) maxima[first] = kernels.largest(output_row(m) + begin, end - begin);
    }
  }

  float* output_row(std::size_t row) const { return y + row * op.outputs; }

  // The least output of a row that is near, from its maxima [pairs()] and from every 16th output;
  // `sample` has room for those.
  float least_near(std::size_t row, const float* maxima, float* sample) const {
    const float least = kernels.largest(maxima, pairs()) - kScreenMargin;
    const std::size_t size = op.outputs / kGroupRows, most = size / kScreenShare;
    for (std::size_t i = 0; i < size; ++i) sample[i] = output_row(row)[i * kGroupRows];
    const auto near =
        std::count_if(sample, sample + size, [&](float value) { return value >= least; });
    if (size < kScreenSample || static_cast<std::size_t>(near) <= most) return least;
    // What is not a number has no place in an order.
    float* end =
        std::remove_if(sample, sample + size, [](float value) { return std::isnan(value); });
    std::nth_element(sample, sample + most, end, std::greater<float>());
    return sample[most];
  }

  // Row after row: what one has brought near, the next ones often want too.
  void refine(std::size_t first, std::size_t last, const std::uint8_t* prepared,
              const float* least) const {
    const std::size_t groups = op.weight.groups;
    for (std::size_t i = first; i < last; ++i)
      for (std::size_t m = 0; m < rows; ++m)
        kernels.refine(op.weight, i * kScreenGroups, std::min(groups, (i + 1) * kScreenGroups),
                       layout, prepared + m * layout.stride, least[m], output_row(m), op.outputs);
  }

  // What one task computes: so many rows of as many groups.
  struct Part {
    std::size_t rows, groups;
  };
  // A gated epilogue needs both halves of a pair of groups.
  std::size_t whole(std::size_t groups) const {
    return op.epilogue == Epilogue::kNone ? groups : divide_up(groups, 2) * 2;
  }
  std::size_t panels(const Part& part) const { return divide_up(op.weight.groups, part.groups); }
  std::size_t tasks(const Part& part) const { return panels(part) * divide_up(rows, part.rows); }
  // Less, and first of groups, where more would leave some threads nothing to do.
  Part part() const {
    Part part{kernels.panel_rows, whole(kernels.panel_groups)};
    const std::size_t wanted = kTasksPerThread * likely_session_threads();
    while (part.groups > whole(kernels.tile_groups) && tasks(part) < wanted)
      part.groups -= kernels.tile_groups;
    while (part.rows > kRowChunk && tasks(part) < wanted) part.rows /= 2;
    return part;
  }

  void multiply_part(std::size_t i, const std::uint8_t* prepared) const {
    const Part size = part();
    const std::size_t first = i / panels(size) * size.rows, begin = i % panels(size) * size.groups,
                      count = std::min(size.rows, rows - first),
                      end = std::min(op.weight.groups, begin + size.groups);
    auto* tile = task_tile.get<std::uint8_t>(kPanelScratch);
    const std::size_t stride = size.groups * kGroupRows;
    auto* sums = task_sums.get<float>(in_row_tiles(count) * stride);
    for (std::size_t g = begin; g < end; g += kernels.panel_groups)
      kernels.panel(op.weight, g, std::min(end - g, kernels.panel_groups), layout,
                    prepared + first * layout.stride, count, tile, sums + (g - begin) * kGroupRows,
                    stride);
    kernels.finish(begin, end, sums, stride, first, count, output());
  }
};

// ---- Attention ---------------------------------------------------------------------------------

void* cache_at(const Attention& op, void* cache, std::size_t head, std::size_t position) {
  return static_cast<std::uint8_t*>(cache) +
         (head * op.capacity + position) * op.head_size * cache_bytes(op.cache);
}

AttentionSpan span_of(const Attention& op, const AttentionRun& run, std::size_t head) {
  AttentionSpan span;
  span.cache = op.cache;
  span.keys = cache_at(op, run.keys, head, 0);
  span.values = cache_at(op, run.values, head, 0);
  span.head_size = op.head_size;
  span.heads = op.heads / op.kv_heads;
  span.scale = op.scale;
  span.softcap = op.softcap;
  return span;
}

struct AttentionWork {
  const Kernels& kernels;
  Attention op;

  std::size_t shared() const { return op.heads / op.kv_heads; }
  std::size_t width() const { return op.heads * op.head_size; }

  void rotate(std::size_t position, const float* x, float* to) const {
    const std::size_t half = op.rotary_size / 2;
    kernels.rotate(x, op.head_size, op.cosines + position * half, op.sines + position * half, half,
                   op.interleaved, to);
  }

  // Rotates one new position's queries into `q`, and stores its keys and values.
  void enter(const AttentionRun& run, std::size_t s, float* q) const {
    const std::size_t size = op.head_size, position = run.past + s;
    alignas(64) float rotated[kMaxHeadSize];
    for (std::size_t h = 0; h < op.heads; ++h) {
      const float* x = run.q + s * run.q_stride + h * size;
      if (op.rotary)
        rotate(position, x, q + h * size);
      else
        std::memcpy(q + h * size, x, size * sizeof(float));
    }
    for (std::size_t h = 0; h < op.kv_heads; ++h) {
      const float* k = run.k + s * run.kv_stride + h * size;
      if (op.rotary) {
        rotate(position, k, rotated);
        k = rotated;
      }
      kernels.store_cache(op.cache, k, size, cache_at(op, run.keys, h, position));
      kernels.store_cache(op.cache, run.v + s * run.kv_stride + h * size, size,
                          cache_at(op, run.values, h, position));
    }
  }
};

// A few new positions, of one sequence or of several, each attended to as if it came alone. Tasks
// are chunks of a sequence's past, one key head after the other, as they lie in memory; a chunk
// meets all new positions of its sequence.
struct DecodeStep : AttentionWork {
  struct Part {
    AttentionRun run;
    std::size_t first_query, first_item, first_partial;
    std::size_t first_chunk, chunks;  // that any of its positions sees
  };
  std::vector<Part> parts;
  std::size_t queries = 0, items = 0, partials = 0;

  DecodeStep(const Kernels& table, const Attention& attention) : AttentionWork{table, attention} {}

  void add(const AttentionRun& run) {
    const std::size_t first = start(run.past) / kDecodeChunk;
    const std::size_t chunks = divide_up(run.past + run.length, kDecodeChunk) - first;
    parts.push_back({run, queries, items, partials, first, chunks});
    queries += run.length;
    items += chunks * op.kv_heads;
    partials += chunks * run.length;
  }

  // The first position that the one at `position` sees.
  std::size_t start(std::size_t position) const {
    return op.window != 0 && position >= op.window ? position + 1 - op.window : 0;
  }
  // Results of a chunk: [heads, size] values, then a maximum and a sum for each head.
  std::size_t partial_floats() const { return width() + 2 * op.heads; }
  std::size_t floats() const { return queries * width() + partials * partial_floats(); }
  float* partial(float* memory, std::size_t i) const {
    return memory + queries * width() + i * partial_floats();
  }

  const Part& part_of(std::size_t i, std::size_t Part::* first) const {
    return *(std::upper_bound(parts.begin(), parts.end(), i,
                              [&](std::size_t at, const Part& part) { return at < part.*first; }) -
             1);
  }

  void enter_query(std::size_t i, float* memory) const {
    const Part& part = part_of(i, &Part::first_query);
    enter(part.run, i - part.first_query, memory + i * width());
  }

  const std::uint8_t* keys_of(std::size_t item) const {
    const Part& part = part_of(item, &Part::first_item);
    const std::size_t i = item - part.first_item;
    const std::size_t from = (part.first_chunk + i % part.chunks) * kDecodeChunk;
    return static_cast<const std::uint8_t*>(cache_at(op, part.run.keys, i / part.chunks, from));
  }

  void attend_chunk(std::size_t item, float* memory) const {
    const Part& part = part_of(item, &Part::first_item);
    const std::size_t i = item - part.first_item, chunk = i % part.chunks, head = i / part.chunks,
                      h = head * shared();
    const std::size_t from = (part.first_chunk + chunk) * kDecodeChunk;
    auto* scratch = task_sums.get<float>(attend_one_scratch(shared()));
    AttentionSpan span = span_of(op, part.run, head);
    for (std::size_t s = 0; s < part.run.length; ++s) {
      const std::size_t position = part.run.past + s;
      const std::size_t begin = std::max(start(position), from),
                        end = std::min(position + 1, from + kDecodeChunk);
      if (begin >= end) continue;
      if (s + 1 == part.run.length && item + 1 < items) span.next = keys_of(item + 1);
      const float* q = memory + (part.first_query + s) * width() + h * op.head_size;
      float* result = partial(memory, part.first_partial + s * part.chunks + chunk);
      kernels.attend_one(span, q, begin, end, scratch, result + h * op.head_size,
                         result + width() + h, result + width() + op.heads + h);
    }
  }

  void join_query(std::size_t i, float* memory) const {
    const Part& part = part_of(i, &Part::first_query);
    const std::size_t s = i - part.first_query, position = part.run.past + s;
    const std::size_t first = start(position) / kDecodeChunk,
                      chunks = divide_up(position + 1, kDecodeChunk) - first;
    const float* result =
        partial(memory, part.first_partial + s * part.chunks + first - part.first_chunk);
    const float* maxima = result + width();
    for (std::size_t h = 0; h < op.heads; ++h)
      kernels.join_chunks(chunks, partial_floats(), op.head_size, result + h * op.head_size,
                          maxima + h, maxima + op.heads + h,
                          part.run.out + s * width() + h * op.head_size);
  }
};

// Many new positions of one sequence: tasks are blocks of queries by key head.
struct PrefillStep : AttentionWork {
  AttentionRun run;
  std::size_t at;  // floats of shared memory that others need before its queries

  PrefillStep(const Kernels& table, const Attention& attention, const AttentionRun& positions,
              std::size_t others)
      : AttentionWork{table, attention}, run(positions), at(others) {}

  std::size_t block_size() const { return query_block(shared()); }
  std::size_t blocks() const { return divide_up(run.length, block_size()); }

  void enter_block(std::size_t i, float* q) const {
    const std::size_t end = std::min(run.length, (i + 1) * block_size());
    for (std::size_t s = i * block_size(); s < end; ++s) enter(run, s, q + s * width());
  }

  void attend_block(std::size_t i, const float* q) const {
    // The last blocks see the most and are started first, so that threads finish together.
    const std::size_t block = blocks() - 1 - i / op.kv_heads, head = i % op.kv_heads;
    const std::size_t s = block * block_size(), count = std::min(block_size(), run.length - s);
    const std::size_t at = s * width() + head * shared() * op.head_size;
    auto* scratch = task_sums.get<float>(attend_many_scratch(shared()));
    kernels.attend_many(span_of(op, run, head), q + at, width(), count, run.past + s, op.window,
                        reinterpret_cast<std::uint8_t*>(scratch), run.out + at, width());
  }
};

// ---- Rows of a table ---------------------------------------------------------------------------

// The i-th value of a dense cell.
float value_at(Bits<32>, const std::uint8_t* cell, std::size_t i) {
  float value;
  std::memcpy(&value, cell + 4 * i, 4);
  return value;
}
float value_at(Bits<16>, const std::uint8_t* cell, std::size_t i) {
  std::uint16_t half;
  std::memcpy(&half, cell + 2 * i, 2);
  return std::bit_cast<float>(std::uint32_t{half} << 16);
}
float value_at(Bits<8>, const std::uint8_t* cell, std::size_t i) {
  return static_cast<std::int8_t>(cell[i]);
}

template <class Form>
void gather(const PackedMatrix& w, std::size_t row, float* out) {
  constexpr ValueTraits kTraits = Form::kTraits;
  constexpr std::size_t columns = kTraits.columns_per_cell();
  constexpr std::size_t cell_bytes = kTraits.stored_bytes(kTraits.values_per_cell());
  const std::size_t group = row / kGroupRows, lane = row % kGroupRows;
  for (std::size_t c = 0; c < w.cols; ++c) {
    if constexpr (Form::kStorage == Storage::kPlanes)
      out[c] = static_cast<float>(w.joined(row, c));
    else if constexpr (kTraits.stored_bits == 4)
      out[c] = static_cast<float>(w.upper(row, c));
    else if constexpr (kTraits.stored_bits == 3)
      out[c] = static_cast<float>(w.three_bits(row, c));
    else
      out[c] =
          value_at(Bits<kTraits.stored_bits>{}, w.group_values(group) + c / columns * cell_bytes,
                   lane * columns + c % columns);
    if constexpr (kTraits.integer()) {
      const std::size_t place = (c / kBlockColumns >> w.scale_shift) * kGroupRows + lane;
      out[c] *= w.scale_code.decoded(w.group_scales(group)[place]);
    }
  }
}

}  // namespace

// ---- The plan ----------------------------------------------------------------------------------

class Plan::Steps {
 public:
  explicit Steps(const Kernels& kernels) : kernels_(kernels) {}

  void add(const Linear& op, const float* x, std::size_t rows, float* y, float* sum) {
    LinearStep& step = linears_.emplace_back(LinearStep{kernels_, op, x, rows, y, sum, {}});
    const bool few = step.are_few();
    step.layout = kernels_.layout(op.weight, !few);
    row_bytes_ = std::max(row_bytes_, step.layout.stride * in_row_tiles(rows));
    few ? add_few_rows(step) : add_many_rows(step);
  }

  // Short runs enter the cache before long ones, which may follow them in their sequence, and are
  // attended to after these, which may come before them.
  void add(const Attention& op, const std::vector<AttentionRun>& runs) {
    DecodeStep& few = decodes_.emplace_back(kernels_, op);
    for (const AttentionRun& run : runs)
      if (run.length <= kFewRows && run.length > 0) few.add(run);
    extra_floats_ = std::max(extra_floats_, few.floats());
    const bool alone = few.queries == 1 && runs.size() == 1;
    if (few.queries > 0 && !alone) add_enter(few);
    for (const AttentionRun& run : runs)
      if (run.length > kFewRows)
        add_prefill(prefills_.emplace_back(kernels_, op, run, few.floats()));
    if (few.queries > 0) add_decode(few, alone);
  }

  void clear(float* out, std::size_t floats) {
    add_phase(1, [out, floats](std::size_t) { std::fill_n(out, floats, 0.0F); });
  }

  void run(const Pool& pool) {
    if (phases_.empty()) return;
    const DenormalsAreZero guard;  // the first phase is begun here, before anyone takes part
    const Scratch::Borrowed rows(caller_rows), extra(caller_extra);
    rows_ = caller_rows.get<std::uint8_t>(row_bytes_);
    extra_ = caller_extra.get<float>(extra_floats_);
    Run run(phases_, std::min(pool.threads, kMaxThreads),
            caller_counters.get<std::uint8_t>(Run::bytes(phases_.size())));
    auto take_part = [](void* argument, std::size_t) { static_cast<Run*>(argument)->take_part(); };
    const bool alone =
        std::all_of(phases_.begin(), phases_.end(), [](const Phase& p) { return p.count == 1; });
    if (alone)
      run.take_part();
    else
      pool.run(pool.context, kMaxThreads, take_part, &run);
    run.rethrow();
  }

 private:
  // The closures hold two pointers, which std::function keeps without asking for memory.
  template <class Items>
  Phase& add_phase(std::size_t count, Items items) {
    Phase& phase = phases_.emplace_back();
    phase.count = count;
    phase.items = [items](std::size_t begin, std::size_t end) {
      for (std::size_t i = begin; i < end; ++i) items(i);
    };
    return phase;
  }

  void add_prepare(const LinearStep* s, std::size_t rows) {
    add_phase(divide_up(s->rows, rows), [this, s, rows](std::size_t i) {
      auto* normed = task_sums.get<float>(s->op.weight.cols);
      for (std::size_t r = i * rows; r < std::min(s->rows, (i + 1) * rows); ++r)
        s->prepare(r, normed, rows_);
    });
  }

  void add_few_rows(const LinearStep& step) {
    const LinearStep* s = &step;
    if (s->rows > 1) add_prepare(s, 1);
    Phase& phase = phases_.emplace_back();
    phase.count = s->pairs();
    phase.grain = divide_up(kTaskBytes, 2 * std::max<std::size_t>(1, group_bytes(s->op.weight)));
    phase.in_runs = true;
    if (s->rows == 1) {
      extra_floats_ = std::max(extra_floats_, s->op.weight.cols);
      phase.before = [this, s] { s->prepare(0, extra_, rows_); };
    }
    phase.items = [this, s](std::size_t begin, std::size_t end) {
      s->multiply_pairs(begin, end, rows_);
    };
    phase.memory = [s](std::size_t pair) {
      const PackedMatrix& w = s->op.weight;
      return Memory{w.group_values(2 * pair), w.sparse() ? w.group_masks(2 * pair) : nullptr};
    };
    if (s->op.weight.storage == Storage::kPlanes) screen(*s);
  }

  // Outputs from the upper bits first; the lower bits then only for those that come near the
  // largest of their row.
  void screen(const LinearStep& step) {
    const LinearStep* s = &step;
    Phase& rough = phases_.back();
    // Each row's maxima, then the least that counts as near in it, then a sample.
    const std::size_t leasts = s->rows * s->pairs(), sample = leasts + s->rows;
    extra_floats_ = std::max(extra_floats_, sample + s->op.outputs / kGroupRows);
    rough.items = [this, s](std::size_t begin, std::size_t end) {
      s->multiply_and_screen(begin, end, rows_, extra_);
    };
    rough.after = [this, s] { find_leasts(*s); };
    Phase& fine = phases_.emplace_back();
    fine.count = divide_up(s->op.weight.groups, kScreenGroups);
    fine.items = [this, s](std::size_t begin, std::size_t end) {
      s->refine(begin, end, rows_, extra_ + s->rows * s->pairs());
    };
  }

  void find_leasts(const LinearStep& step) {
    float* least = extra_ + step.rows * step.pairs();
    for (std::size_t m = 0; m < step.rows; ++m)
      least[m] = step.least_near(m, extra_ + m * step.pairs(), least + step.rows);
  }

  void add_many_rows(const LinearStep& step) {
    const LinearStep* s = &step;
    add_prepare(s, kPrepareRows);
    add_phase(s->tasks(s->part()), [this, s](std::size_t i) { s->multiply_part(i, rows_); });
  }

  void add_enter(const DecodeStep& step) {
    const DecodeStep* s = &step;
    add_phase(s->queries, [this, s](std::size_t i) { s->enter_query(i, extra_); });
  }

  // Of a single position, whoever opens and closes the phase does what comes before and after it.
  void add_decode(const DecodeStep& step, bool alone) {
    const DecodeStep* s = &step;
    Phase& phase = add_phase(s->items, [this, s](std::size_t i) { s->attend_chunk(i, extra_); });
    phase.in_runs = true;
    phase.memory = [s](std::size_t i) { return Memory{s->keys_of(i), nullptr}; };
    if (alone) {
      phase.before = [this, s] { s->enter_query(0, extra_); };
      phase.after = [this, s] { s->join_query(0, extra_); };
    } else {
      add_phase(s->queries, [this, s](std::size_t i) { s->join_query(i, extra_); });
    }
  }

  void add_prefill(const PrefillStep& step) {
    const PrefillStep* s = &step;
    extra_floats_ = std::max(extra_floats_, s->at + s->run.length * s->width());
    add_phase(s->blocks(), [this, s](std::size_t i) { s->enter_block(i, extra_ + s->at); });
    add_phase(s->blocks() * s->op.kv_heads,
              [this, s](std::size_t i) { s->attend_block(i, extra_ + s->at); });
  }

  static constexpr std::size_t kMaxThreads = 256;

  const Kernels& kernels_;
  std::deque<LinearStep> linears_;  // deques: phases point into them
  std::deque<DecodeStep> decodes_;
  std::deque<PrefillStep> prefills_;
  std::vector<Phase> phases_;
  // The calling thread's memory, which all steps use in turn.
  std::size_t row_bytes_ = 0, extra_floats_ = 0;
  std::uint8_t* rows_ = nullptr;  // prepared activations
  float* extra_ = nullptr;
};

Plan::Plan(const Kernels& kernels) : steps_(std::make_unique<Steps>(kernels)) {}
Plan::~Plan() = default;

void Plan::add(const Linear& op, const float* x, std::size_t rows, float* y, float* sum) {
  if (rows > 0) steps_->add(op, x, rows, y, sum);
}
void Plan::add(const Attention& op, const std::vector<AttentionRun>& runs) {
  steps_->add(op, runs);
}
void Plan::clear(float* out, std::size_t floats) { steps_->clear(out, floats); }
void Plan::run(const Pool& pool) { steps_->run(pool); }

std::size_t linear_outputs(const PackedMatrix& weight, Epilogue epilogue) {
  return epilogue == Epilogue::kNone ? weight.rows : weight.rows / 2;
}

std::string what_is_wrong(const Linear& op) {
  if (op.epilogue > Epilogue::kGeluMul || op.epilogue < Epilogue::kNone) return "unknown epilogue";
  if (op.outputs == 0 || op.outputs > linear_outputs(op.weight, op.epilogue))
    return "columns must lie between 1 and what the weight has";
  if (op.epilogue != Epilogue::kNone &&
      (op.weight.groups % 2 != 0 || op.weight.storage == Storage::kPlanes))
    return "a gated weight needs an even number of row groups, and no planes";
  return "";
}

std::string what_is_wrong(const Attention& op) {
  if (op.heads == 0 || op.kv_heads == 0 || op.heads % op.kv_heads != 0)
    return "num_heads must be a multiple of kv_num_heads";
  if (op.heads > kMaxHeads) return "num_heads is out of range";
  if (op.heads / op.kv_heads > kMaxSharedHeads) return "too many query heads for each key head";
  return "";
}

bool head_size_is_sound(std::size_t head_size) {
  return head_size % 16 == 0 && head_size > 0 && head_size <= kMaxHeadSize;
}

void gather_row(const PackedMatrix& w, std::size_t row, float* out) {
  with_form(w, [&](auto form) { gather<decltype(form)>(w, row, out); });
}

}  // namespace owl
