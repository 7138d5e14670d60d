// What is done to finished sums and to rows of activations: epilogues, normalisation.
#pragma once

#include "kernel_common.h"

namespace owl {
namespace {

// e^x to about 2 units in the last place, x held to [-87.3, 88.3]. NaN stays NaN: f_min and f_max
// return their second operand when either is NaN, as the x86 instructions do.
template <class V>
inline typename V::F exponential(typename V::F x) {
  using F = typename V::F;
  const F clamped = V::f_max(V::f_set1(-87.3F), V::f_min(V::f_set1(88.3F), x));
  // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer.
  const F magic = V::f_set1(12582912.0F);
  const F shifted = V::f_fma(clamped, V::f_set1(1.44269504F), magic);
  const F n = V::f_sub(shifted, magic);
  F r = V::f_fma(n, V::f_set1(-0.693359375F), clamped);
  r = V::f_fma(n, V::f_set1(2.12194440e-4F), r);
  F p = V::f_set1(1.9875691500e-4F);
  p = V::f_fma(p, r, V::f_set1(1.3981999507e-3F));
  p = V::f_fma(p, r, V::f_set1(8.3334519073e-3F));
  p = V::f_fma(p, r, V::f_set1(4.1665795894e-2F));
  p = V::f_fma(p, r, V::f_set1(1.6666665459e-1F));
  p = V::f_fma(p, r, V::f_set1(5.0000001201e-1F));
  p = V::f_fma(V::f_mul(p, r), r, V::f_add(r, V::f_set1(1.0F)));
  return V::scale_by_power(p, shifted);
}

template <class V>
inline typename V::F gated(Epilogue epilogue, typename V::F gate, typename V::F up) {
  using F = typename V::F;
  F inner = gate;  // silu(g) = g / (1 + e^-g)
  if (epilogue ==
      Epilogue::kGeluMul) {  // tanh form: g / (1 + e^(-2 sqrt(2/pi) (g + 0.044715 g^3)))
    const F cubic = V::f_mul(V::f_mul(gate, gate), V::f_mul(gate, V::f_set1(0.044715F)));
    inner = V::f_mul(V::f_add(gate, cubic), V::f_set1(1.5957691216F));
  }
  const F e = exponential<V>(V::f_sub(V::f_set1(0.0F), inner));
  return V::f_mul(V::f_div(gate, V::f_add(V::f_set1(1.0F), e)), up);
}

// Stores the lanes of one row group that exist.
template <class V>
inline void store_lanes(float* out, std::size_t lanes, typename V::F value) {
  if (lanes >= kGroupRows) return V::f_store(out, value);
  alignas(64) float buffer[kGroupRows];
  V::f_store(buffer, value);
  std::memcpy(out, buffer, lanes * sizeof(float));
}

template <class V>
inline typename V::F load_lanes(const float* x, std::size_t lanes) {
  if (lanes >= kGroupRows) return V::f_load(x);
  alignas(64) float buffer[kGroupRows] = {};
  std::memcpy(buffer, x, lanes * sizeof(float));
  return V::f_load(buffer);
}

template <class V>
void finish(std::size_t begin, std::size_t end, const float* sums, std::size_t sums_stride,
            std::size_t first, std::size_t count, const Output& output) {
  const std::size_t step = output.epilogue == Epilogue::kNone ? 1 : 2;
  for (std::size_t m = 0; m < count; ++m, sums += sums_stride) {
    float* out = output.data + (first + m) * output.cols;
    for (std::size_t g = begin; g < end; g += step) {
      const float* s = sums + (g - begin) * kGroupRows;
      typename V::F value = V::f_load(s);
      if (step == 2) value = gated<V>(output.epilogue, value, V::f_load(s + kGroupRows));
      const std::size_t column = g / step * kGroupRows;
      if (column >= output.cols) continue;
      const std::size_t lanes = output.cols - column;
      if (output.bias != nullptr)
        value = V::f_add(value, load_lanes<V>(output.bias + column, lanes));
      store_lanes<V>(out + column, lanes, value);
    }
  }
}

template <class V>
void rms_norm(const float* x, const float* skip, const float* gamma, std::size_t size,
              float epsilon, float* sum, float* y) {
  using F = typename V::F;
  F squares = V::f_set1(0.0F);
  for (std::size_t i = 0; i < size; i += kGroupRows) {
    F v = load_lanes<V>(x + i, size - i);
    if (skip != nullptr) v = V::f_add(v, load_lanes<V>(skip + i, size - i));
    if (sum != nullptr) store_lanes<V>(sum + i, size - i, v);
    store_lanes<V>(y + i, size - i, v);
    squares = V::f_fma(v, v, squares);
  }
  const F inverse =
      V::f_set1(1.0F / __builtin_sqrtf(V::f_hsum(squares) / static_cast<float>(size) + epsilon));
  for (std::size_t i = 0; i < size; i += kGroupRows) {
    const F v = V::f_mul(load_lanes<V>(y + i, size - i), inverse);
    store_lanes<V>(y + i, size - i, V::f_mul(v, load_lanes<V>(gamma + i, size - i)));
  }
}

}  // namespace
}  // namespace owl
