// Attention on ONNX Runtime's tensors: everything that later becomes an address is checked here.
#include "ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace owl_ops {

AttentionNode::Cache AttentionNode::read(const AttentionTensors& tensors,
                                         owl::Attention& attention) const {
  const auto info = tensors.past_key.GetTensorTypeAndShapeInfo();
  const auto shape = info.GetShape();
  require(shape.size() == 4, "caches are [batch, heads, positions, size]");
  attention.head_size = extent(shape[3]);
  require(owl::head_size_is_sound(attention.head_size),
          "the head size must be a multiple of 16, at most 256");
  require(extent(shape[0]) == tensors.batch && extent(shape[1]) == attention.kv_heads,
          "the cache has the wrong shape");
  const auto values = tensors.past_value.GetTensorTypeAndShapeInfo();
  require(values.GetShape() == shape && values.GetElementType() == info.GetElementType(),
          "the caches differ");
  const std::size_t heads =
      tensors.k == nullptr ? attention.heads + 2 * attention.kv_heads : attention.heads;
  require(tensors.k == nullptr || tensors.kv_width == attention.kv_heads * attention.head_size,
          "the keys have the wrong width");
  require(tensors.q_width == heads * attention.head_size, "the queries have the wrong width");
  attention.cache = info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16
                        ? owl::CacheType::kFp16
                        : owl::CacheType::kFp32;
  if (attention.scale == 0.0F)
    attention.scale = 1.0F / std::sqrt(static_cast<float>(attention.head_size));

  Cache cache{extent(shape[2]), 0, static_cast<std::size_t>(-1), nullptr, nullptr};
  require(tensors.seqlens.GetTensorTypeAndShapeInfo().GetElementCount() == tensors.batch,
          "seqlens_k has the wrong size");
  cache.seqlens = tensors.seqlens.GetTensorData<std::int32_t>();
  require(tensors.total.GetTensorTypeAndShapeInfo().GetElementCount() == 1,
          "total_length must be one number");
  cache.total = extent(tensors.total.GetTensorData<std::int32_t>()[0]);
  cache.mask = read_mask(tensors, cache.total);
  attention.capacity = std::max(cache.past_capacity, cache.total);
  if (attention.rotary) {
    require(tensors.cosines && tensors.sines, "rotary embedding needs its tables");
    const auto table = tensors.cosines.GetTensorTypeAndShapeInfo().GetShape();
    require(table.size() == 2 && tensors.sines.GetTensorTypeAndShapeInfo().GetShape() == table,
            "the rotary tables differ in shape");
    attention.rotary_size = 2 * extent(table[1]);
    require(attention.rotary_size <= attention.head_size,
            "the rotary tables are wider than a head");
    attention.cosines = tensors.cosines.GetTensorData<float>();
    attention.sines = tensors.sines.GetTensorData<float>();
    cache.table = extent(table[0]);
  }
  return cache;
}

const std::int64_t* AttentionNode::read_mask(const AttentionTensors& tensors, std::size_t total) {
  if (!tensors.mask) return nullptr;
  const auto shape = tensors.mask.GetTensorTypeAndShapeInfo().GetShape();
  require(shape.size() == 2 && extent(shape[0]) == tensors.batch && extent(shape[1]) == total,
          "attention_mask must be [batch, total_length]");
  require(total >= tensors.length, "attention_mask is shorter than the new tokens");
  return tensors.mask.GetTensorData<std::int64_t>();
}

namespace {

// Calls each(is_token, first, count) for every run of tokens or of padding among `length` places;
// null: all are tokens.
template <class Each>
void for_each_run(const std::int64_t* mask, std::size_t length, Each each) {
  for (std::size_t first = 0, end = 0; first < length; first = end) {
    const bool is_token = mask == nullptr || mask[first] != 0;
    for (end = first + 1; end < length && (mask == nullptr || (mask[end] != 0) == is_token);) ++end;
    each(is_token, first, end - first);
  }
}

std::size_t count_tokens(const std::int64_t* mask, std::size_t length) {
  if (mask == nullptr) return length;
  return length - static_cast<std::size_t>(std::count(mask, mask + length, 0));
}

// Nothing to do when the runtime gives one buffer for past and present, as onnxruntime-genai does.
void copy_past(const Ort::ConstValue& cache, std::size_t b, std::size_t past,
               std::size_t past_capacity, const owl::Attention& op, std::size_t bytes,
               std::uint8_t* to) {
  const auto* from = static_cast<const std::uint8_t*>(cache.GetTensorRawData()) +
                     b * op.kv_heads * past_capacity * bytes;
  if (from == to || past == 0) return;
  for (std::size_t h = 0; h < op.kv_heads; ++h)
    std::memcpy(to + h * op.capacity * bytes, from + h * past_capacity * bytes, past * bytes);
}

}  // namespace

void AttentionNode::add_sequences(owl::Plan& plan, const AttentionTensors& tensors,
                                  const owl::Attention& attention, const Cache& cache, void* keys,
                                  void* values, float* out) const {
  const std::size_t width = attention.heads * attention.head_size,
                    kv_width = attention.kv_heads * attention.head_size;
  const bool packed = tensors.k == nullptr;
  const std::size_t stride = packed ? width + 2 * kv_width : width,
                    kv_stride = packed ? stride : kv_width;
  const float* k = packed ? tensors.q + width : tensors.k;
  const float* v = packed ? k + kv_width : tensors.v;
  const std::size_t length = tensors.length;
  const std::size_t bytes = attention.head_size * owl::cache_bytes(attention.cache);
  const std::size_t sequence_bytes = attention.kv_heads * attention.capacity * bytes;
  std::vector<owl::AttentionRun> runs;
  for (std::size_t b = 0; b < tensors.batch; ++b) {
    // seqlens_k is each sequence's length less one. Without a mask, a first prompt may be padded on
    // its right only.
    const std::size_t known = extent(std::int64_t{cache.seqlens[b]} + 1);
    const std::int64_t* mask =
        cache.mask == nullptr ? nullptr : cache.mask + (b + 1) * cache.total - length;
    const std::size_t tokens = count_tokens(mask, length);
    require(mask == nullptr || known >= tokens, "attention_mask has more tokens than seqlens_k");
    const bool starts = mask == nullptr && (cache.total == length || known < length);
    const std::size_t past = starts ? 0 : known - tokens;
    require(past + tokens <= attention.capacity && past <= cache.past_capacity,
            "seqlens_k runs past the cache");
    require(past + tokens <= cache.table, "the rotary tables hold too few positions");
    auto* own_keys = static_cast<std::uint8_t*>(keys) + b * sequence_bytes;
    auto* own_values = static_cast<std::uint8_t*>(values) + b * sequence_bytes;
    copy_past(tensors.past_key, b, past, cache.past_capacity, attention, bytes, own_keys);
    copy_past(tensors.past_value, b, past, cache.past_capacity, attention, bytes, own_values);
    // Padding is no position: tokens on either side of it are neighbours in the cache.
    std::size_t position = past;
    for_each_run(mask, length, [&](bool is_token, std::size_t first, std::size_t count) {
      const std::size_t row = b * length + first;
      if (!is_token) return plan.clear(out + row * width, count * width);
      runs.push_back({tensors.q + row * stride, k + row * kv_stride, v + row * kv_stride, stride,
                      kv_stride, count, position, own_keys, own_values, out + row * width});
      position += count;
    });
  }
  plan.add(attention, runs);
}

}  // namespace owl_ops
