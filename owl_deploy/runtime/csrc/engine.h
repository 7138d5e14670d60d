// The operators' work, without ONNX Runtime: how it is cut into tasks, and in which order results
// are joined. Each output is computed by one task whose sums do not depend on how tasks are shared
// out, so results do not depend on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"

namespace owl {

// Someone else's threads: calls task(argument, i) for each i < count, in any order, and waits.
struct Pool {
  void (*run)(void* context, std::size_t count, void (*task)(void*, std::size_t), void* argument);
  void* context;
  std::size_t threads;  // that are likely to take part; a guess only makes shares of another size
};

// y = epilogue(norm(x + skip) * W^T + bias); everything but x, W and y is optional. With a weight
// in planes, which takes no epilogue, and at most kFewRows rows of x, outputs far below the largest
// of their row are left as the upper bits give them: see kScreenMargin.
struct Linear {
  PackedMatrix weight;
  Epilogue epilogue = Epilogue::kNone;
  std::size_t outputs = 0;       // columns of y; half of the weight's rows with a gated epilogue
  const float* bias = nullptr;   // [outputs]
  const float* skip = nullptr;   // [rows, weight.cols]
  const float* gamma = nullptr;  // [weight.cols]; null: no normalisation
  float epsilon = 0.0F;
};

// Columns of y that a weight yields under an epilogue.
std::size_t linear_outputs(const PackedMatrix& weight, Epilogue epilogue);

// What keeps a layer, but for the sizes of its vectors, from being computed; "" if nothing does.
std::string what_is_wrong(const Linear& op);

// How far below the largest output another one of a weight in planes may lie and still be computed
// from all 8 bits. As logits: down to e^-12, 6e-6, of the likeliest token's probability.
// benchmarks/decode_quality.py shows what that loses; 10 would add more to the Kullback-Leibler
// divergence than all other rounding and save 2 % of a token's time.
constexpr float kScreenMargin = 12.0F;
// About so many of them at most, 1 of 8: rows read here and there cost some three times as much as
// rows read in order, and where more than these are near, the model is sure of none of them.
constexpr std::size_t kScreenShare = 8;

// Row `row` of a weight that is not sparse -> out [weight.cols].
void gather_row(const PackedMatrix& weight, std::size_t row, float* out);

struct Attention {
  std::size_t heads = 0, kv_heads = 0, head_size = 0;
  float scale = 0.0F, softcap = 0.0F;
  std::size_t window = 0;  // 0: the whole past is visible
  bool rotary = false, interleaved = false;
  std::size_t rotary_size = 0;     // dimensions that rotate; the tables hold half of it
  const float* cosines = nullptr;  // [positions, rotary_size / 2]
  const float* sines = nullptr;
  CacheType cache = CacheType::kFp32;
  std::size_t capacity = 0;  // positions that keys and values hold
};

// What keeps an attention, but for its head size, which operators learn from the cache, from being
// computed; "" if nothing does.
std::string what_is_wrong(const Attention& op);
bool head_size_is_sound(std::size_t head_size);

// New positions of one sequence. Queries, keys and values of `length` of them, the first at
// position `past`, are read at their strides; new keys and values are written into keys/values
// [kv_heads, capacity, head_size]. out [length, heads * head_size].
struct AttentionRun {
  const float* q;
  const float* k;
  const float* v;
  std::size_t q_stride, kv_stride;
  std::size_t length, past;
  void* keys;
  void* values;
  float* out;
};

// Steps that follow one another, run by the pool's threads in one go: waking threads for each step
// by itself takes as long as a small step. Each step is cut into phases of independent items; a
// thread takes items of the open phase, and whoever finishes the last one opens the next. A thread
// only ever waits for items that a running thread has taken, so any number of threads, one
// included, gets to the end.
class Plan {
 public:
  explicit Plan(const Kernels& kernels);
  ~Plan();

  // x [rows, weight.cols] -> y [rows, outputs]; sum [rows, weight.cols] gets x + skip unless null.
  void add(const Linear& op, const float* x, std::size_t rows, float* y, float* sum);
  // Runs of one sequence or of several, each sequence's in their order.
  void add(const Attention& op, const std::vector<AttentionRun>& runs);
  void clear(float* out, std::size_t floats);
  void run(const Pool& pool);

 private:
  class Steps;
  std::unique_ptr<Steps> steps_;
};

}  // namespace owl
