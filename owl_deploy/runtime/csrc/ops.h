// What the files that define operators share: checking, the session's threads, weights, and
// attention on tensors.
#pragma once

#define ORT_API_MANUAL_INIT
#include <onnxruntime/onnxruntime_cxx_api.h>

#include <string>
#include <vector>

#include "engine.h"
#include "threads.h"

namespace owl_ops {

[[noreturn]] inline void reject(const std::string& message) {
  throw Ort::Exception("ai.owl: " + message, ORT_INVALID_ARGUMENT);
}

inline void require(bool condition, const char* message) {
  if (!condition) reject(message);
}

inline std::size_t extent(std::int64_t n) {
  require(n >= 0, "negative dimension");
  return static_cast<std::size_t>(n);
}

// Whether a model connects input or output `index` of the node: an optional one may be left out, by
// an empty name.
inline bool has_input(const Ort::ConstKernelInfo& info, std::size_t index) {
  return index < info.GetInputCount() && !info.GetInputName(index).empty();
}
inline bool has_output(const Ort::ConstKernelInfo& info, std::size_t index) {
  return index < info.GetOutputCount() && !info.GetOutputName(index).empty();
}

// One run's tensors. What is left out is no tensor, and would be read and written through null.
inline Ort::ConstValue needed_input(const Ort::KernelContext& context, std::size_t index) {
  const Ort::ConstValue value = context.GetInput(index);
  require(value, "an input that the operator needs is left out");
  return value;
}
inline Ort::UnownedValue needed_output(const Ort::KernelContext& context, std::size_t index,
                                       const std::vector<std::int64_t>& shape) {
  const Ort::UnownedValue value = context.GetOutput(index, shape);
  require(value, "an output that the operator writes is left out");
  return value;
}

// The session's own threads.
inline void run_session_threads(void* context, std::size_t count, void (*task)(void*, std::size_t),
                                void* argument) {
  Ort::KernelContext(static_cast<OrtKernelContext*>(context)).ParallelFor(task, count, 0, argument);
}

inline owl::Pool session_pool(OrtKernelContext* context) {
  return {run_session_threads, context, owl::likely_session_threads()};
}

// The packed weight at input `index`, which must be a constant of the model. It is validated here,
// once.
inline owl::PackedMatrix constant_weight(const Ort::ConstKernelInfo& info, std::size_t index) {
  int constant = 0;
  const Ort::ConstValue value = info.GetTensorConstantInput(index, &constant);
  require(constant != 0 && value, "the packed weight must be an initializer of the model");
  const auto shape = value.GetTensorTypeAndShapeInfo();
  require(shape.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8,
          "the packed weight must be uint8");
  owl::PackedMatrix matrix;
  const std::string wrong =
      owl::parse_packed(value.GetTensorRawData(), shape.GetElementCount(), &matrix);
  if (!wrong.empty()) reject("packed weight: " + wrong);
  return matrix;
}

inline owl::Epilogue epilogue_named(const std::string& name) {
  if (name.empty() || name == "none") return owl::Epilogue::kNone;
  if (name == "silu_mul") return owl::Epilogue::kSiluMul;
  if (name == "gelu_mul") return owl::Epilogue::kGeluMul;
  reject("unknown epilogue '" + name + "'");
}

// Whether `read` finds what it reads.
template <class Read>
bool succeeds(Read read) {
  try {
    read();
    return true;
  } catch (const Ort::Exception&) {
    return false;
  }
}

// Whether a node has the attribute, of any type: the runtime answers alike, in words only, for one
// that is left out and for one of another type than asked for.
inline bool has_attribute(const Ort::ConstKernelInfo& info, const char* name) {
  return succeeds([&] { info.GetAttribute<std::int64_t>(name); }) ||
         succeeds([&] { info.GetAttribute<float>(name); }) ||
         succeeds([&] { info.GetAttribute<std::string>(name); }) ||
         succeeds([&] { info.GetAttributes<std::int64_t>(name); }) ||
         succeeds([&] { info.GetAttributes<float>(name); });
}

template <class T>
T attribute_or(const Ort::ConstKernelInfo& info, const char* name, T fallback) {
  T value = fallback;
  if (succeeds([&] { value = info.GetAttribute<T>(name); })) return value;
  if (has_attribute(info, name)) reject(std::string("attribute ") + name + " has the wrong type");
  return fallback;
}

// Runs `body`; an exception becomes a status, since none may cross into the runtime.
template <class Body>
OrtStatusPtr guarded(Body body) {
  try {
    body();
    return nullptr;
  } catch (const Ort::Exception& e) {
    return Ort::GetApi().CreateStatus(e.GetOrtErrorCode(), e.what());
  } catch (const std::exception& e) {
    return Ort::GetApi().CreateStatus(ORT_RUNTIME_EXCEPTION, e.what());
  }
}

// Of a linear layer or an attention: what the engine finds wrong.
template <class Op>
void check(const Op& op) {
  if (const std::string wrong = owl::what_is_wrong(op); !wrong.empty()) reject(wrong);
}

template <class Op, class Kernel>
struct Operator : Ort::CustomOpBase<Op, Kernel, true> {
  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return guarded([&] { *kernel = new Kernel(Ort::ConstKernelInfo(info)); });
  }
};

// ---- Attention on tensors ----------------------------------------------------------------------

struct AttentionTensors {
  const float* q = nullptr;  // [batch, length, heads * size]; with k and v behind them in
  const float *k = nullptr, *v = nullptr;  // each row when these are null
  std::size_t q_width = 0, kv_width = 0;
  std::size_t batch = 0, length = 0;
  Ort::ConstValue past_key, past_value, seqlens, total, cosines, sines;
  Ort::ConstValue mask;  // [batch, total_length], or null
};

// Attributes of CachedAttention; checks tensors and adds the work on them to a plan.
class AttentionNode {
 public:
  owl::Attention op;  // heads, kv_heads, scale, softcap, window, rotary and interleaved are set

  // `present(i, shape)` gives the memory of the new keys (0) and values (1); `out(width)` that of
  // the result.
  template <class Out, class Present>
  void add_to(owl::Plan& plan, const AttentionTensors& tensors, Out out, Present present) const;

 private:
  struct Cache {
    std::size_t past_capacity, total, table;
    const std::int32_t* seqlens;
    const std::int64_t* mask;
  };
  Cache read(const AttentionTensors& tensors, owl::Attention& attention) const;
  static const std::int64_t* read_mask(const AttentionTensors& tensors, std::size_t total);
  void add_sequences(owl::Plan& plan, const AttentionTensors& tensors,
                     const owl::Attention& attention, const Cache& cache, void* keys, void* values,
                     float* out) const;
};

template <class Out, class Present>
void AttentionNode::add_to(owl::Plan& plan, const AttentionTensors& tensors, Out out,
                           Present present) const {
  owl::Attention attention = op;
  const Cache cache = read(tensors, attention);
  const std::vector<std::int64_t> shape{static_cast<std::int64_t>(tensors.batch),
                                        static_cast<std::int64_t>(attention.kv_heads),
                                        static_cast<std::int64_t>(attention.capacity),
                                        static_cast<std::int64_t>(attention.head_size)};
  void* keys = present(0, shape);
  void* values = present(1, shape);
  add_sequences(plan, tensors, attention, cache, keys, values,
                out(attention.heads * attention.head_size));
}

// An entry of a session's configuration: 1 where nobody reads more of a prompt's logits than those
// of its last tokens, as onnxruntime-genai does. export/sparse.py writes it.
constexpr const char* kLastLogits = "ai.owl.last_logits";

// The operators that run others in one go, one for each type of cache.
void add_programs(Ort::CustomOpDomain& domain, bool last_logits);

}  // namespace owl_ops
