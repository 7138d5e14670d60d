// Arm's Advanced SIMD with dot products (Armv8.2: Neoverse N1, Apple M1, Cortex-A76 and later). 16
// floats are four registers.
#include <arm_neon.h>

#include "expand_tables.h"
#include "kernel_table.h"

namespace owl {
namespace {

struct CountTable {  // set bits: a scalar popcount goes through the vector unit and back here
  std::uint8_t entry[256];
};
constexpr CountTable make_count_table() {
  CountTable table{};
  for (int mask = 1; mask < 256; ++mask)
    table.entry[mask] = static_cast<std::uint8_t>(table.entry[mask / 2] + (mask & 1));
  return table;
}
constexpr CountTable kCounts = make_count_table();

struct Neon {
  struct F {
    float32x4_t v[4];
  };
  struct I {
    int32x4_t v[4];
  };
  struct Cell {
    uint8x16_t v[4];
  };
  using Half = float;
  static constexpr bool kAsksFar = false;
  static constexpr std::size_t kPanelGroups = 1;
  static constexpr int kFloatRows = 4;  // 4 x 4 sums, 4 weights and their halves, in 32 registers
  static constexpr int kInt8Rows = 2;
  static constexpr bool kWidens = false;
  static constexpr int kNarrowRows = 0;
  static constexpr bool kBiased = false;

  template <class Operation>
  static F each(Operation operation) {
    return {{operation(0), operation(1), operation(2), operation(3)}};
  }

  static Cell held_cell(const void* p) { return load_cell(p); }
  static Cell load_cell(const void* p) {
    const auto* q = static_cast<const std::uint8_t*>(p);
    return {{vld1q_u8(q), vld1q_u8(q + 16), vld1q_u8(q + 32), vld1q_u8(q + 48)}};
  }
  static void store_cell(void* p, const Cell& cell) {
    for (int i = 0; i < 4; ++i) vst1q_u8(static_cast<std::uint8_t*>(p) + 16 * i, cell.v[i]);
  }
  template <bool Upper>
  static uint8x16_t nibble(uint8x16_t v) {
    if constexpr (!Upper) v = vshlq_n_u8(v, 4);
    return veorq_u8(vandq_u8(v, vdupq_n_u8(0xf0)), vdupq_n_u8(0x80));
  }
  // A table's indices past the register give zeros.
  static uint8x16_t expand_bytes(const std::uint8_t*& p, std::uint32_t mask) {
    const std::uint32_t low = mask & 0xff, high = mask >> 8 & 0xff;
    const uint8x16_t order =
        vaddq_u8(vld1q_u8(kLowerHalf.entry[low]), vld1q_u8(kUpperHalf.entry[high]));
    const uint8x16_t found = vqtbl1q_u8(vld1q_u8(p), order);
    p += static_cast<std::size_t>(kCounts.entry[low]) + kCounts.entry[high];
    return found;
  }
  static uint8x16_t expand_words(const std::uint8_t*& p, std::uint32_t mask) {
    const uint8x16_t found = vqtbl1q_u8(vld1q_u8(p), vld1q_u8(kWords.entry[mask]));
    p += 2 * static_cast<std::size_t>(kCounts.entry[mask]);
    return found;
  }
  static uint8x16_t expand_quads(const std::uint8_t*& p, std::uint32_t mask) {
    const uint8x16_t found = vqtbl1q_u8(vld1q_u8(p), vld1q_u8(kQuads.entry[mask]));
    p += 4 * static_cast<std::size_t>(kCounts.entry[mask]);
    return found;
  }
  // 64 values of 4 bits, the first of two in a byte's upper half, as 16 times what they stand for;
  // then each 16 places of the cell from where their values begin.
  static Cell expand(Bits<4>, const std::uint8_t* p, std::uint64_t mask) {
    uint8x16x4_t found;
    for (int i = 0; i < 2; ++i) {
      const uint8x16_t both = vld1q_u8(p + 16 * i);
      const uint8x16x2_t pairs = vzipq_u8(nibble<true>(both), nibble<false>(both));
      found.val[2 * i] = pairs.val[0];
      found.val[2 * i + 1] = pairs.val[1];
    }
    Cell cell;
    std::uint8_t before = 0;
    for (int i = 0; i < 4; ++i) {
      const auto bits = static_cast<std::uint32_t>(mask >> 16 * i) & 0xffff;
      const std::uint32_t low = bits & 0xff, high = bits >> 8;
      const uint8x16_t order =
          vaddq_u8(vld1q_u8(kLowerHalf.entry[low]), vld1q_u8(kUpperHalf.entry[high]));
      cell.v[i] = vqtbl4q_u8(found, vaddq_u8(order, vdupq_n_u8(before)));
      before = static_cast<std::uint8_t>(before + kCounts.entry[low] + kCounts.entry[high]);
    }
    return cell;
  }
  // Values of 3 bits one after the other, as 32 times what they stand for, 16 of them from 6 bytes
  // at a time. Two are 6 bits, and two bytes hold them wherever they begin.
  static void widen(Bits<3>, const std::uint8_t* p, std::size_t size, std::uint8_t* bytes) {
    const uint8x16_t pairs = {0, 1, 0, 1, 1, 2, 2, 3, 3, 4, 3, 4, 4, 5, 5, 6};
    const int16x8_t moves = {0, -6, -4, -2, 0, -6, -4, -2};
    for (std::size_t i = 0; i < size; i += 6, bytes += 16) {
      const uint16x8_t both = vreinterpretq_u16_u8(vqtbl1q_u8(vld1q_u8(p + i), pairs));
      const uint16x8_t lower = vshlq_u16(both, moves);
      const uint16x8_t values = vorrq_u16(vandq_u16(vshlq_n_u16(lower, 5), vdupq_n_u16(0x00e0)),
                                          vandq_u16(vshlq_n_u16(lower, 10), vdupq_n_u16(0xe000)));
      vst1q_u8(bytes, veorq_u8(vreinterpretq_u8_u16(values), vdupq_n_u8(0x80)));
    }
  }
  static Cell expand(Bits<8>, const std::uint8_t* p, std::uint64_t mask) {
    Cell cell;
    for (int i = 0; i < 4; ++i)
      cell.v[i] = expand_bytes(p, static_cast<std::uint32_t>(mask >> 16 * i) & 0xffff);
    return cell;
  }
  static Cell expand(Bits<16>, const std::uint8_t* p, std::uint32_t mask) {
    Cell cell;
    for (int i = 0; i < 4; ++i) cell.v[i] = expand_words(p, mask >> 8 * i & 0xff);
    return cell;
  }
  static Cell expand(Bits<32>, const std::uint8_t* p, std::uint32_t mask) {
    Cell cell;
    for (int i = 0; i < 4; ++i) cell.v[i] = expand_quads(p, mask >> 4 * i & 0xf);
    return cell;
  }

  static Cell bias8(const Cell& w) { return w; }
  static Cell broadcast(const std::uint8_t* x) {
    std::uint32_t four;
    std::memcpy(&four, x, 4);
    const uint8x16_t v = vreinterpretq_u8_u32(vdupq_n_u32(four));
    return {{v, v, v, v}};
  }
  template <bool Upper>
  static Cell nibbles(Cell cell) {
    for (uint8x16_t& v : cell.v) v = nibble<Upper>(v);
    return cell;
  }
  template <std::size_t Place>
  static Cell three_bits(const std::uint8_t* p) {
    const uint8x8_t upper = vld1_u8(p + kCellBytes + 8 * Place);
    const uint8x16_t both = vcombine_u8(upper, upper);
    const uint8x16_t bit_of = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201ULL));
    Cell cell = load_cell(p);
    for (std::uint8_t i = 0; i < 4; ++i) {
      uint8x16_t& v = cell.v[i];
      if constexpr (Place < 3)
        v = vshlq_n_u8(v, 5 - 2 * static_cast<int>(Place));
      else
        v = vshrq_n_u8(v, 1);
      const auto first = static_cast<std::uint8_t>(2 * i);
      const uint8x16_t byte_of = vcombine_u8(vdup_n_u8(first), vdup_n_u8(first + 1));
      const uint8x16_t set = vtstq_u8(vqtbl1q_u8(both, byte_of), bit_of);
      v = vorrq_u8(vandq_u8(v, vdupq_n_u8(0x60)), vbicq_u8(vdupq_n_u8(0x80), set));
    }
    return cell;
  }
  template <bool Upper>
  static Cell add_nibbles(Cell cell, const Cell& from) {
    for (int i = 0; i < 4; ++i) {
      const uint8x16_t low =
          Upper ? vshrq_n_u8(from.v[i], 4) : vandq_u8(from.v[i], vdupq_n_u8(0x0f));
      cell.v[i] = vaddq_u8(cell.v[i], vsubq_u8(low, vdupq_n_u8(8)));
    }
    return cell;
  }
  static I dot(Bits<8>, I acc, const Cell& w, const Cell& x) {
    for (int i = 0; i < 4; ++i)
      acc.v[i] = vdotq_s32(acc.v[i], vreinterpretq_s8_u8(w.v[i]), vreinterpretq_s8_u8(x.v[i]));
    return acc;
  }
  static F dot(Bits<16>, F acc, const Cell& w, const std::uint8_t* x) {
    float pair[2];
    std::memcpy(pair, x, 8);
    for (int i = 0; i < 4; ++i) {
      const uint32x4_t both = vreinterpretq_u32_u8(w.v[i]);
      const float32x4_t even = vreinterpretq_f32_u32(vshlq_n_u32(both, 16));
      const float32x4_t odd = vreinterpretq_f32_u32(vandq_u32(both, vdupq_n_u32(0xffff0000U)));
      acc.v[i] = vfmaq_n_f32(vfmaq_n_f32(acc.v[i], even, pair[0]), odd, pair[1]);
    }
    return acc;
  }
  static F dot(Bits<32>, F acc, const Cell& w, const std::uint8_t* x) {
    float value;
    std::memcpy(&value, x, 4);
    for (int i = 0; i < 4; ++i)
      acc.v[i] = vfmaq_n_f32(acc.v[i], vreinterpretq_f32_u8(w.v[i]), value);
    return acc;
  }
  static void store_half_row(Half* out, const F& v) { f_store(out, v); }

  static F f_set1(float x) {
    return each([&](int) { return vdupq_n_f32(x); });
  }
  static F f_load(const float* p) {
    return each([&](int i) { return vld1q_f32(p + 4 * i); });
  }
  static void f_store(float* p, const F& a) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
  }
  static F f_add(const F& a, const F& b) {
    return each([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
  }
  static F f_sub(const F& a, const F& b) {
    return each([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
  }
  static F f_mul(const F& a, const F& b) {
    return each([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
  }
  static F f_div(const F& a, const F& b) {
    return each([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
  }
  // The second operand where either is NaN, as on x86.
  static F f_max(const F& a, const F& b) {
    return each([&](int i) { return vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
  }
  static F f_min(const F& a, const F& b) {
    return each([&](int i) { return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
  }
  static F f_abs(const F& a) {
    return each([&](int i) { return vabsq_f32(a.v[i]); });
  }
  static F f_fma(const F& a, const F& b, const F& c) {
    return each([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
  }
  static float32x4_t sum4(const F& a) {
    return vaddq_f32(vaddq_f32(a.v[0], a.v[1]), vaddq_f32(a.v[2], a.v[3]));
  }
  static float f_hsum(const F& a) { return vaddvq_f32(sum4(a)); }
  static float f_hmax(const F& a) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3])));
  }
  static I i_set1(std::int32_t x) {
    return {{vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x)}};
  }
  static I i_add(I a, const I& b) {
    for (int i = 0; i < 4; ++i) a.v[i] = vaddq_s32(a.v[i], b.v[i]);
    return a;
  }
  static F to_float(const I& a) {
    return each([&](int i) { return vcvtq_f32_s32(a.v[i]); });
  }
  static int16x8_t words(int32x4_t low, int32x4_t high) {
    return vcombine_s16(vqmovn_s32(low), vqmovn_s32(high));
  }
  static I store_int8(std::int8_t* out, const F& a) {
    I rounded;
    for (int i = 0; i < 4; ++i) rounded.v[i] = vcvtnq_s32_f32(a.v[i]);
    const int16x8_t low = words(rounded.v[0], rounded.v[1]),
                    high = words(rounded.v[2], rounded.v[3]);
    vst1q_s8(out, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
    return rounded;
  }
  // p * 2^n where `shifted` holds n in its low bits, above 1.5 * 2^23. A product, not a sum of
  // exponents, so that NaN stays NaN whatever its bits.
  static F scale_by_power(const F& p, const F& shifted) {
    return each([&](int i) {
      const int32x4_t exponent = vshlq_n_s32(vreinterpretq_s32_f32(shifted.v[i]), 23);
      const int32x4_t power = vaddq_s32(exponent, vdupq_n_s32(0x3f800000));
      return vmulq_f32(p.v[i], vreinterpretq_f32_s32(power));
    });
  }
  static F f_load_scales(const std::uint8_t* p, const ScaleCode& code) {
    const int8x16_t bytes = vreinterpretq_s8_u8(vld1q_u8(p));
    const int16x8_t wide[2] = {vmovl_s8(vget_low_s8(bytes)), vmovl_s8(vget_high_s8(bytes))};
    return each([&](int i) {
      const int16x4_t four = i % 2 == 0 ? vget_low_s16(wide[i / 2]) : vget_high_s16(wide[i / 2]);
      const uint32x4_t moved =
          vreinterpretq_u32_s32(vshlq_s32(vmovl_s16(four), vdupq_n_s32(code.shift)));
      return vreinterpretq_f32_u32(
          vaddq_u32(vandq_u32(moved, vdupq_n_u32(code.mask)), vdupq_n_u32(code.exponent_bits)));
    });
  }
  static F f_halves(float low, float high) {
    return {{vdupq_n_f32(low), vdupq_n_f32(low), vdupq_n_f32(high), vdupq_n_f32(high)}};
  }
  static F f_load_fp16(const std::uint16_t* p) {
    return each([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
  }
  static void f_store_fp16(std::uint16_t* p, const F& a) {
    for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
  }
  static void transpose16(F r[16]) {
    F to[16];
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) {
        const float32x4_t a = vtrn1q_f32(r[4 * i].v[j], r[4 * i + 1].v[j]),
                          b = vtrn2q_f32(r[4 * i].v[j], r[4 * i + 1].v[j]);
        const float32x4_t c = vtrn1q_f32(r[4 * i + 2].v[j], r[4 * i + 3].v[j]);
        const float32x4_t d = vtrn2q_f32(r[4 * i + 2].v[j], r[4 * i + 3].v[j]);
        to[4 * j].v[i] = pair_low(a, c);
        to[4 * j + 1].v[i] = pair_low(b, d);
        to[4 * j + 2].v[i] = pair_high(a, c);
        to[4 * j + 3].v[i] = pair_high(b, d);
      }
    for (int i = 0; i < 16; ++i) r[i] = to[i];
  }
  // Lanes i and i + 8 of the result add up to the sum over the lanes of v[i].
  static F f_sum8(const F v[8]) {
    const float32x4_t low =
        vpaddq_f32(vpaddq_f32(sum4(v[0]), sum4(v[1])), vpaddq_f32(sum4(v[2]), sum4(v[3])));
    const float32x4_t high =
        vpaddq_f32(vpaddq_f32(sum4(v[4]), sum4(v[5])), vpaddq_f32(sum4(v[6]), sum4(v[7])));
    return {{low, high, vdupq_n_f32(0.0F), vdupq_n_f32(0.0F)}};
  }
  static F f_join8(const F& low, const F& high) {
    return {{low.v[0], low.v[1], high.v[0], high.v[1]}};
  }

 private:
  static float32x4_t pair_low(float32x4_t a, float32x4_t b) {
    return vreinterpretq_f32_f64(vtrn1q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
  }
  static float32x4_t pair_high(float32x4_t a, float32x4_t b) {
    return vreinterpretq_f32_f64(vtrn2q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
  }
};

}  // namespace

const Kernels kNeonKernels = make_kernels<Neon>("neon");

}  // namespace owl
