// Sixteen lanes in AVX2 with FMA and F16C: two registers each.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define IRKIT_INLINE static inline __attribute__((always_inline))

namespace irkit {
namespace {

// 16 float32
struct Vec {
  __m256 lo, hi;
};
// 16 int32, and what is not yet added to them: 32 int16, two for each
struct Acc {
  __m256i lo, hi, held_lo, held_hi;
};
// 64 codes
struct Bytes {
  __m256i lo, hi;
};

constexpr int kTileRows = 6;
constexpr int kSeveralSums = 3;
constexpr bool kSigned8 = true;
constexpr int kHeldBits = 5;  // codes of at most so many have their products held in 16 bits, see settled()

IRKIT_INLINE Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
IRKIT_INLINE Vec set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
IRKIT_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
IRKIT_INLINE void store(float* p, Vec v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
IRKIT_INLINE __m128i load_eight(const uint16_t* p) { return _mm_loadu_si128((const __m128i*)p); }
IRKIT_INLINE Vec load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(load_eight(p)), _mm256_cvtph_ps(load_eight(p + 8))};
}
IRKIT_INLINE void store_half(uint16_t* p, Vec v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(v.hi, _MM_FROUND_TO_NEAREST_INT));
}
IRKIT_INLINE __m256 from_bf16(__m128i eight) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
}
IRKIT_INLINE Vec load_bf16(const uint16_t* p) { return {from_bf16(load_eight(p)), from_bf16(load_eight(p + 8))}; }
IRKIT_INLINE Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
IRKIT_INLINE Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
IRKIT_INLINE Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
IRKIT_INLINE Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
IRKIT_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
IRKIT_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
IRKIT_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
IRKIT_INLINE Vec abs(Vec a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
IRKIT_INLINE Vec round(Vec a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kNearest), _mm256_round_ps(a.hi, kNearest)};
}
// Two to the power of n, from -126 to 127.
IRKIT_INLINE __m256 power2(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
// p times two to the power of the whole numbers n
IRKIT_INLINE Vec scale2(Vec p, Vec n) { return mul(p, {power2(n.lo), power2(n.hi)}); }
// a where x < y, else b
IRKIT_INLINE Vec where_less(Vec x, Vec y, Vec a, Vec b) {
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_cmp_ps(x.lo, y.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_cmp_ps(x.hi, y.hi, _CMP_LT_OQ))};
}
// a where i + lane < bound, else b
IRKIT_INLINE Vec below(int64_t i, Vec bound, Vec a, Vec b) {
  const Vec lane = {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_ps(8, 9, 10, 11, 12, 13, 14, 15)};
  return where_less(add(set1((float)i), lane), bound, a, b);
}
IRKIT_INLINE float sum(Vec v) {
  const __m256 eight = _mm256_add_ps(v.lo, v.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
IRKIT_INLINE float largest(Vec v) {
  const __m256 eight = _mm256_max_ps(v.lo, v.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// Lane i: the sum of the lanes of v[i], for eight of them.
IRKIT_INLINE __m256 sums_of_eight(const Vec* v) {
  __m256 pairs[4], quads[2];
  for (int i = 0; i < 4; ++i)
    pairs[i] = _mm256_hadd_ps(_mm256_add_ps(v[2 * i].lo, v[2 * i].hi), _mm256_add_ps(v[2 * i + 1].lo, v[2 * i + 1].hi));
  for (int i = 0; i < 2; ++i) quads[i] = _mm256_hadd_ps(pairs[2 * i], pairs[2 * i + 1]);
  return _mm256_add_ps(_mm256_permute2f128_ps(quads[0], quads[1], 0x20),
                       _mm256_permute2f128_ps(quads[0], quads[1], 0x31));
}
IRKIT_INLINE Vec sums(const Vec* v) { return {sums_of_eight(v), sums_of_eight(v + 8)}; }

IRKIT_INLINE Bytes load_bytes(const uint8_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
IRKIT_INLINE Bytes low(Bytes b) {
  const __m256i mask = _mm256_set1_epi8(0x0f);
  return {_mm256_and_si256(b.lo, mask), _mm256_and_si256(b.hi, mask)};
}
IRKIT_INLINE Bytes high(Bytes b) { return low({_mm256_srli_epi16(b.lo, 4), _mm256_srli_epi16(b.hi, 4)}); }
template <int by, int mask>
IRKIT_INLINE __m256i with_bits_of(__m256i codes, __m256i h) {
  const __m256i moved = by >= 0 ? _mm256_slli_epi16(h, by >= 0 ? by : 0) : _mm256_srli_epi16(h, by < 0 ? -by : 0);
  return _mm256_or_si256(codes, _mm256_and_si256(moved, _mm256_set1_epi8(mask)));
}
// codes with the bits of h that lie under `mask`, moved left by `by`, which may be negative, before masking
template <int by, int mask>
IRKIT_INLINE Bytes with_bits(Bytes codes, Bytes h) {
  return {with_bits_of<by, mask>(codes.lo, h.lo), with_bits_of<by, mask>(codes.hi, h.hi)};
}

IRKIT_INLINE Acc acc_of(__m256i lo, __m256i hi) { return {lo, hi, _mm256_setzero_si256(), _mm256_setzero_si256()}; }
IRKIT_INLINE Acc acc_zero() { return acc_of(_mm256_setzero_si256(), _mm256_setzero_si256()); }
template <int shift>
IRKIT_INLINE Acc acc_shifted(const int32_t* p) {
  const __m256i all = _mm256_slli_epi32(_mm256_set1_epi32(*p), shift);
  return acc_of(all, all);
}
IRKIT_INLINE Vec to_float(Acc a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
IRKIT_INLINE __m256i with_pairs(__m256i acc, __m256i held) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(held, _mm256_set1_epi16(1)));
}
// The products of codes and int8, summed two by two. Those of 8 bits less their zero have their sign moved to the other
// factor: two products of a code above 128 would not fit 16 bits.
template <int bits>
IRKIT_INLINE __m256i pairs(__m256i codes, __m256i a) {
  if constexpr (bits < 8) return _mm256_maddubs_epi16(codes, a);
  const __m256i q = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
  return _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(a, q));
}
// Each lane: acc plus the products of its 4 codes and the 4 int8 at `a`. Those of few bits are held in 16, as many as
// these hold: 16 products of 4 bits, or 8 of 5. Of 6 it would be 4, and the way there and back costs more than it saves.
template <int bits>
IRKIT_INLINE Acc dot(Acc acc, Bytes codes, const int8_t* a) {
  int32_t quad;
  __builtin_memcpy(&quad, a, 4);
  const __m256i all = _mm256_set1_epi32(quad);
  // gcc would put off the additions to the end of the block, and spill all the products until then.
  if constexpr (bits > 5) {
    acc.lo = with_pairs(acc.lo, pairs<bits>(codes.lo, all));
    acc.hi = with_pairs(acc.hi, pairs<bits>(codes.hi, all));
    asm("" : "+x"(acc.lo), "+x"(acc.hi));
  } else {
    acc.held_lo = _mm256_add_epi16(acc.held_lo, pairs<bits>(codes.lo, all));
    acc.held_hi = _mm256_add_epi16(acc.held_hi, pairs<bits>(codes.hi, all));
    asm("" : "+x"(acc.held_lo), "+x"(acc.held_hi));
  }
  return acc;
}
// acc with nothing held that would not fit with more, after half of a block and after all of it
template <int bits, bool all>
IRKIT_INLINE Acc settled(Acc acc) {
  if constexpr (bits > 5 || (bits == 4 && !all)) return acc;
  else return acc_of(with_pairs(acc.lo, acc.held_lo), with_pairs(acc.hi, acc.held_hi));
}
// v rounded to int8, to out[16]; the sum of these
IRKIT_INLINE int32_t quantize(Vec v, int8_t* out) {
  const __m256i shorts = _mm256_packs_epi32(_mm256_cvtps_epi32(v.lo), _mm256_cvtps_epi32(v.hi));
  const __m256i ordered = _mm256_permute4x64_epi64(shorts, 0xd8);
  const __m128i codes = _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
  _mm_storeu_si128((__m128i*)out, codes);
  // The sum of unsigned bytes is an instruction: 128 more, each.
  const __m128i two = _mm_sad_epu8(_mm_xor_si128(codes, _mm_set1_epi8(-128)), _mm_setzero_si128());
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_unpackhi_epi64(two, two))) - 16 * 128;
}

}  // namespace
}  // namespace irkit
