// A small C interface to the kernels, for tests and kernel benchmarks: no ONNX Runtime needed,
// threads of its own.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "c_api.h"
#include "engine.h"
#include "threads.h"

using owl_c::fail;
using owl_c::kernels_for;

namespace {

thread_local std::string last_error;

// Starts its threads anew for each call.
void run_threads(void* context, std::size_t count, void (*task)(void*, std::size_t),
                 void* argument) {
  const std::size_t threads = *static_cast<std::size_t*>(context);
  std::atomic<std::size_t> next{0};
  auto work = [&] {
    for (std::size_t i = next++; i < count; i = next++) task(argument, i);
  };
  owl::on_threads(std::min(threads, count), work);
}

}  // namespace

int owl_c::fail(const std::string& message) {
  last_error = message;
  return 1;
}

const owl::Kernels* owl_c::kernels_for(const char* isa) {
  try {
    return isa == nullptr || *isa == '\0' ? &owl::best_kernels()
                                          : &owl::kernels_named(isa, "the instruction set");
  } catch (const std::invalid_argument& e) {
    fail(e.what());
    return nullptr;
  }
}

OWL_EXPORT const char* owl_last_error() { return last_error.c_str(); }

// Null, and owl_last_error(), where OWL_ISA asks for what cannot be had.
OWL_EXPORT const char* owl_best_isa() {
  const owl::Kernels* kernels = kernels_for(nullptr);
  return kernels == nullptr ? nullptr : kernels->name;
}

// The i-th instruction set built in, best first, or null after the last.
OWL_EXPORT const char* owl_isa_name(std::size_t i) { return owl::kernel_name(i); }
OWL_EXPORT int owl_isa_supported(const char* isa) { return owl::find_kernels(isa) != nullptr; }

OWL_EXPORT int owl_check_packed(const void* packed, std::size_t size) {
  return owl_c::guarded([&] {
    owl::PackedMatrix matrix;
    const std::string wrong = owl::parse_packed(packed, size, &matrix);
    return wrong.empty() ? 0 : fail(wrong);
  });
}

// x [rows, cols] -> y [rows, outputs]. bias, skip, gamma and sum may be null. 0, or 1 and
// owl_last_error().
OWL_EXPORT int owl_matmul(const char* isa, const void* packed, std::size_t size, const float* x,
                          std::size_t rows, float* y, std::size_t threads, int epilogue,
                          const float* bias, const float* skip, const float* gamma, float epsilon,
                          float* sum) {
  return owl_c::guarded([&] {
    const owl::Kernels* kernels = kernels_for(isa);
    if (kernels == nullptr) return 1;
    owl::Linear op;
    std::string wrong = owl::parse_packed(packed, size, &op.weight);
    if (!wrong.empty()) return fail(wrong);
    op.epilogue = static_cast<owl::Epilogue>(epilogue);
    op.outputs = owl::linear_outputs(op.weight, op.epilogue);
    wrong = owl::what_is_wrong(op);
    if (!wrong.empty()) return fail(wrong);
    if (gamma == nullptr && (skip != nullptr || sum != nullptr))
      return fail("skip and sum need gamma");
    op.bias = bias;
    op.skip = skip;
    op.gamma = gamma;
    op.epsilon = epsilon;
    owl::Plan plan(*kernels);
    plan.add(op, x, rows, y, sum);
    plan.run({run_threads, &threads, threads});
    return 0;
  });
}

OWL_EXPORT int owl_gather(const void* packed, std::size_t size, std::size_t row, float* out) {
  return owl_c::guarded([&] {
    owl::PackedMatrix matrix;
    const std::string wrong = owl::parse_packed(packed, size, &matrix);
    if (!wrong.empty()) return fail(wrong);
    if (matrix.sparse()) return fail("rows are taken of dense matrices");
    if (row >= matrix.rows) return fail("no such row");
    owl::gather_row(matrix, row, out);
    return 0;
  });
}

// One sequence: qkv [length, (heads + 2 * kv_heads) * head_size], cache [kv_heads, capacity,
// head_size] updated in place, rotary tables [capacity, head_size / 2] or null, out [length, heads
// * head_size].
OWL_EXPORT int owl_attention(const char* isa, const float* qkv, std::size_t length,
                             std::size_t past, std::size_t heads, std::size_t kv_heads,
                             std::size_t head_size, std::size_t capacity, int half_cache,
                             void* keys, void* values, const float* cosines, const float* sines,
                             float scale, float softcap, std::size_t window, std::size_t threads,
                             float* out) {
  owl::Attention op;
  op.heads = heads;
  op.kv_heads = kv_heads;
  op.head_size = head_size;
  op.scale = scale;
  op.softcap = softcap;
  op.window = window;
  op.rotary = cosines != nullptr;
  op.rotary_size = head_size;
  op.cosines = cosines;
  op.sines = sines;
  op.cache = half_cache != 0 ? owl::CacheType::kFp16 : owl::CacheType::kFp32;
  op.capacity = capacity;
  const std::size_t stride = (heads + 2 * kv_heads) * head_size;
  const owl::AttentionRun run{qkv,
                              qkv + heads * head_size,
                              qkv + (heads + kv_heads) * head_size,
                              stride,
                              stride,
                              length,
                              past,
                              keys,
                              values,
                              out};
  return owl_c::guarded([&] {
    const owl::Kernels* kernels = kernels_for(isa);
    if (kernels == nullptr) return 1;
    const std::string wrong = owl::what_is_wrong(op);
    if (!wrong.empty()) return fail(wrong);
    if (!owl::head_size_is_sound(head_size) || length > capacity || past > capacity - length)
      return fail("unsupported shape");
    if ((cosines == nullptr) != (sines == nullptr)) return fail("a rotary table is missing");
    owl::Plan plan(*kernels);
    plan.add(op, {run});
    plan.run({run_threads, &threads, threads});
    return 0;
  });
}
