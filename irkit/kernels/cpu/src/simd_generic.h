// Sixteen lanes in plain C++, for any machine: what the others are checked against.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.h"

#define IRKIT_INLINE static inline __attribute__((always_inline))

namespace irkit {
namespace {

struct Vec {
  float lane[16];
};
struct Acc {
  int32_t lane[16];
};
struct Bytes {
  uint8_t at[64];
};

constexpr int kTileRows = 4;
constexpr bool kSigned8 = false;

template <class F>
IRKIT_INLINE Vec lanes(F f) {
  Vec v;
  for (int i = 0; i < 16; ++i) v.lane[i] = f(i);
  return v;
}
template <class F>
IRKIT_INLINE Bytes bytes(F f) {
  Bytes b;
  for (int i = 0; i < 64; ++i) b.at[i] = (uint8_t)f(i);
  return b;
}

IRKIT_INLINE Vec zero() { return Vec{}; }
IRKIT_INLINE Vec set1(float x) { return lanes([&](int) { return x; }); }
IRKIT_INLINE Vec load(const float* p) { return lanes([&](int i) { return p[i]; }); }
IRKIT_INLINE void store(float* p, Vec v) { std::memcpy(p, v.lane, sizeof v.lane); }
IRKIT_INLINE Vec load_half(const uint16_t* p) { return lanes([&](int i) { return half_to_float(p[i]); }); }
IRKIT_INLINE void store_half(uint16_t* p, Vec v) {
  for (int i = 0; i < 16; ++i) p[i] = float_to_half(v.lane[i]);
}
IRKIT_INLINE Vec load_bf16(const uint16_t* p) { return lanes([&](int i) { return bfloat16_to_float(p[i]); }); }
IRKIT_INLINE Vec add(Vec a, Vec b) { return lanes([&](int i) { return a.lane[i] + b.lane[i]; }); }
IRKIT_INLINE Vec sub(Vec a, Vec b) { return lanes([&](int i) { return a.lane[i] - b.lane[i]; }); }
IRKIT_INLINE Vec mul(Vec a, Vec b) { return lanes([&](int i) { return a.lane[i] * b.lane[i]; }); }
IRKIT_INLINE Vec div(Vec a, Vec b) { return lanes([&](int i) { return a.lane[i] / b.lane[i]; }); }
IRKIT_INLINE Vec fma(Vec a, Vec b, Vec c) { return lanes([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; }); }
IRKIT_INLINE Vec max(Vec a, Vec b) { return lanes([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; }); }
IRKIT_INLINE Vec min(Vec a, Vec b) { return lanes([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; }); }
IRKIT_INLINE Vec abs(Vec a) { return lanes([&](int i) { return std::fabs(a.lane[i]); }); }
IRKIT_INLINE Vec round(Vec a) { return lanes([&](int i) { return std::nearbyint(a.lane[i]); }); }
IRKIT_INLINE Vec scale2(Vec p, Vec n) { return lanes([&](int i) { return std::ldexp(p.lane[i], (int)n.lane[i]); }); }
IRKIT_INLINE Vec below(int64_t first, Vec bound, Vec a, Vec b) {
  return lanes([&](int i) { return (float)(first + i) < bound.lane[i] ? a.lane[i] : b.lane[i]; });
}
IRKIT_INLINE Vec where_less(Vec x, Vec y, Vec a, Vec b) {
  return lanes([&](int i) { return x.lane[i] < y.lane[i] ? a.lane[i] : b.lane[i]; });
}
IRKIT_INLINE float sum(Vec v) {
  float total = 0;
  for (float x : v.lane) total += x;
  return total;
}
IRKIT_INLINE float largest(Vec v) {
  float found = v.lane[0];
  for (float x : v.lane) found = x > found ? x : found;
  return found;
}
IRKIT_INLINE Vec sums(const Vec* v) { return lanes([&](int i) { return sum(v[i]); }); }

IRKIT_INLINE Bytes load_bytes(const uint8_t* p) { return bytes([&](int i) { return p[i]; }); }
IRKIT_INLINE Bytes low(Bytes b) { return bytes([&](int i) { return b.at[i] & 15; }); }
IRKIT_INLINE Bytes high(Bytes b) { return bytes([&](int i) { return b.at[i] >> 4; }); }
template <int by, int mask>
IRKIT_INLINE Bytes with_bits(Bytes codes, Bytes h) {
  return bytes([&](int i) { return codes.at[i] | ((by >= 0 ? h.at[i] << (by >= 0 ? by : 0) : h.at[i] >> (by < 0 ? -by : 0)) & mask); });
}

IRKIT_INLINE Acc acc_zero() { return Acc{}; }
template <int shift>
IRKIT_INLINE Acc acc_shifted(const int32_t* p) {
  Acc a;
  for (int32_t& lane : a.lane) lane = *p * (1 << shift);
  return a;
}
IRKIT_INLINE Acc acc_sub(Acc a, Acc b) {
  for (int i = 0; i < 16; ++i) a.lane[i] -= b.lane[i];
  return a;
}
IRKIT_INLINE Vec to_float(Acc a) { return lanes([&](int i) { return (float)a.lane[i]; }); }
template <int bits>
IRKIT_INLINE Acc dot(Acc acc, Bytes codes, const int8_t* a) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j) acc.lane[i] += codes.at[4 * i + j] * a[j];
  return acc;
}
IRKIT_INLINE int32_t quantize(Vec v, int8_t* out) {
  int32_t total = 0;
  for (int i = 0; i < 16; ++i) total += out[i] = (int8_t)std::nearbyint(v.lane[i]);
  return total;
}

}  // namespace
}  // namespace irkit
