// Sixteen lanes in plain C++ (with the vectors of gcc and clang), for any machine: what the others are checked
// against.
#pragma once

#include <cstdint>

#include "half.h"

#define IRKIT_INLINE static inline __attribute__((always_inline))

// Nothing here is called from elsewhere, so how such vectors are passed does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace irkit {
namespace {

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t Acc __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(64)));

constexpr int kTileRows = 4;
constexpr int kSeveralSums = 3;
constexpr bool kSigned8 = false;
constexpr int kHeldBits = 0;

IRKIT_INLINE Vec zero() { return Vec{}; }
IRKIT_INLINE Vec set1(float x) { return Vec{} + x; }
IRKIT_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
IRKIT_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
IRKIT_INLINE Vec load_half(const uint16_t* p) {
  Vec v;
  for (int i = 0; i < 16; ++i) v[i] = half_to_float(p[i]);
  return v;
}
IRKIT_INLINE void store_half(uint16_t* p, Vec v) {
  for (int i = 0; i < 16; ++i) p[i] = float_to_half(v[i]);
}
IRKIT_INLINE Vec load_bf16(const uint16_t* p) {
  Vec v;
  for (int i = 0; i < 16; ++i) v[i] = bfloat16_to_float(p[i]);
  return v;
}
IRKIT_INLINE Vec choose(Acc mask, Vec a, Vec b) { return (Vec)((mask & (Acc)a) | (~mask & (Acc)b)); }
IRKIT_INLINE Vec add(Vec a, Vec b) { return a + b; }
IRKIT_INLINE Vec sub(Vec a, Vec b) { return a - b; }
IRKIT_INLINE Vec mul(Vec a, Vec b) { return a * b; }
IRKIT_INLINE Vec div(Vec a, Vec b) { return a / b; }
IRKIT_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
IRKIT_INLINE Vec max(Vec a, Vec b) { return choose((Acc)(a > b), a, b); }
IRKIT_INLINE Vec min(Vec a, Vec b) { return choose((Acc)(a < b), a, b); }
IRKIT_INLINE Vec abs(Vec a) { return (Vec)((Acc)a & 0x7fffffff); }
// For numbers below 2^22: adding 1.5 * 2^23 leaves no bits for a fraction.
IRKIT_INLINE Vec round(Vec a) {
  const Vec shifted = a + 12582912.0f;
  return shifted - 12582912.0f;
}
IRKIT_INLINE Acc whole(Vec a) { return __builtin_convertvector(a, Acc); }
// p times two to the power of the whole numbers n, for results that are normal numbers
IRKIT_INLINE Vec scale2(Vec p, Vec n) { return (Vec)((Acc)p + (whole(n) << 23)); }
IRKIT_INLINE Vec where_less(Vec x, Vec y, Vec a, Vec b) { return choose((Acc)(x < y), a, b); }
// a where i + lane < bound, else b
IRKIT_INLINE Vec below(int64_t i, Vec bound, Vec a, Vec b) {
  const Vec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return where_less(lane + (float)i, bound, a, b);
}
IRKIT_INLINE float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < 16; ++i) total += v[i];
  return total;
}
IRKIT_INLINE float largest(Vec v) {
  float found = v[0];
  for (int i = 1; i < 16; ++i) found = v[i] > found ? v[i] : found;
  return found;
}
// Lane i: the sum of the lanes of v[i].
IRKIT_INLINE Vec sums(const Vec* v) {
  Vec total;
  for (int i = 0; i < 16; ++i) total[i] = sum(v[i]);
  return total;
}

IRKIT_INLINE Bytes load_bytes(const uint8_t* p) {
  Bytes b;
  __builtin_memcpy(&b, p, sizeof b);
  return b;
}
IRKIT_INLINE Bytes low(Bytes b) { return b & 15; }
IRKIT_INLINE Bytes high(Bytes b) { return b >> 4; }
// codes with the bits of h that lie under `mask`, moved left by `by`, which may be negative, before masking
template <int by, int mask>
IRKIT_INLINE Bytes with_bits(Bytes codes, Bytes h) {
  return codes | ((by >= 0 ? h << (by >= 0 ? by : 0) : h >> (by < 0 ? -by : 0)) & (uint8_t)mask);
}

IRKIT_INLINE Acc acc_zero() { return Acc{}; }
template <int shift>
IRKIT_INLINE Acc acc_shifted(const int32_t* p) {
  return Acc{} + *p * (1 << shift);
}
IRKIT_INLINE Vec to_float(Acc a) { return __builtin_convertvector(a, Vec); }
// Each lane: acc plus the products of its 4 codes and the 4 int8 at `a`.
template <int bits>
IRKIT_INLINE Acc dot(Acc acc, Bytes codes, const int8_t* a) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the lowest byte of a word is the first code");
  const Words words = (Words)codes;
  for (int j = 0; j < 4; ++j) acc += (Acc)(words >> (8 * j) & 255) * (int32_t)a[j];
  return acc;
}
template <int bits, bool all>
Acc settled(Acc acc);  // nothing is held back
// v rounded to int8, to out[16]; the sum of these
IRKIT_INLINE int32_t quantize(Vec v, int8_t* out) {
  const Acc rounded = whole(round(v));
  int32_t total = 0;
  for (int i = 0; i < 16; ++i) total += out[i] = (int8_t)rounded[i];
  return total;
}

}  // namespace
}  // namespace irkit
