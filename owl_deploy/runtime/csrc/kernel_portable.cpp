// Plain C++: any processor, and the reading of what the other files do.
#include "kernel_table.h"

namespace owl {
namespace {

struct Portable {
  // A vector of the language: loops over arrays become vectors, or not, as the compiler likes.
  using Floats = float __attribute__((vector_size(64)));
  using Words = std::uint32_t __attribute__((vector_size(64)));
  struct F {
    Floats v;
  };
  struct I {
    std::int32_t v[16];
  };
  struct Cell {
    std::uint8_t v[64];
  };
  using Half = float;
  static constexpr bool kAsksFar = false;
  static constexpr std::size_t kPanelGroups = 1;
  static constexpr int kFloatRows = 2;
  static constexpr int kInt8Rows = 2;
  static constexpr bool kWidens = false;
  static constexpr int kNarrowRows = 0;
  static constexpr bool kBiased = false;

  static Cell held_cell(const void* p) { return load_cell(p); }
  static Cell load_cell(const void* p) {
    Cell cell;
    std::memcpy(cell.v, p, 64);
    return cell;
  }
  static void store_cell(void* p, const Cell& cell) { std::memcpy(p, cell.v, 64); }
  // The first of two in a byte's upper half.
  static Cell expand(Bits<4>, const std::uint8_t* p, std::uint64_t mask) {
    Cell cell{};
    for (std::size_t i = 0; mask != 0; mask &= mask - 1, ++i)
      cell.v[__builtin_ctzll(mask)] = nibble(i % 2 == 0 ? p[i / 2] : p[i / 2] << 4);
    return cell;
  }
  // Values of 3 bits one after the other, eight in three bytes: less 4, times 32.
  static void widen(Bits<3>, const std::uint8_t* p, std::size_t size, std::uint8_t* bytes) {
    for (std::size_t i = 0; i < size; i += 3) {
      std::uint32_t eight = p[i] | p[i + 1] << 8 | p[i + 2] << 16;
      for (int j = 0; j < 8; ++j, eight >>= 3)
        *bytes++ = static_cast<std::uint8_t>(((eight & 7) ^ 4) << 5);
    }
  }
  // The upper 4 of 8 bits, less 8, times 16.
  static std::uint8_t nibble(int v) { return static_cast<std::uint8_t>((v & 0xf0) ^ 0x80); }
  template <std::size_t N>
  static Cell expand(Bits<N>, const std::uint8_t* p, std::uint64_t mask) {
    constexpr std::size_t Bytes = N / 8;
    static_assert(N % 8 == 0);
    Cell cell{};
    for (; mask != 0; mask &= mask - 1, p += Bytes)
      std::memcpy(cell.v + Bytes * static_cast<std::size_t>(__builtin_ctzll(mask)), p, Bytes);
    return cell;
  }

  static Cell bias8(const Cell& w) { return w; }
  static Cell broadcast(const std::uint8_t* x) {
    Cell cell;
    for (int i = 0; i < 64; i += 4) std::memcpy(cell.v + i, x, 4);
    return cell;
  }
  // The lower or the upper 4 bits of each byte, less 8, times 16.
  template <bool Upper>
  static Cell nibbles(Cell cell) {
    for (auto& v : cell.v) v = nibble(Upper ? v : v << 4);
    return cell;
  }
  // One of the four cells of 3 bits a value at p, see kThreeBitBytes: its values less 4, times 32.
  template <std::size_t Place>
  static Cell three_bits(const std::uint8_t* p) {
    Cell cell;
    for (std::size_t i = 0; i < 64; ++i) {
      const int lower = p[i] >> 2 * Place & 3, upper = p[64 + 8 * Place + i / 8] >> i % 8 & 1;
      cell.v[i] = static_cast<std::uint8_t>(32 * (4 * upper + lower - 4));
    }
    return cell;
  }
  // Adds those bits less 8 themselves.
  template <bool Upper>
  static Cell add_nibbles(Cell cell, const Cell& from) {
    for (int i = 0; i < 64; ++i)
      cell.v[i] =
          static_cast<std::uint8_t>(cell.v[i] + ((Upper ? from.v[i] >> 4 : from.v[i] & 15) - 8));
    return cell;
  }
  static I dot(Bits<8>, I acc, const Cell& w, const Cell& x) {
    for (int i = 0; i < 16; ++i)
      for (int j = 4 * i; j < 4 * i + 4; ++j)
        acc.v[i] += static_cast<std::int8_t>(w.v[j]) * static_cast<std::int8_t>(x.v[j]);
    return acc;
  }
  static F dot(Bits<16>, const F& acc, const Cell& w, const std::uint8_t* x) {
    float pair[2];
    std::memcpy(pair, x, 8);
    Words lanes;
    std::memcpy(&lanes, w.v, 64);
    const Words low = lanes << 16, high = lanes & 0xffff0000U;
    return {acc.v +
            (reinterpret_cast<Floats>(low) * pair[0] + reinterpret_cast<Floats>(high) * pair[1])};
  }
  static F dot(Bits<32>, const F& acc, const Cell& w, const std::uint8_t* x) {
    float value;
    std::memcpy(&value, x, 4);
    Floats lanes;
    std::memcpy(&lanes, w.v, 64);
    return {acc.v + lanes * value};
  }
  static void store_half_row(Half* out, const F& v) { f_store(out, v); }

  template <class Operation>
  static F each(Operation operation) {
    F r;
    for (int i = 0; i < 16; ++i) r.v[i] = operation(i);
    return r;
  }
  static F f_set1(float x) { return {x - Floats{}}; }
  static F f_load(const float* p) {
    F r;
    std::memcpy(&r.v, p, 64);
    return r;
  }
  static void f_store(float* p, const F& a) { std::memcpy(p, &a.v, 64); }
  static F f_add(const F& a, const F& b) { return {a.v + b.v}; }
  static F f_sub(const F& a, const F& b) { return {a.v - b.v}; }
  static F f_mul(const F& a, const F& b) { return {a.v * b.v}; }
  static F f_div(const F& a, const F& b) { return {a.v / b.v}; }
  static F f_max(const F& a, const F& b) { return {a.v > b.v ? a.v : b.v}; }
  static F f_min(const F& a, const F& b) { return {a.v < b.v ? a.v : b.v}; }
  static F f_abs(const F& a) {
    return each([&](int i) { return __builtin_fabsf(a.v[i]); });
  }
  static F f_fma(const F& a, const F& b, const F& c) { return {a.v * b.v + c.v}; }
  static float f_hsum(const F& v) {
    float sum = 0.0F;
    for (int i = 0; i < 16; ++i) sum += v.v[i];
    return sum;
  }
  static float f_hmax(const F& v) {
    float peak = v.v[0];
    for (int i = 0; i < 16; ++i) peak = v.v[i] > peak ? v.v[i] : peak;
    return peak;
  }
  static I i_set1(std::int32_t x) {
    I r;
    for (auto& v : r.v) v = x;
    return r;
  }
  static I i_add(I a, const I& b) {
    for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
    return a;
  }
  static F to_float(const I& a) {
    return each([&](int i) { return static_cast<float>(a.v[i]); });
  }
  static I store_int8(std::int8_t* out, const F& v) {
    I rounded;
    for (int i = 0; i < 16; ++i) {
      const float nearest = __builtin_rintf(v.v[i]);  // of a NaN, no integer may be made
      rounded.v[i] = nearest >= -127.0F && nearest <= 127.0F ? static_cast<int>(nearest) : 0;
      out[i] = static_cast<std::int8_t>(rounded.v[i]);
    }
    return rounded;
  }
  // p * 2^n where `shifted` holds n in its low bits, above 1.5 * 2^23. A product, not a sum of
  // exponents, so that NaN stays NaN whatever its bits.
  static F scale_by_power(const F& p, const F& shifted) {
    const Words power = (reinterpret_cast<Words>(shifted.v) << 23) + 0x3f800000U;
    return {p.v * reinterpret_cast<Floats>(power)};
  }
  static float from_fp16(std::uint16_t h) {
    const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000) << 16;
    const std::uint32_t rest = h & 0x7fff;
    std::uint32_t bits;
    if (rest >= 0x7c00) {
      bits = sign | 0x7f800000U | (rest & 0x3ff) << 13;
    } else if (rest >= 0x400) {
      bits = sign | ((rest << 13) + 0x38000000U);
    } else {  // a denormal is a multiple of 2^-24
      const float value = static_cast<float>(rest) * 5.9604644775390625e-8F;
      return sign != 0 ? -value : value;
    }
    float r;
    std::memcpy(&r, &bits, 4);
    return r;
  }
  static std::uint16_t to_fp16(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000);
    const std::uint32_t rest = bits & 0x7fffffff;
    if (rest > 0x7f800000U) return static_cast<std::uint16_t>(sign | 0x7e00);
    if (rest >= 0x477ff000U) return static_cast<std::uint16_t>(sign | 0x7c00);
    if (rest < 0x38800000U)
      return static_cast<std::uint16_t>(
          sign | static_cast<std::uint16_t>(__builtin_rintf(__builtin_fabsf(x) * 16777216.0F)));
    const std::uint32_t rounded = rest + 0xfff + (rest >> 13 & 1);  // to nearest, ties to even
    return static_cast<std::uint16_t>(sign | (rounded - 0x38000000U) >> 13);
  }
  static F f_load_scales(const std::uint8_t* p, const ScaleCode& code) {
    return each([&](int i) { return code.decoded(p[i]); });
  }
  static F f_halves(float low, float high) {
    return each([&](int i) { return i < 8 ? low : high; });
  }
  static F f_load_fp16(const std::uint16_t* p) {
    return each([&](int i) { return from_fp16(p[i]); });
  }
  static void f_store_fp16(std::uint16_t* p, const F& v) {
    for (int i = 0; i < 16; ++i) p[i] = to_fp16(v.v[i]);
  }
  static void transpose16(F r[16]) {
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < i; ++j) {
        const float t = r[i].v[j];
        r[i].v[j] = r[j].v[i];
        r[j].v[i] = t;
      }
  }
  // Lanes i and i + 8 of the result add up to the sum over the lanes of v[i].
  static F f_sum8(const F v[8]) {
    return each([&](int i) { return i < 8 ? f_hsum(v[i]) : 0.0F; });
  }
  static F f_join8(F low, F high) {
    return each([&](int i) { return i < 8 ? low.v[i] + low.v[i + 8] : high.v[i - 8] + high.v[i]; });
  }
};

}  // namespace

const Kernels kPortableKernels = make_kernels<Portable>("portable");

}  // namespace owl
