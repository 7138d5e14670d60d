// The operators of domain ai.owl, for ONNX Runtime: reading attributes and tensors, checking them,
// and calling the engine.
//
//   SparseMatMul(X, W, [bias], [skip], [gamma]) -> Y, [sum]   attributes epilogue, columns, epsilon
//   PackedGather(ids, W) -> X                                 rows of a dense packed weight
//   CachedAttention(q, [k], [v], past_key, past_value, seqlens_k, total_length, [cos], [sin],
//   [attention_mask])
//     -> Y, key, value                                        padding, where there is a mask, takes
//     no room in the cache
//   ProgramFp16, ProgramFp32(any ...) -> [Y] x 4, caches ...  several of these in one go: see
//   program.cpp
//
// Only the C API of the header's version is used, so the library runs with every later ONNX
// Runtime.
#include "ops.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

using namespace owl_ops;  // NOLINT: this file defines what those helpers are for

namespace {

// A float input of exactly `size` elements, or null when it is left out.
const float* optional_floats(const Ort::KernelContext& context, std::size_t index, std::size_t size,
                             const char* what) {
  const Ort::ConstValue value = context.GetInput(index);
  if (!value) return nullptr;
  if (value.GetTensorTypeAndShapeInfo().GetElementCount() != size)
    reject(std::string(what) + " has the wrong size");
  return value.GetTensorData<float>();
}

// ---- SparseMatMul ------------------------------------------------------------------------------

class SparseMatMulKernel {
 public:
  explicit SparseMatMulKernel(const Ort::ConstKernelInfo& info) {
    op_.weight = constant_weight(info, 1);
    op_.epilogue = epilogue_named(attribute_or<std::string>(info, "epilogue", ""));
    op_.epsilon = attribute_or<float>(info, "epsilon", 0.0F);
    const std::size_t most = owl::linear_outputs(op_.weight, op_.epilogue);
    op_.outputs =
        extent(attribute_or<std::int64_t>(info, "columns", static_cast<std::int64_t>(most)));
    check(op_);
    writes_sum_ = has_output(info, 1);
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&] { compute(raw); });
  }

 private:
  void compute(OrtKernelContext* raw) {
    Ort::KernelContext context(raw);
    const Ort::ConstValue x = needed_input(context, 0);
    std::vector<std::int64_t> shape = x.GetTensorTypeAndShapeInfo().GetShape();
    const std::size_t cols = op_.weight.cols;
    require(!shape.empty() && extent(shape.back()) == cols,
            "the input's last dimension differs from the weight's columns");
    std::size_t rows = 1;
    for (std::size_t i = 0; i + 1 < shape.size(); ++i) rows *= extent(shape[i]);

    owl::Linear op = op_;
    op.bias = optional_floats(context, 2, op.outputs, "bias");
    op.skip = optional_floats(context, 3, rows * cols, "skip");
    op.gamma = optional_floats(context, 4, cols, "gamma");
    require(op.skip == nullptr || op.gamma != nullptr, "skip needs gamma");
    float* sum = nullptr;
    if (writes_sum_) {
      require(op.gamma != nullptr, "the second output needs gamma");
      sum = needed_output(context, 1, shape).GetTensorMutableData<float>();
    }
    shape.back() = static_cast<std::int64_t>(op.outputs);
    auto* y = needed_output(context, 0, shape).GetTensorMutableData<float>();
    owl::Plan plan(owl::best_kernels());
    plan.add(op, x.GetTensorData<float>(), rows, y, sum);
    plan.run(session_pool(raw));
  }

  owl::Linear op_;
  bool writes_sum_ = false;
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
  ONNXTensorElementDataType GetOutputType(std::size_t) const {
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(std::size_t i) const {
    return i < 1 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  }
};

// ---- PackedGather ------------------------------------------------------------------------------

class PackedGatherKernel {
 public:
  explicit PackedGatherKernel(const Ort::ConstKernelInfo& info)
      : weight_(constant_weight(info, 1)) {
    require(!weight_.sparse(), "PackedGather needs a weight without a mask");
  }
  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&] { compute(raw); });
  }

 private:
  void compute(OrtKernelContext* raw) {
    Ort::KernelContext context(raw);
    const Ort::ConstValue ids = needed_input(context, 0);
    std::vector<std::int64_t> shape = ids.GetTensorTypeAndShapeInfo().GetShape();
    const std::size_t count = ids.GetTensorTypeAndShapeInfo().GetElementCount();
    const auto* id = ids.GetTensorData<std::int64_t>();
    shape.push_back(static_cast<std::int64_t>(weight_.cols));
    auto* out = needed_output(context, 0, shape).GetTensorMutableData<float>();
    for (std::size_t i = 0; i < count; ++i) {
      require(id[i] >= 0 && extent(id[i]) < weight_.rows, "a token id lies outside the vocabulary");
      owl::gather_row(weight_, extent(id[i]), out + i * weight_.cols);
    }
  }

  owl::PackedMatrix weight_;
};

struct PackedGather : Operator<PackedGather, PackedGatherKernel> {
  const char* GetName() const { return "PackedGather"; }
  std::size_t GetInputTypeCount() const { return 2; }
  ONNXTensorElementDataType GetInputType(std::size_t i) const {
    return i == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  }
  std::size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(std::size_t) const {
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
};

// ---- CachedAttention ---------------------------------------------------------------------------

class CachedAttentionKernel {
 public:
  explicit CachedAttentionKernel(const Ort::ConstKernelInfo& info) {
    owl::Attention& op = node_.op;
    op.heads = extent(info.GetAttribute<std::int64_t>("num_heads"));
    op.kv_heads = extent(info.GetAttribute<std::int64_t>("kv_num_heads"));
    op.scale = attribute_or<float>(info, "scale", 0.0F);
    op.softcap = attribute_or<float>(info, "softcap", 0.0F);
    const auto window = attribute_or<std::int64_t>(info, "local_window_size", -1);
    op.window = window > 0 ? extent(window) : 0;
    op.rotary = attribute_or<std::int64_t>(info, "do_rotary", 0) != 0;
    op.interleaved = attribute_or<std::int64_t>(info, "rotary_interleaved", 0) != 0;
    check(node_.op);
  }
  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&] { compute(raw); });
  }

 private:
  void compute(OrtKernelContext* raw) {
    Ort::KernelContext context(raw);
    const Ort::ConstValue q = needed_input(context, 0);
    const auto shape = q.GetTensorTypeAndShapeInfo().GetShape();
    require(shape.size() == 3, "queries are [batch, length, width]");
    AttentionTensors t;
    t.q = q.GetTensorData<float>();
    t.batch = extent(shape[0]);
    t.length = extent(shape[1]);
    t.q_width = extent(shape[2]);
    t.past_key = needed_input(context, 3);
    t.past_value = needed_input(context, 4);
    t.seqlens = needed_input(context, 5);
    t.total = needed_input(context, 6);
    t.cosines = context.GetInput(7);
    t.sines = context.GetInput(8);
    t.mask = context.GetInput(9);
    const Ort::ConstValue k = context.GetInput(1), v = context.GetInput(2);
    require(static_cast<bool>(k) == static_cast<bool>(v), "keys come with values");
    if (k) {
      const auto expected = k.GetTensorTypeAndShapeInfo().GetShape();
      require(expected.size() == 3 && expected[0] == shape[0] && expected[1] == shape[1],
              "the keys have the wrong shape");
      require(v.GetTensorTypeAndShapeInfo().GetShape() == expected,
              "the values have the wrong shape");
      t.kv_width = extent(expected[2]);
      t.k = k.GetTensorData<float>();
      t.v = v.GetTensorData<float>();
    }
    owl::Plan plan(owl::best_kernels());
    node_.add_to(
        plan, t,
        [&](std::size_t width) {
          const std::vector<std::int64_t> out{shape[0], shape[1], static_cast<std::int64_t>(width)};
          return needed_output(context, 0, out).GetTensorMutableData<float>();
        },
        [&](std::size_t which, const std::vector<std::int64_t>& dimensions) {
          return needed_output(context, 1 + which, dimensions).GetTensorMutableRawData();
        });
    plan.run(session_pool(raw));
  }

  AttentionNode node_;
};

// Once for each type of cache: ONNX Runtime chooses by the types it finds in the graph.
template <ONNXTensorElementDataType CacheElement>
struct CachedAttention : Operator<CachedAttention<CacheElement>, CachedAttentionKernel> {
  const char* GetName() const { return "CachedAttention"; }
  std::size_t GetInputTypeCount() const { return 10; }
  ONNXTensorElementDataType GetInputType(std::size_t i) const {
    if (i == 3 || i == 4) return CacheElement;
    if (i == 9) return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    return i == 5 || i == 6 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32
                            : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
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

Ort::CustomOpDomain make_domain(bool last_logits) {
  static const SparseMatMul matmul;
  static const PackedGather gather;
  static const CachedAttentionFp32 attention_fp32;
  static const CachedAttentionFp16 attention_fp16;
  Ort::CustomOpDomain domain("ai.owl");
  domain.Add(&matmul);
  domain.Add(&gather);
  domain.Add(&attention_fp32);
  domain.Add(&attention_fp16);
  owl_ops::add_programs(domain, last_logits);
  return domain;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(
    OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr)  // version 1 has had CreateStatus since the first release
    return base->GetApi(1)->CreateStatus(ORT_FAIL, "ai.owl needs a newer ONNX Runtime");
  Ort::InitApi(api);
  try {
    owl::best_kernels();  // to refuse a wrong OWL_ISA now, with a sentence
    static Ort::CustomOpDomain all = make_domain(false), last = make_domain(true);
    Ort::UnownedSessionOptions session(options);
    session.Add(session.GetConfigEntryOrDefault(owl_ops::kLastLogits, "0") == "1" ? last : all);
  } catch (const Ort::Exception& e) {
    return api->CreateStatus(e.GetOrtErrorCode(), e.what());
  } catch (const std::invalid_argument& e) {
    return api->CreateStatus(ORT_INVALID_ARGUMENT, e.what());
  } catch (const std::exception& e) {
    return api->CreateStatus(ORT_FAIL, e.what());
  }
  return nullptr;
}
