// Timing loops for benchmarks/kernel_speed.py: the kernels alone and a plain read of memory, on the
// same threads. And, for a test, a look at how the engine shares out its work.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "c_api.h"
#include "dense.h"
#include "engine.h"
#include "threads.h"

namespace {

// Runs work(thread) on `threads` threads `repeat` times, all starting a pass together; seconds[i]:
// of pass i. Throws what starting a thread does where there are not so many.
template <class Work>
void time_passes(std::size_t threads, std::size_t repeat, double* seconds, Work work) {
  std::atomic<std::size_t> arrived{0};
  auto meet = [&](std::size_t target) {
    ++arrived;
    while (arrived.load() < target) std::this_thread::yield();
  };
  std::atomic<int> told{0};  // 1: begin, -1: there are too few of us
  auto body = [&](std::size_t t) {
    while (told.load() == 0) std::this_thread::yield();
    if (told.load() < 0) return;
    for (std::size_t r = 0; r < repeat; ++r) {
      meet((2 * r + 1) * threads);
      const auto start = std::chrono::steady_clock::now();
      work(t);
      meet((2 * r + 2) * threads);
      if (t == 0)
        seconds[r] =
            std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
  };
  owl::Joined others;
  try {
    for (std::size_t t = 1; t < threads; ++t) others.threads.emplace_back(body, t);
  } catch (const std::exception&) {
    told = -1;
    throw;
  }
  told = 1;
  body(0);
}

// Rows times groups [begin, end), whose sums go nowhere.
void multiply(const owl::Kernels& kernels, const owl::PackedMatrix& w, std::size_t begin,
              std::size_t end, const owl::ActivationLayout& layout, const std::uint8_t* prepared,
              std::size_t rows, bool many) {
  const std::size_t step = many ? kernels.panel_groups : 2;
  alignas(64) std::uint8_t tile[owl::kPanelScratch];
  std::vector<float> sums(owl::in_row_tiles(rows) * step * owl::kGroupRows);
  for (std::size_t g = begin; g < end; g += step) {
    const std::size_t groups = std::min(step, end - g);
    if (many)
      kernels.panel(w, g, groups, layout, prepared, rows, tile, sums.data(),
                    step * owl::kGroupRows);
    else if (rows > 1)
      owl::few_in_passes(kernels, w, g, g + groups, layout, prepared, rows, sums.data(),
                         step * owl::kGroupRows);
    else
      kernels.matvec(w, g, g + groups, layout, prepared, sums.data());
  }
}

constexpr const char* kNoThreads = "there are no threads";

// Whether activations prepared for one weight serve the other.
bool take_the_same_rows(const owl::PackedMatrix& a, const owl::PackedMatrix& b) {
  return a.type == b.type && a.storage == b.storage && a.cols == b.cols;
}

// Kernels that note who multiplies, over others, and a pool of two threads of which the second
// comes late: when the first is within its product, which then waits for it. One at a time.
class LateThread {
 public:
  explicit LateThread(const owl::Kernels& kernels) : lock_(busy_) {
    real_ = &kernels;
    begun_ = found_work_ = false;
    ended_ = true;  // until there are two
    first_ = std::this_thread::get_id();
  }

  // A copy of the others, but for the products of a few rows.
  static owl::Kernels kernels() {
    owl::Kernels watched = *real_;
    watched.matvec = [](const owl::PackedMatrix& w, std::size_t begin, std::size_t end,
                        const owl::ActivationLayout& layout, const std::uint8_t* row, float* sums) {
      note();
      real_->matvec(w, begin, end, layout, row, sums);
    };
    watched.few = [](const owl::PackedMatrix& w, std::size_t begin, std::size_t end,
                     const owl::ActivationLayout& layout, const std::uint8_t* rows,
                     std::size_t count, float* sums, std::size_t stride) {
      note();
      real_->few(w, begin, end, layout, rows, count, sums, stride);
    };
    return watched;
  }

  static void run(void*, std::size_t, void (*task)(void*, std::size_t), void* argument) {
    ended_ = false;
    owl::Joined late;
    late.threads.emplace_back([=] {
      wait_for(begun_);
      task(argument, 1);
      ended_ = true;
    });
    task(argument, 0);
    begun_ = true;  // or the late one would wait for ever, were there no product
  }

  bool worked() const { return found_work_; }

 private:
  static void wait_for(const std::atomic<bool>& sign) {
    while (!sign) std::this_thread::yield();
  }
  static void note() {
    if (std::this_thread::get_id() != first_) {
      found_work_ = ended_ = true;
    } else {
      begun_ = true;
      wait_for(ended_);
    }
  }

  static inline std::mutex busy_;
  static inline const owl::Kernels* real_ = nullptr;
  static inline std::thread::id first_;
  static inline std::atomic<bool> begun_, ended_, found_work_;
  std::lock_guard<std::mutex> lock_;
};

}  // namespace

// Whether a thread that comes when another is within the product of x [rows, cols], at most
// kFewRows of them, with a packed weight, still finds something to do: found 0 or 1.
OWL_EXPORT int owl_late_thread_works(const void* packed, std::size_t size, std::size_t rows,
                                     int* found) {
  return owl_c::guarded([&] {
    const owl::Kernels* kernels = owl_c::kernels_for(nullptr);
    if (kernels == nullptr) return 1;
    owl::Linear op;
    if (const auto wrong = owl::parse_packed(packed, size, &op.weight); !wrong.empty())
      return owl_c::fail(wrong);
    if (op.weight.storage == owl::Storage::kPlanes)
      return owl_c::fail("the late thread would wait for what follows the product");
    op.outputs = owl::linear_outputs(op.weight, op.epilogue);
    const std::vector<float> x(rows * op.weight.cols, 0.5F);
    std::vector<float> y(rows * op.outputs);
    LateThread late(*kernels);
    const owl::Kernels watched = LateThread::kernels();
    owl::Plan plan(watched);
    plan.add(op, x.data(), rows, y.data(), nullptr);
    plan.run({LateThread::run, nullptr, 2});
    *found = late.worked() ? 1 : 0;
    return 0;
  });
}

// Whether a session here lays a packed weight dense in memory: found 0 or 1.
OWL_EXPORT int owl_lies_dense(const char* isa, const void* packed, std::size_t size, int* found) {
  return owl_c::guarded([&] {
    const owl::Kernels* kernels = owl_c::kernels_for(isa);
    if (kernels == nullptr) return 1;
    owl::PackedMatrix weight;
    if (const auto wrong = owl::parse_packed(packed, size, &weight); !wrong.empty())
      return owl_c::fail(wrong);
    *found = owl::lies_dense(weight, *kernels) ? 1 : 0;
    return 0;
  });
}

// `rows` rows of activations times each of `count` packed weights, by the way of many rows if
// `many`, else by that of a few; seconds [repeat], one for each pass over all of them.
OWL_EXPORT int owl_time_matmul(const char* isa, const void* const* packed, const std::size_t* sizes,
                               std::size_t count, std::size_t rows, int many, std::size_t threads,
                               std::size_t repeat, double* seconds) {
  return owl_c::guarded([&] {
    const owl::Kernels* kernels = owl_c::kernels_for(isa);
    if (kernels == nullptr) return 1;
    if (rows == 0) return owl_c::fail("there are no rows");
    if (count == 0) return owl_c::fail("there are no weights");
    if (threads == 0) return owl_c::fail(kNoThreads);
    std::vector<owl::PackedMatrix> weights(count);
    for (std::size_t i = 0; i < count; ++i) {
      if (const auto wrong = owl::parse_packed(packed[i], sizes[i], &weights[i]); !wrong.empty())
        return owl_c::fail(wrong);
      if (!take_the_same_rows(weights[i], weights[0]))
        return owl_c::fail("the weights differ in their columns or values");
    }
    const owl::ActivationLayout layout = kernels->layout(weights[0], many != 0);
    std::vector<float> x(weights[0].cols, 0.5F);
    std::vector<std::uint8_t> storage(layout.stride * owl::in_row_tiles(rows) + 64);
    auto* prepared = storage.data() + (64 - reinterpret_cast<std::uintptr_t>(storage.data()) % 64);
    for (std::size_t m = 0; m < rows; ++m)
      kernels->prepare(weights[0], layout, x.data(), prepared + m * layout.stride);
    time_passes(threads, repeat, seconds, [&](std::size_t t) {
      for (const owl::PackedMatrix& w : weights)
        multiply(*kernels, w, w.groups * t / threads, w.groups * (t + 1) / threads, layout,
                 prepared, rows, many != 0);
    });
    return 0;
  });
}

// Reads [size] bytes once a pass: what memory gives to these threads.
OWL_EXPORT int owl_time_read(const void* data, std::size_t size, std::size_t threads,
                             std::size_t repeat, double* seconds) {
  static std::atomic<std::uint64_t> total{0};  // seen from outside: nothing is optimised away
  return owl_c::guarded([&] {
    if (threads == 0) return owl_c::fail(kNoThreads);
    time_passes(threads, repeat, seconds, [&](std::size_t t) {
      using Line = std::uint64_t __attribute__((vector_size(64), aligned(64)));
      const auto* begin = static_cast<const Line*>(data) + size / 64 * t / threads;
      const auto* end = static_cast<const Line*>(data) + size / 64 * (t + 1) / threads;
      Line sums[4] = {};
      for (const Line* p = begin; p + 4 <= end; p += 4) {
        for (int i = 0; i < 4; ++i) {
          __builtin_prefetch(p + i + 32);
          sums[i] += p[i];
        }
      }
      std::uint64_t sum = 0;
      for (const Line& line : sums)
        for (int i = 0; i < 8; ++i) sum += line[i];
      total += sum;
    });
    return 0;
  });
}
