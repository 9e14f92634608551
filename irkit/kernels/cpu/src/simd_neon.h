// Sixteen lanes in 64-bit Arm with dot products of int8: four registers each.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#define IRKIT_INLINE static inline __attribute__((always_inline))

namespace irkit {
namespace {

// 16 float32
struct Vec {
  float32x4_t part[4];
};
// 16 int32
struct Acc {
  int32x4_t part[4];
};
// 64 codes
struct Bytes {
  uint8x16_t part[4];
};

constexpr int kTileRows = 4;
constexpr int kSeveralSums = 3;
constexpr bool kSigned8 = true;
constexpr int kHeldBits = 0;

// A Vec, Acc or Bytes of f(0) to f(3).
template <class T, class F>
IRKIT_INLINE T parts(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}

IRKIT_INLINE Vec set1(float x) { return parts<Vec>([&](int) { return vdupq_n_f32(x); }); }
IRKIT_INLINE Vec zero() { return set1(0); }
IRKIT_INLINE Vec load(const float* p) { return parts<Vec>([&](int i) { return vld1q_f32(p + 4 * i); }); }
IRKIT_INLINE void store(float* p, Vec v) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, v.part[i]);
}
IRKIT_INLINE Vec load_half(const uint16_t* p) {
  return parts<Vec>([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
IRKIT_INLINE void store_half(uint16_t* p, Vec v) {
  for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(v.part[i])));
}
IRKIT_INLINE Vec load_bf16(const uint16_t* p) {
  return parts<Vec>([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}
IRKIT_INLINE Vec add(Vec a, Vec b) {
  return parts<Vec>([&](int i) { return vaddq_f32(a.part[i], b.part[i]); });
}
IRKIT_INLINE Vec sub(Vec a, Vec b) {
  return parts<Vec>([&](int i) { return vsubq_f32(a.part[i], b.part[i]); });
}
IRKIT_INLINE Vec mul(Vec a, Vec b) {
  return parts<Vec>([&](int i) { return vmulq_f32(a.part[i], b.part[i]); });
}
IRKIT_INLINE Vec div(Vec a, Vec b) {
  return parts<Vec>([&](int i) { return vdivq_f32(a.part[i], b.part[i]); });
}
IRKIT_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return parts<Vec>([&](int i) { return vfmaq_f32(c.part[i], a.part[i], b.part[i]); });
}
IRKIT_INLINE Vec max(Vec a, Vec b) {
  return parts<Vec>([&](int i) { return vmaxq_f32(a.part[i], b.part[i]); });
}
IRKIT_INLINE Vec min(Vec a, Vec b) {
  return parts<Vec>([&](int i) { return vminq_f32(a.part[i], b.part[i]); });
}
IRKIT_INLINE Vec abs(Vec a) {
  return parts<Vec>([&](int i) { return vabsq_f32(a.part[i]); });
}
IRKIT_INLINE Vec round(Vec a) {
  return parts<Vec>([&](int i) { return vrndnq_f32(a.part[i]); });
}
// p times two to the power of the whole numbers n, from -126 to 127
IRKIT_INLINE Vec scale2(Vec p, Vec n) {
  return parts<Vec>([&](int i) {
    const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n.part[i]), vdupq_n_s32(127));
    return vmulq_f32(p.part[i], vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
  });
}
// a where x < y, else b
IRKIT_INLINE Vec where_less(Vec x, Vec y, Vec a, Vec b) {
  return parts<Vec>([&](int i) { return vbslq_f32(vcltq_f32(x.part[i], y.part[i]), a.part[i], b.part[i]); });
}
// a where i + lane < bound, else b
IRKIT_INLINE Vec below(int64_t i, Vec bound, Vec a, Vec b) {
  static const float lane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return where_less(add(set1((float)i), load(lane)), bound, a, b);
}
IRKIT_INLINE float32x4_t sum_of_parts(Vec v) {
  return vaddq_f32(vaddq_f32(v.part[0], v.part[1]), vaddq_f32(v.part[2], v.part[3]));
}
IRKIT_INLINE float sum(Vec v) { return vaddvq_f32(sum_of_parts(v)); }
IRKIT_INLINE float largest(Vec v) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(v.part[0], v.part[1]), vmaxq_f32(v.part[2], v.part[3])));
}
// Lane i: the sum of the lanes of v[i].
IRKIT_INLINE Vec sums(const Vec* v) {
  return parts<Vec>([&](int i) {
    const Vec* const four = v + 4 * i;
    return vpaddq_f32(vpaddq_f32(sum_of_parts(four[0]), sum_of_parts(four[1])),
                      vpaddq_f32(sum_of_parts(four[2]), sum_of_parts(four[3])));
  });
}

IRKIT_INLINE Bytes load_bytes(const uint8_t* p) {
  return parts<Bytes>([&](int i) { return vld1q_u8(p + 16 * i); });
}
IRKIT_INLINE Bytes low(Bytes b) {
  return parts<Bytes>([&](int i) { return vandq_u8(b.part[i], vdupq_n_u8(0x0f)); });
}
IRKIT_INLINE Bytes high(Bytes b) {
  return parts<Bytes>([&](int i) { return vshrq_n_u8(b.part[i], 4); });
}
template <int by>
IRKIT_INLINE uint8x16_t moved(uint8x16_t h) {
  if constexpr (by < 0) return vshrq_n_u8(h, -by);
  else return vshlq_n_u8(h, by);
}
// codes with the bits of h that lie under `mask`, moved left by `by`, which may be negative, before masking
template <int by, int mask>
IRKIT_INLINE Bytes with_bits(Bytes codes, Bytes h) {
  return parts<Bytes>(
      [&](int i) { return vorrq_u8(codes.part[i], vandq_u8(moved<by>(h.part[i]), vdupq_n_u8(mask))); });
}

IRKIT_INLINE Acc acc_zero() {
  return parts<Acc>([](int) { return vdupq_n_s32(0); });
}
template <int shift>
IRKIT_INLINE Acc acc_shifted(const int32_t* p) {
  const int32x4_t all = vshlq_n_s32(vdupq_n_s32(*p), shift);
  return {{all, all, all, all}};
}
IRKIT_INLINE Vec to_float(Acc a) {
  return parts<Vec>([&](int i) { return vcvtq_f32_s32(a.part[i]); });
}
// Each lane: acc plus the products of its 4 codes, or in 8 bits of these less their zero, and the 4 int8 at `a`.
template <int bits>
IRKIT_INLINE Acc dot(Acc acc, Bytes codes, const int8_t* a) {
  int32_t quad;
  __builtin_memcpy(&quad, a, 4);
  const int8x16_t all = vreinterpretq_s8_s32(vdupq_n_s32(quad));
  acc = parts<Acc>([&](int i) {
    const uint8x16_t q = bits == 8 ? veorq_u8(codes.part[i], vdupq_n_u8(0x80)) : codes.part[i];
    return vdotq_s32(acc.part[i], vreinterpretq_s8_u8(q), all);
  });
  // Keeps compilers from mixing the sums of several blocks, for which there are too few registers.
  asm("" : "+w"(acc.part[0]), "+w"(acc.part[1]), "+w"(acc.part[2]), "+w"(acc.part[3]));
  return acc;
}
template <int bits, bool all>
Acc settled(Acc acc);  // nothing is held back
// v rounded to int8, to out[16]; the sum of these
IRKIT_INLINE int32_t quantize(Vec v, int8_t* out) {
  int16x4_t whole[4];
  for (int i = 0; i < 4; ++i) whole[i] = vqmovn_s32(vcvtnq_s32_f32(v.part[i]));
  const int8x16_t codes = vcombine_s8(vqmovn_s16(vcombine_s16(whole[0], whole[1])),
                                      vqmovn_s16(vcombine_s16(whole[2], whole[3])));
  vst1q_s8(out, codes);
  return vaddlvq_s8(codes);
}

}  // namespace
}  // namespace irkit
