// One operator that runs a list of others: a decoder's SparseMatMul and CachedAttention nodes, from
// the first block to the logits. They give up their threads only at the end, where nodes by
// themselves would wake them 150 times a token.
//
// Attributes. `steps`: integers, one record after another (below); `numbers`: each record's floats,
// likewise; `slots`: the widths of the buffers between steps, which hold [batch, length, width]
// floats. A value is an integer, -1 if left out, else 4 * index + place: place 0 an input of the
// node, 1 a slot, 2 an output. Outputs 0 to 3 are float values that other nodes read, all later
// ones caches.
//   0, x, weight, bias, skip, gamma, y, sum, epilogue, columns                  numbers: epsilon
//   1, q, k, v, past_key, past_value, seqlens_k, total_length, cos, sin, y, present_key,
//   present_value,
//      num_heads, kv_num_heads, local_window_size, do_rotary, rotary_interleaved  numbers: scale,
//      softcap
//   2: as 1, with attention_mask behind sin
// `logits`, if given: the output that holds a head's logits, and with it `tokens` and `mask`: the
// inputs [batch, length] and [batch, total] of integers by which their rows are told apart. A
// session whose configuration has kLastLogits gets, of a prompt longer than kFewRows, only those of
// each sequence's last tokens, and of the last before a run of equal ones: the other rows of that
// output are neither computed nor written, so that their memory, 400 MB for 2048 tokens of a
// vocabulary of 49152, is never taken.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <unordered_map>
#include <variant>
#include <vector>

#include "dense.h"
#include "memory.h"
#include "ops.h"
#include "threads.h"

namespace owl_ops {
namespace {

constexpr std::size_t kFloatOutputs = 4;
constexpr std::int64_t kAbsent = -1;

struct Value {
  enum Place { kInput = 0, kSlot = 1, kOutput = 2 };
  bool present = false;
  Place place = kInput;
  std::size_t index = 0;

  bool same_as(const Value& other) const {
    return present && other.present && place == other.place && index == other.index;
  }
};

struct MatMulStep {
  owl::Linear op;
  Value x, bias, skip, gamma, y, sum;
};

struct AttentionStep {
  AttentionNode node;
  Value q, k, v, past_key, past_value, seqlens, total, cosines, sines, mask, y, present_key,
      present_value;
};

using Step = std::variant<MatMulStep, AttentionStep>;

const Value& input_of(const MatMulStep& step) { return step.x; }
const Value& input_of(const AttentionStep& step) { return step.q; }

// Reads the attributes' records; any wrong length or number is an error.
class Reader {
 public:
  explicit Reader(const Ort::ConstKernelInfo& info)
      : info_(info),
        integers_(info.GetAttributes<std::int64_t>("steps")),
        numbers_(info.GetAttributes<float>("numbers")) {}

  bool done() const { return at_ == integers_.size(); }
  void finish() const { require(number_at_ == numbers_.size(), "numbers are left over"); }

  Step step() {
    switch (integer()) {
      case 0: return matmul();
      case 1: return attention(false);
      case 2: return attention(true);
      default: reject("unknown kind of step");
    }
  }

 private:
  std::int64_t integer() {
    require(at_ < integers_.size(), "a step is cut off");
    return integers_[at_++];
  }
  float number() {
    require(number_at_ < numbers_.size(), "a step's numbers are missing");
    return numbers_[number_at_++];
  }
  Value value(bool required) {
    const std::int64_t code = integer();
    Value v;
    if (code == kAbsent) {
      require(!required, "a step lacks a value");
      return v;
    }
    require(code >= 0 && code % 4 < 3, "a value has an unknown place");
    v.present = true;
    v.place = static_cast<Value::Place>(code % 4);
    v.index = static_cast<std::size_t>(code / 4);
    return v;
  }

  MatMulStep matmul() {
    MatMulStep s;
    s.x = value(true);
    const Value weight = value(true);
    require(weight.place == Value::kInput && weight.index < info_.GetInputCount(),
            "a weight must be an input");
    s.op.weight = constant_weight(info_, weight.index);
    s.bias = value(false);
    s.skip = value(false);
    s.gamma = value(false);
    s.y = value(true);
    s.sum = value(false);
    const std::int64_t epilogue = integer();
    require(epilogue >= 0 && epilogue <= 2, "unknown epilogue");
    s.op.epilogue = static_cast<owl::Epilogue>(epilogue);
    s.op.outputs = extent(integer());
    s.op.epsilon = number();
    check(s.op);
    require(s.gamma.present || (!s.skip.present && !s.sum.present), "skip and sum need gamma");
    return s;
  }

  AttentionStep attention(bool has_mask) {
    AttentionStep s;
    for (Value* v :
         {&s.q, &s.k, &s.v, &s.past_key, &s.past_value, &s.seqlens, &s.total, &s.cosines, &s.sines})
      *v = value(v != &s.k && v != &s.v && v != &s.cosines && v != &s.sines);
    if (has_mask) s.mask = value(true);
    s.y = value(true);
    s.present_key = value(true);
    s.present_value = value(true);
    owl::Attention& op = s.node.op;
    op.heads = extent(integer());
    op.kv_heads = extent(integer());
    const std::int64_t window = integer();
    op.window = window > 0 ? extent(window) : 0;
    op.rotary = integer() != 0;
    op.interleaved = integer() != 0;
    op.scale = number();
    op.softcap = number();
    check(s.node.op);
    require(s.k.present == s.v.present, "keys come with values");
    for (const Value* v : {&s.past_key, &s.past_value, &s.seqlens, &s.total, &s.mask})
      require(v->place == Value::kInput, "caches, lengths and the mask must be inputs");
    for (const Value* v : {&s.cosines, &s.sines})
      require(v->place == Value::kInput, "rotary tables must be inputs");
    for (const Value* v : {&s.present_key, &s.present_value})
      require(v->place == Value::kOutput && v->index >= kFloatOutputs,
              "new caches must be outputs");
    return s;
  }

  const Ort::ConstKernelInfo& info_;
  std::vector<std::int64_t> integers_;
  std::vector<float> numbers_;
  std::size_t at_ = 0, number_at_ = 0;
};

// Buffers between steps: the calling thread's, kept from one run to the next unless they are large.
thread_local owl::Scratch slots;

// Every input and output exists and is connected, every slot and output is written before it is
// read, by one step, and no wider than it is.
class Flow {
 public:
  Flow(const Ort::ConstKernelInfo& info, const std::vector<std::size_t>& slot_widths)
      : slot_widths_(slot_widths),
        slot_written_(slot_widths.size()),
        output_written_(info.GetOutputCount()) {
    for (std::size_t i = 0; i < info.GetInputCount(); ++i) has_input_.push_back(has_input(info, i));
    for (std::size_t i = 0; i < info.GetOutputCount(); ++i)
      has_output_.push_back(has_output(info, i));
  }

  void check(const MatMulStep& s) {
    for (const Value* v : {&s.x, &s.bias, &s.skip, &s.gamma}) reads(*v);
    require(!s.y.same_as(s.sum), "a step writes two results to one place");
    writes(s.y, s.op.outputs);
    writes(s.sum, s.op.weight.cols);
  }

  void check(const AttentionStep& s) {
    for (const Value* v : {&s.q, &s.k, &s.v, &s.past_key, &s.past_value, &s.seqlens, &s.total,
                           &s.cosines, &s.sines, &s.mask})
      reads(*v);
    writes(s.y, 0);  // its width follows from the cache: checked at each run
    for (const Value* v : {&s.present_key, &s.present_value}) writes_output(*v);
  }

 private:
  void reads(const Value& v) const {
    if (!v.present) return;
    switch (v.place) {
      case Value::kInput:
        return require(v.index < has_input_.size() && has_input_[v.index],
                       "an input that a step reads is left out");
      case Value::kSlot:
        return require(v.index < slot_written_.size() && slot_written_[v.index],
                       "a slot is read before it is written");
      case Value::kOutput:
        return require(
            v.index < std::min(kFloatOutputs, output_written_.size()) && output_written_[v.index],
            "an output is read before it is written");
    }
  }

  void writes(const Value& v, std::size_t width) {
    if (!v.present) return;
    require(v.place != Value::kInput, "a step writes to an input");
    if (v.place == Value::kSlot) {
      require(v.index < slot_widths_.size() && width <= slot_widths_[v.index],
              "a slot is too narrow");
      slot_written_[v.index] = true;
    } else {
      require(v.index < kFloatOutputs, "activations go to the first outputs");
      writes_output(v);
    }
  }

  void writes_output(const Value& v) {
    require(v.index < has_output_.size() && has_output_[v.index],
            "an output that a step writes is left out");
    require(!output_written_[v.index], "an output is written twice");
    output_written_[v.index] = true;
  }

  std::vector<bool> has_input_, has_output_;  // whether the model connects them
  const std::vector<std::size_t>& slot_widths_;
  std::vector<bool> slot_written_, output_written_;
};

class ProgramKernel {
 public:
  ProgramKernel(const Ort::ConstKernelInfo& info, ONNXTensorElementDataType cache, bool last_logits)
      : cache_(cache),
        logits_(last_logits ? attribute_or<std::int64_t>(info, "logits", kAbsent) : kAbsent),
        tokens_(attribute_or<std::int64_t>(info, "tokens", kAbsent)),
        mask_(attribute_or<std::int64_t>(info, "mask", kAbsent)) {
    for (const std::int64_t input : {tokens_, mask_})
      require(input == kAbsent || extent(input) < info.GetInputCount(),
              "tokens and mask must be inputs");
    for (const std::int64_t width : info.GetAttributes<std::int64_t>("slots")) {
      require(width > 0 && width <= kMaxWidth, "a slot's width is out of range");
      slot_widths_.push_back((static_cast<std::size_t>(width) + 15) / 16 * 16);
    }
    Reader reader(info);
    while (!reader.done()) steps_.push_back(reader.step());
    reader.finish();
    require(!steps_.empty(), "there are no steps");
    Flow flow(info, slot_widths_);
    for (const Step& s : steps_) std::visit([&](const auto& step) { flow.check(step); }, s);
    copy_weights();
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&] { Call(*this, raw).compute(); });
  }

 private:
  static constexpr std::int64_t kMaxWidth = std::int64_t{1} << 28;
  static constexpr std::size_t kMaxCopiers = 8, kCopyBytes = std::size_t{16} << 20;
  static constexpr std::size_t kMaxRows = std::size_t{1} << 28;
  static constexpr std::size_t kMaxSlotFloats = std::size_t{1} << 40;

  // Into huge pages, next to each other in the order in which a token meets them; one that several
  // steps read, once. Those that take less time dense become so, whatever the pages.
  void copy_weights() {
    std::unordered_map<const std::uint8_t*, std::size_t> places;
    std::vector<Copy> copies;
    std::size_t total = 0;
    for (const owl::PackedMatrix* weight : weights()) {
      if (!moves(*weight) || !places.emplace(weight->data, total).second) continue;
      add_copies(*weight, total, copies);
      total += (bytes_of(*weight) + 63) / 64 * 64;
    }
    if (total == 0) return;
    try {
      memory_ = owl::HugeMemory(total);
    } catch (const std::bad_alloc&) {
      return;  // they serve where they are, more slowly
    }
    run(copies, memory_.data());
    for (owl::PackedMatrix* weight : weights()) {
      if (!moves(*weight)) continue;
      const std::uint8_t* place = memory_.data() + places.at(weight->data);
      if (becomes_dense(*weight))
        *weight = owl::dense_at(*weight, place);
      else
        weight->move_to(place);
    }
  }

  std::vector<owl::PackedMatrix*> weights() {
    std::vector<owl::PackedMatrix*> found;
    for (Step& s : steps_)
      if (auto* matmul = std::get_if<MatMulStep>(&s)) found.push_back(&matmul->op.weight);
    return found;
  }

  static bool becomes_dense(const owl::PackedMatrix& weight) {
    return owl::lies_dense(weight, owl::best_kernels());
  }
  static bool moves(const owl::PackedMatrix& weight) {
    static const bool pages = owl::huge_pages_available();
    return pages || becomes_dense(weight);
  }
  static std::size_t bytes_of(const owl::PackedMatrix& weight) {
    return becomes_dense(weight) ? owl::dense_bytes(weight) : weight.size;
  }

  // Bytes [begin, end) of a weight as it is, or groups of its dense form.
  struct Copy {
    std::size_t to;
    owl::PackedMatrix from;
    std::size_t begin, end;

    void run(std::uint8_t* memory) const {
      if (becomes_dense(from)) {
        owl::fill_dense(from, begin, end, memory + to);
        release(from.group_masks(begin), from.group_masks(end));
        return release(from.group_values(begin), from.group_values(end));
      }
      std::memcpy(memory + to + begin, from.data + begin, end - begin);
      release(from.data + begin, from.data + end);
    }
    static void release(const std::uint8_t* first, const std::uint8_t* last) {
      owl::release_file_pages(first, static_cast<std::size_t>(last - first));
    }
  };

  static void add_copies(const owl::PackedMatrix& weight, std::size_t to,
                         std::vector<Copy>& copies) {
    const bool dense = becomes_dense(weight);
    const std::size_t parts = dense ? weight.groups : weight.size;
    const std::size_t most =
        dense ? std::max<std::size_t>(1, kCopyBytes * weight.groups / bytes_of(weight))
              : kCopyBytes;
    for (std::size_t begin = 0; begin < parts; begin += most)
      copies.push_back({to, weight, begin, std::min(begin + most, parts)});
  }

  // By several threads: most of the time is the system's, which clears each page before its first
  // use.
  static void run(const std::vector<Copy>& copies, std::uint8_t* memory) {
    std::atomic<std::size_t> next{0};
    auto work = [&] {
      for (std::size_t i = next++; i < copies.size(); i = next++) copies[i].run(memory);
    };
    owl::on_threads(
        std::min<std::size_t>({std::thread::hardware_concurrency(), kMaxCopiers, copies.size()}),
        work);
  }

  // One run: where values lie this time, and how wide they are.
  class Call {
   public:
    Call(const ProgramKernel& kernel, OrtKernelContext* raw)
        : kernel_(kernel), raw_(raw), context_(raw), slot_now_(kernel.slot_widths_.size()) {}

    void compute() {
      const Value& x = std::visit([](const auto& step) -> const Value& { return input_of(step); },
                                  kernel_.steps_.front());
      const Ort::ConstValue tensor = needed_input(context_, x.index);
      const auto shape = tensor.GetTensorTypeAndShapeInfo().GetShape();
      require(shape.size() == 3, "activations are [batch, length, width]");
      batch_ = extent(shape[0]);
      length_ = extent(shape[1]);
      require(batch_ <= kMaxRows && length_ <= kMaxRows && rows() <= kMaxRows,
              "there are too many rows");
      find_ends();
      const owl::Scratch::Borrowed borrowed(slots);
      place_slots();
      owl::Plan plan(owl::best_kernels());
      for (const Step& s : kernel_.steps_)
        std::visit([&](const auto& step) { add(plan, step); }, s);
      plan.run(session_pool(raw_));
    }

   private:
    struct Row {
      float* data = nullptr;
      std::size_t width = 0;
    };

    std::size_t rows() const { return batch_ * length_; }

    void place_slots() {
      std::size_t total = 0;
      for (const std::size_t width : kernel_.slot_widths_) {
        total += width * rows();
        require(total <= kMaxSlotFloats, "the steps need too much memory");
      }
      auto* at = slots.get<float>(total);
      for (std::size_t i = 0; i < slot_now_.size(); ++i) {
        slot_now_[i] = {at, 0};
        at += kernel_.slot_widths_[i] * rows();
      }
    }

    // Activations of this width, or of any if it is 0.
    const float* activations(const Value& v, std::size_t width, std::size_t* found = nullptr) {
      if (!v.present) return nullptr;
      Row row;
      if (v.place == Value::kInput) {
        const Ort::ConstValue tensor = needed_input(context_, v.index);
        const auto info = tensor.GetTensorTypeAndShapeInfo();
        const auto shape = info.GetShape();
        require(info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT && shape.size() == 3 &&
                    extent(shape[0]) == batch_ && extent(shape[1]) == length_,
                "an input is not what its step expects");
        row = {const_cast<float*>(tensor.GetTensorData<float>()), extent(shape[2])};
      } else {
        row = v.place == Value::kSlot ? slot_now_[v.index] : output_now_[v.index];
      }
      require(width == 0 || row.width == width,
              "a value's width differs from what its step expects");
      if (found != nullptr) *found = row.width;
      return row.data;
    }

    float* result(const Value& v, std::size_t width) {
      if (!v.present) return nullptr;
      if (v.place == Value::kSlot) {
        require(width <= kernel_.slot_widths_[v.index], "a slot is too narrow");
        slot_now_[v.index].width = width;
        return slot_now_[v.index].data;
      }
      const std::vector<std::int64_t> shape{static_cast<std::int64_t>(batch_),
                                            static_cast<std::int64_t>(length_),
                                            static_cast<std::int64_t>(width)};
      output_now_[v.index] = {needed_output(context_, v.index, shape).GetTensorMutableData<float>(),
                              width};
      return output_now_[v.index].data;
    }

    // A vector of the model: bias or gamma.
    const float* vector(const Value& v, std::size_t size) {
      if (!v.present) return nullptr;
      require(v.place == Value::kInput, "bias and gamma must be inputs");
      const Ort::ConstValue tensor = needed_input(context_, v.index);
      const auto info = tensor.GetTensorTypeAndShapeInfo();
      require(info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT &&
                  info.GetElementCount() == size,
              "bias or gamma has the wrong size");
      return tensor.GetTensorData<float>();
    }

    Ort::ConstValue tensor(const Value& v, ONNXTensorElementDataType type) {
      if (!v.present) return Ort::ConstValue{nullptr};
      const Ort::ConstValue found = needed_input(context_, v.index);
      require(found.GetTensorTypeAndShapeInfo().GetElementType() == type,
              "an input has the wrong type");
      return found;
    }

    void add(owl::Plan& plan, const MatMulStep& s) {
      owl::Linear op = s.op;
      const float* x = activations(s.x, op.weight.cols);
      op.bias = vector(s.bias, op.outputs);
      op.skip = activations(s.skip, op.weight.cols);
      op.gamma = vector(s.gamma, op.weight.cols);
      float* sum = result(s.sum, op.weight.cols);
      float* y = result(s.y, op.outputs);
      if (tokens_ != nullptr && sum == nullptr && s.y.place == Value::kOutput &&
          static_cast<std::int64_t>(s.y.index) == kernel_.logits_)
        return add_last(plan, op, x, y);
      plan.add(op, x, rows(), y, sum);
    }

    // By what rows of logits that are wanted are told from others, if not all are.
    void find_ends() {
      if (length_ <= 1 || rows() <= owl::kFewRows) return;
      // Deployments that were made before these attributes have all rows computed.
      if (kernel_.logits_ == kAbsent || kernel_.tokens_ == kAbsent || kernel_.mask_ == kAbsent)
        return;
      std::size_t columns = 0;
      tokens_ = integers(kernel_.tokens_, columns);
      require(columns == length_, "there must be a token for each row");
      mask_ = integers(kernel_.mask_, total_);
      require(total_ >= length_, "the mask is shorter than the sequences");
    }

    // An input [batch, columns].
    const std::int64_t* integers(std::int64_t index, std::size_t& columns) {
      const Ort::ConstValue tensor = needed_input(context_, extent(index));
      const auto info = tensor.GetTensorTypeAndShapeInfo();
      const auto shape = info.GetShape();
      require(info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 && shape.size() == 2 &&
                  extent(shape[0]) == batch_,
              "tokens and mask are integers, [batch, columns]");
      columns = extent(shape[1]);
      return tensor.GetTensorData<std::int64_t>();
    }

    // Of each sequence by itself, so that it does not depend on the others. Not of the last token
    // alone: onnxruntime-genai passes over tokens at the end that look like padding. Those of a
    // sequence among others are masked; one alone may end in any number of them, which are equal.
    void add_last(owl::Plan& plan, const owl::Linear& whole, const float* x, float* y) {
      const auto add_rows = [&](std::size_t begin, std::size_t end) {
        owl::Linear op = whole;
        if (op.skip != nullptr) op.skip += begin * op.weight.cols;
        plan.add(op, x + begin * op.weight.cols, end - begin, y + begin * op.outputs, nullptr);
      };
      for (std::size_t b = 0; b < batch_; ++b) {
        const std::int64_t* mask = mask_ + (b + 1) * total_ - length_;
        const std::size_t first = b * length_;
        std::size_t end = length_;
        while (end > 0 && mask[end - 1] == 0) --end;
        const std::size_t begin = end - std::min(end, owl::kFewRows);
        const std::size_t before = end == 0 ? 0 : row_before_equals(first, first + end) - first;
        if (before < begin) add_rows(first + before, first + before + 1);
        add_rows(first + begin, first + end);
      }
    }

    // Of the rows [first, end), one at least, the last whose token is not that of the row at their
    // end; `first` if there is none.
    std::size_t row_before_equals(std::size_t first, std::size_t end) {
      std::size_t row = end - 1;
      while (row > first && tokens_[row] == tokens_[end - 1]) --row;
      return row;
    }

    void add(owl::Plan& plan, const AttentionStep& s) {
      AttentionTensors t;
      t.q = activations(s.q, 0, &t.q_width);
      t.k = activations(s.k, 0, &t.kv_width);
      t.v = activations(s.v, t.kv_width);
      t.batch = batch_;
      t.length = length_;
      t.past_key = tensor(s.past_key, kernel_.cache_);
      t.past_value = tensor(s.past_value, kernel_.cache_);
      t.seqlens = tensor(s.seqlens, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32);
      t.total = tensor(s.total, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32);
      t.cosines = tensor(s.cosines, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
      t.sines = tensor(s.sines, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
      t.mask = tensor(s.mask, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
      s.node.add_to(
          plan, t, [&](std::size_t width) { return result(s.y, width); },
          [&](std::size_t which, const std::vector<std::int64_t>& shape) {
            const Value& v = which == 0 ? s.present_key : s.present_value;
            return needed_output(context_, v.index, shape).GetTensorMutableRawData();
          });
    }

    const ProgramKernel& kernel_;
    OrtKernelContext* raw_;
    Ort::KernelContext context_;
    std::size_t batch_ = 0, length_ = 0;
    const std::int64_t* tokens_ = nullptr;  // [batch, length_], where some logits are left out
    const std::int64_t* mask_ = nullptr;    // [batch, total_], then
    std::size_t total_ = 0;
    std::vector<Row> slot_now_;
    Row output_now_[kFloatOutputs];
  };

  ONNXTensorElementDataType cache_;
  std::int64_t logits_;         // the output of which only the last rows are wanted
  std::int64_t tokens_, mask_;  // inputs
  std::vector<std::size_t> slot_widths_;
  std::vector<Step> steps_;
  owl::HugeMemory memory_;
};

template <ONNXTensorElementDataType Cache, bool LastLogits>
struct ProgramKernelFor : ProgramKernel {
  explicit ProgramKernelFor(const Ort::ConstKernelInfo& info)
      : ProgramKernel(info, Cache, LastLogits) {}
};

template <ONNXTensorElementDataType Cache, bool LastLogits>
struct Program : Operator<Program<Cache, LastLogits>, ProgramKernelFor<Cache, LastLogits>> {
  const char* GetName() const {
    return Cache == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? "ProgramFp16" : "ProgramFp32";
  }
  std::size_t GetInputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetInputType(std::size_t) const {
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(std::size_t) const {
    return INPUT_OUTPUT_VARIADIC;
  }
  bool GetVariadicInputHomogeneity() const { return false; }
  std::size_t GetOutputTypeCount() const { return kFloatOutputs + 1; }
  ONNXTensorElementDataType GetOutputType(std::size_t i) const {
    return i < kFloatOutputs ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : Cache;
  }
  OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(std::size_t i) const {
    return i < kFloatOutputs ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_VARIADIC;
  }
  int GetVariadicOutputMinArity() const { return 0; }
};

template <bool LastLogits>
void add_to(Ort::CustomOpDomain& domain) {
  static const Program<ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, LastLogits> fp16;
  static const Program<ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, LastLogits> fp32;
  domain.Add(&fp16);
  domain.Add(&fp32);
}

}  // namespace

void add_programs(Ort::CustomOpDomain& domain, bool last_logits) {
  last_logits ? add_to<true>(domain) : add_to<false>(domain);
}

}  // namespace owl_ops
