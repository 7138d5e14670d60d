// The operators of domain ai.owl, for ONNX Runtime: reading attributes and tensors, checking them, and calling the engine.
//
//   SparseMatMul(X, W, [bias], [skip], [gamma]) -> Y, [sum]   attributes epilogue, columns, epsilon
//   PackedGather(ids, W) -> X                                 rows of a dense packed weight
//   CachedAttention(q, [k], [v], past_key, past_value, seqlens_k, total_length, [cos], [sin]) -> Y, key, value
//
// Only the C API of the header's version is used, so the library runs with every later ONNX Runtime.
#define ORT_API_MANUAL_INIT
#include <onnxruntime/onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "engine.h"

namespace {

[[noreturn]] void reject(const std::string& message) {
  throw Ort::Exception("ai.owl: " + message, ORT_INVALID_ARGUMENT);
}

void require(bool condition, const char* message) {
  if (!condition) reject(message);
}

std::size_t extent(std::int64_t n) {
  require(n >= 0, "negative dimension");
  return static_cast<std::size_t>(n);
}

// The session's own threads.
void run_session_threads(void* context, std::size_t count, void (*task)(void*, std::size_t), void* argument) {
  Ort::KernelContext(static_cast<OrtKernelContext*>(context)).ParallelFor(task, count, 0, argument);
}

owl::Pool session_pool(OrtKernelContext* context) { return {run_session_threads, context}; }

// The packed weight at input `index`, which must be a constant of the model. It is validated here, once.
owl::PackedMatrix constant_weight(const Ort::ConstKernelInfo& info, std::size_t index) {
  int constant = 0;
  const Ort::ConstValue value = info.GetTensorConstantInput(index, &constant);
  require(constant != 0 && value, "the packed weight must be an initializer of the model");
  const auto shape = value.GetTensorTypeAndShapeInfo();
  require(shape.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, "the packed weight must be uint8");
  owl::PackedMatrix matrix;
  const std::string wrong = owl::parse_packed(value.GetTensorRawData(), shape.GetElementCount(), &matrix);
  if (!wrong.empty()) reject("packed weight: " + wrong);
  return matrix;
}

owl::Epilogue epilogue_named(const std::string& name) {
  if (name.empty() || name == "none") return owl::Epilogue::kNone;
  if (name == "silu_mul") return owl::Epilogue::kSiluMul;
  if (name == "gelu_mul") return owl::Epilogue::kGeluMul;
  reject("unknown epilogue '" + name + "'");
}

// A float input of exactly `size` elements, or null when it is left out.
const float* optional_floats(const Ort::KernelContext& context, std::size_t index, std::size_t size, const char* what) {
  if (index >= context.GetInputCount()) return nullptr;
  const Ort::ConstValue value = context.GetInput(index);
  if (!value) return nullptr;
  if (value.GetTensorTypeAndShapeInfo().GetElementCount() != size) reject(std::string(what) + " has the wrong size");
  return value.GetTensorData<float>();
}

template <class T>
T attribute_or(const Ort::ConstKernelInfo& info, const char* name, T fallback) {
  try {
    return info.GetAttribute<T>(name);
  } catch (const Ort::Exception&) {
    return fallback;
  }
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

template <class Op, class Kernel>
struct Operator : Ort::CustomOpBase<Op, Kernel, true> {
  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return guarded([&] { *kernel = new Kernel(Ort::ConstKernelInfo(info)); });
  }
};

// ---- SparseMatMul ----------------------------------------------------------------------------------------

class SparseMatMulKernel {
 public:
  explicit SparseMatMulKernel(const Ort::ConstKernelInfo& info) {
    op_.weight = constant_weight(info, 1);
    op_.epilogue = epilogue_named(attribute_or<std::string>(info, "epilogue", ""));
    op_.epsilon = attribute_or<float>(info, "epsilon", 0.0F);
    const std::size_t most = owl::linear_outputs(op_.weight, op_.epilogue);
    op_.outputs = extent(attribute_or<std::int64_t>(info, "columns", static_cast<std::int64_t>(most)));
    require(op_.outputs > 0 && op_.outputs <= most, "columns must lie between 1 and what the weight has");
    if (op_.epilogue != owl::Epilogue::kNone)
      require(op_.weight.groups % 2 == 0, "a gated weight needs an even number of row groups");
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&] { compute(raw); });
  }

 private:
  void compute(OrtKernelContext* raw) {
    Ort::KernelContext context(raw);
    const Ort::ConstValue x = context.GetInput(0);
    std::vector<std::int64_t> shape = x.GetTensorTypeAndShapeInfo().GetShape();
    const std::size_t cols = op_.weight.cols;
    require(!shape.empty() && extent(shape.back()) == cols, "the input's last dimension differs from the weight's columns");
    std::size_t rows = 1;
    for (std::size_t i = 0; i + 1 < shape.size(); ++i) rows *= extent(shape[i]);

    owl::Linear op = op_;
    op.bias = optional_floats(context, 2, op.outputs, "bias");
    op.skip = optional_floats(context, 3, rows * cols, "skip");
    op.gamma = optional_floats(context, 4, cols, "gamma");
    require(op.skip == nullptr || op.gamma != nullptr, "skip needs gamma");
    float* sum = nullptr;
    if (context.GetOutputCount() > 1) {
      require(op.gamma != nullptr, "the second output needs gamma");
      sum = context.GetOutput(1, shape).GetTensorMutableData<float>();
    }
    shape.back() = static_cast<std::int64_t>(op.outputs);
    float* y = context.GetOutput(0, shape).GetTensorMutableData<float>();
    owl::run_linear(owl::best_kernels(), session_pool(raw), op, x.GetTensorData<float>(), rows, y, sum);
  }

  owl::Linear op_;
};

struct SparseMatMul : Operator<SparseMatMul, SparseMatMulKernel> {
  const char* GetName() const { return "SparseMatMul"; }
  std::size_t GetInputTypeCount() const { return 5; }
  ONNXTensorElementDataType GetInputType(std::size_t i) const {
    return i == 1 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(std::size_t i) const {
    return i < 2 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  }
  std::size_t GetOutputTypeCount() const { return 2; }
  ONNXTensorElementDataType GetOutputType(std::size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
  OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(std::size_t i) const {
    return i < 1 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  }
};

// ---- PackedGather ----------------------------------------------------------------------------------------

class PackedGatherKernel {
 public:
  explicit PackedGatherKernel(const Ort::ConstKernelInfo& info)
      : weight_(constant_weight(info, 1)), scale_(attribute_or<float>(info, "scale", 1.0F)) {
    require(!weight_.sparse, "PackedGather needs a weight without a mask");
  }
  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&] { compute(raw); });
  }

 private:
  void compute(OrtKernelContext* raw) {
    Ort::KernelContext context(raw);
    const Ort::ConstValue ids = context.GetInput(0);
    std::vector<std::int64_t> shape = ids.GetTensorTypeAndShapeInfo().GetShape();
    const std::size_t count = ids.GetTensorTypeAndShapeInfo().GetElementCount();
    const auto* id = ids.GetTensorData<std::int64_t>();
    shape.push_back(static_cast<std::int64_t>(weight_.cols));
    float* out = context.GetOutput(0, shape).GetTensorMutableData<float>();
    for (std::size_t i = 0; i < count; ++i) {
      require(id[i] >= 0 && extent(id[i]) < weight_.rows, "a token id lies outside the vocabulary");
      float* row = out + i * weight_.cols;
      owl::gather_row(weight_, extent(id[i]), row);
      if (scale_ != 1.0F)
        for (std::size_t c = 0; c < weight_.cols; ++c) row[c] *= scale_;
    }
  }

  owl::PackedMatrix weight_;
  float scale_;
};

struct PackedGather : Operator<PackedGather, PackedGatherKernel> {
  const char* GetName() const { return "PackedGather"; }
  std::size_t GetInputTypeCount() const { return 2; }
  ONNXTensorElementDataType GetInputType(std::size_t i) const {
    return i == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  }
  std::size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(std::size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
};

// ---- CachedAttention -------------------------------------------------------------------------------------

class CachedAttentionKernel {
 public:
  explicit CachedAttentionKernel(const Ort::ConstKernelInfo& info) {
    op_.heads = extent(info.GetAttribute<std::int64_t>("num_heads"));
    op_.kv_heads = extent(info.GetAttribute<std::int64_t>("kv_num_heads"));
    op_.scale = attribute_or<float>(info, "scale", 0.0F);
    op_.softcap = attribute_or<float>(info, "softcap", 0.0F);
    const auto window = attribute_or<std::int64_t>(info, "local_window_size", -1);
    op_.window = window > 0 ? extent(window) : 0;
    op_.rotary = attribute_or<std::int64_t>(info, "do_rotary", 0) != 0;
    op_.interleaved = attribute_or<std::int64_t>(info, "rotary_interleaved", 0) != 0;
    require(op_.heads > 0 && op_.kv_heads > 0 && op_.heads % op_.kv_heads == 0, "num_heads must be a multiple of kv_num_heads");
    require(op_.heads / op_.kv_heads <= owl::kMaxHeads, "too many query heads for each key head");
  }
  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&] { compute(raw); });
  }

 private:
  struct Shapes {
    std::size_t batch, length;
    bool packed;
  };

  // Checks everything that later becomes an address.
  Shapes read_shapes(const Ort::KernelContext& context, owl::Attention& op) const {
    const auto q = context.GetInput(0).GetTensorTypeAndShapeInfo().GetShape();
    const auto cache_info = context.GetInput(3).GetTensorTypeAndShapeInfo();
    const auto cache = cache_info.GetShape();
    require(q.size() == 3 && cache.size() == 4, "queries are [batch, length, width], caches [batch, heads, positions, size]");
    const Ort::ConstValue k = context.GetInput(1);
    Shapes shapes{extent(q[0]), extent(q[1]), !k};
    op.head_size = extent(cache[3]);
    require(op.head_size % 16 == 0 && op.head_size > 0 && op.head_size <= owl::kMaxHeadSize,
            "the head size must be a multiple of 16, at most 256");
    require(extent(cache[0]) == shapes.batch && extent(cache[1]) == op.kv_heads, "the cache has the wrong shape");
    require(context.GetInput(4).GetTensorTypeAndShapeInfo().GetShape() == cache, "the caches differ in shape");
    const std::size_t heads = shapes.packed ? op.heads + 2 * op.kv_heads : op.heads;
    require(extent(q[2]) == heads * op.head_size, "the queries have the wrong width");
    if (!shapes.packed) {
      const std::vector<std::int64_t> expected{q[0], q[1], static_cast<std::int64_t>(op.kv_heads * op.head_size)};
      require(k.GetTensorTypeAndShapeInfo().GetShape() == expected, "the keys have the wrong shape");
      const Ort::ConstValue v = context.GetInput(2);
      require(v && v.GetTensorTypeAndShapeInfo().GetShape() == expected, "the values have the wrong shape");
    }
    op.cache = cache_info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? owl::CacheType::kFp16
                                                                                   : owl::CacheType::kFp32;
    if (op.scale == 0.0F) op.scale = 1.0F / std::sqrt(static_cast<float>(op.head_size));
    return shapes;
  }

  // Returns the number of positions that the rotary tables hold.
  std::size_t read_tables(const Ort::KernelContext& context, owl::Attention& op) const {
    require(context.GetInputCount() > 8, "rotary embedding needs its tables");
    const Ort::ConstValue cosines = context.GetInput(7), sines = context.GetInput(8);
    require(cosines && sines, "rotary embedding needs its tables");
    const auto shape = cosines.GetTensorTypeAndShapeInfo().GetShape();
    require(shape.size() == 2 && sines.GetTensorTypeAndShapeInfo().GetShape() == shape, "the rotary tables differ in shape");
    op.rotary_size = 2 * extent(shape[1]);
    require(op.rotary_size <= op.head_size, "the rotary tables are wider than a head");
    op.cosines = cosines.GetTensorData<float>();
    op.sines = sines.GetTensorData<float>();
    return extent(shape[0]);
  }

  void compute(OrtKernelContext* raw) {
    Ort::KernelContext context(raw);
    owl::Attention op = op_;
    const Shapes shapes = read_shapes(context, op);
    const std::size_t table = op.rotary ? read_tables(context, op) : static_cast<std::size_t>(-1);
    const auto past_shape = context.GetInput(3).GetTensorTypeAndShapeInfo().GetShape();
    const std::size_t past_capacity = extent(past_shape[2]);
    const Ort::ConstValue lengths = context.GetInput(5);
    require(lengths.GetTensorTypeAndShapeInfo().GetElementCount() == shapes.batch, "seqlens_k has the wrong size");
    const auto* seqlens = lengths.GetTensorData<std::int32_t>();
    require(context.GetInput(6).GetTensorTypeAndShapeInfo().GetElementCount() == 1, "total_length must be one number");
    const std::size_t total = extent(context.GetInput(6).GetTensorData<std::int32_t>()[0]);
    op.capacity = std::max(past_capacity, total);

    const std::vector<std::int64_t> cache_shape{past_shape[0], past_shape[1], static_cast<std::int64_t>(op.capacity), past_shape[3]};
    const std::size_t width = op.heads * op.head_size;
    const std::vector<std::int64_t> out_shape{static_cast<std::int64_t>(shapes.batch), static_cast<std::int64_t>(shapes.length),
                                              static_cast<std::int64_t>(width)};
    float* out = context.GetOutput(0, out_shape).GetTensorMutableData<float>();
    void* keys = context.GetOutput(1, cache_shape).GetTensorMutableRawData();
    void* values = context.GetOutput(2, cache_shape).GetTensorMutableRawData();
    const auto* q = context.GetInput(0).GetTensorData<float>();
    const std::size_t kv_width = op.kv_heads * op.head_size;
    const std::size_t stride = shapes.packed ? width + 2 * kv_width : width;
    const float* k = shapes.packed ? q + width : context.GetInput(1).GetTensorData<float>();
    const float* v = shapes.packed ? q + width + kv_width : context.GetInput(2).GetTensorData<float>();
    const std::size_t kv_stride = shapes.packed ? stride : kv_width;

    const std::size_t bytes = op.head_size * (op.cache == owl::CacheType::kFp16 ? 2 : 4);
    const std::size_t sequence_bytes = op.kv_heads * op.capacity * bytes;
    for (std::size_t b = 0; b < shapes.batch; ++b) {
      // seqlens_k is each sequence's length less one; a first prompt may be padded on its right.
      const std::size_t known = extent(seqlens[b]) + 1;
      const std::size_t past = total == shapes.length || known < shapes.length ? 0 : known - shapes.length;
      require(past + shapes.length <= op.capacity && past <= past_capacity, "seqlens_k runs past the cache");
      require(past + shapes.length <= table, "the rotary tables hold too few positions");
      auto* own_keys = static_cast<std::uint8_t*>(keys) + b * sequence_bytes;
      auto* own_values = static_cast<std::uint8_t*>(values) + b * sequence_bytes;
      copy_past(context, 3, b, past, past_capacity, op, bytes, own_keys);
      copy_past(context, 4, b, past, past_capacity, op, bytes, own_values);
      const owl::AttentionInput input{q + b * shapes.length * stride, k + b * shapes.length * kv_stride,
                                      v + b * shapes.length * kv_stride, stride, kv_stride,
                                      shapes.length, past, own_keys, own_values};
      owl::run_attention(owl::best_kernels(), session_pool(raw), op, input, out + b * shapes.length * width);
    }
  }

  // Nothing to do when the runtime gives one buffer for past and present, as onnxruntime-genai does.
  static void copy_past(const Ort::KernelContext& context, std::size_t index, std::size_t b, std::size_t past,
                        std::size_t past_capacity, const owl::Attention& op, std::size_t bytes, std::uint8_t* to) {
    const auto* from = static_cast<const std::uint8_t*>(context.GetInput(index).GetTensorRawData()) +
                       b * op.kv_heads * past_capacity * bytes;
    if (from == to || past == 0) return;
    for (std::size_t h = 0; h < op.kv_heads; ++h)
      std::memcpy(to + h * op.capacity * bytes, from + h * past_capacity * bytes, past * bytes);
  }

  owl::Attention op_;
};

// Once for each type of cache: ONNX Runtime chooses by the types it finds in the graph.
template <ONNXTensorElementDataType CacheElement>
struct CachedAttention : Operator<CachedAttention<CacheElement>, CachedAttentionKernel> {
  const char* GetName() const { return "CachedAttention"; }
  std::size_t GetInputTypeCount() const { return 9; }
  ONNXTensorElementDataType GetInputType(std::size_t i) const {
    if (i == 3 || i == 4) return CacheElement;
    return i == 5 || i == 6 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(std::size_t i) const {
    return i == 1 || i == 2 || i > 6 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  }
  std::size_t GetOutputTypeCount() const { return 3; }
  ONNXTensorElementDataType GetOutputType(std::size_t i) const {
    return i == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : CacheElement;
  }
};
using CachedAttentionFp32 = CachedAttention<ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT>;
using CachedAttentionFp16 = CachedAttention<ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16>;

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                              const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr)  // version 1 has had CreateStatus since the first release
    return base->GetApi(1)->CreateStatus(ORT_FAIL, "ai.owl needs a newer ONNX Runtime");
  Ort::InitApi(api);
  static const SparseMatMul matmul;
  static const PackedGather gather;
  static const CachedAttentionFp32 attention_fp32;
  static const CachedAttentionFp16 attention_fp16;
  try {
    static Ort::CustomOpDomain domain = [] {
      Ort::CustomOpDomain d("ai.owl");
      d.Add(&matmul);
      d.Add(&gather);
      d.Add(&attention_fp32);
      d.Add(&attention_fp16);
      return d;
    }();
    Ort::UnownedSessionOptions(options).Add(domain);
  } catch (const Ort::Exception& e) {
    return api->CreateStatus(e.GetOrtErrorCode(), e.what());
  }
  return nullptr;
}
