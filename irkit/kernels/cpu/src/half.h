// float16 and bfloat16 in plain arithmetic. None of it makes or needs subnormal float32 numbers, which the threads of
// a caller may have turned off. Static, for each file is compiled for another machine.
#pragma once

#include <cstdint>
#include <cstring>

namespace irkit {

static inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

static inline float bfloat16_to_float(uint16_t b) { return bits_float((uint32_t)b << 16); }

// The exponents' biases are 15 and 127.
constexpr uint32_t kRebias = (127 - 15) << 23;

static inline float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16;
  const uint32_t rest = h & 0x7FFF;
  const uint32_t subnormal = float_bits((float)(int32_t)rest * 0x1p-24f);
  const uint32_t finite = rest < 0x400 ? subnormal : (rest << 13) + kRebias;
  return bits_float(sign | (rest < 0x7C00 ? finite : (rest << 13) | 0x7F800000));
}

// Rounds to nearest, ties to even.
static inline uint16_t float_to_half(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rest = bits & 0x7FFFFFFF;
  // The last place of numbers from 0.5 to 1 is that of the subnormal ones: the addition rounds.
  const uint32_t subnormal = float_bits(bits_float(rest) + 0.5f) - float_bits(0.5f);
  const uint32_t normal = (rest - kRebias + 0xFFF + (rest >> 13 & 1)) >> 13;
  const uint32_t finite = rest < kRebias + (1 << 23) ? subnormal : normal;
  constexpr uint32_t kOverflow = 0x477FF000;  // 65520: halfway to what would follow the largest
  const uint32_t special = rest > 0x7F800000 ? 0x7E00 : 0x7C00;
  return (uint16_t)((bits >> 16 & 0x8000) | (rest < kOverflow ? finite : special));
}

}  // namespace irkit
