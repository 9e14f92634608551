// Sixteen lanes in AVX-512 with VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define IRKIT_INLINE static inline __attribute__((always_inline))

namespace irkit {
namespace {

using Vec = __m512;     // 16 float32
using Acc = __m512i;    // 16 int32
using Bytes = __m512i;  // 64 codes

constexpr int kTileRows = 12;
constexpr int kSeveralSums = 8;  // as many as a batch of answers has: in it they get the same bits as alone
constexpr bool kSigned8 = false;
constexpr int kHeldBits = 0;

IRKIT_INLINE Vec zero() { return _mm512_setzero_ps(); }
IRKIT_INLINE Vec set1(float x) { return _mm512_set1_ps(x); }
IRKIT_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
IRKIT_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
IRKIT_INLINE Vec load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
IRKIT_INLINE void store_half(uint16_t* p, Vec v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
IRKIT_INLINE Vec load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
IRKIT_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
IRKIT_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
IRKIT_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
IRKIT_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
IRKIT_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
IRKIT_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
IRKIT_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
IRKIT_INLINE Vec abs(Vec a) { return _mm512_abs_ps(a); }
IRKIT_INLINE Vec round(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// p times two to the power of the whole numbers n
IRKIT_INLINE Vec scale2(Vec p, Vec n) { return _mm512_scalef_ps(p, n); }
// a where i + lane < bound, else b
IRKIT_INLINE Vec below(int64_t i, Vec bound, Vec a, Vec b) {
  const Vec lane = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(add(set1((float)i), lane), bound, _CMP_LT_OQ), b, a);
}
// a where x < y, else b
IRKIT_INLINE Vec where_less(Vec x, Vec y, Vec a, Vec b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_LT_OQ), b, a);
}
IRKIT_INLINE float sum(Vec v) { return _mm512_reduce_add_ps(v); }
IRKIT_INLINE float largest(Vec v) { return _mm512_reduce_max_ps(v); }

// Lane i: the sum of the lanes of v[i].
IRKIT_INLINE Vec sums(const Vec* v) {
  Vec u[4], w[2];
  for (int i = 0; i < 4; ++i) {
    const Vec a = add(_mm512_unpacklo_ps(v[4 * i], v[4 * i + 1]), _mm512_unpackhi_ps(v[4 * i], v[4 * i + 1]));
    const Vec b = add(_mm512_unpacklo_ps(v[4 * i + 2], v[4 * i + 3]), _mm512_unpackhi_ps(v[4 * i + 2], v[4 * i + 3]));
    const __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
    const __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
    u[i] = add(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));
  }
  for (int i = 0; i < 2; ++i)
    w[i] = add(_mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0x88), _mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0xdd));
  return add(_mm512_shuffle_f32x4(w[0], w[1], 0x88), _mm512_shuffle_f32x4(w[0], w[1], 0xdd));
}

IRKIT_INLINE Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
IRKIT_INLINE Bytes low(Bytes b) { return _mm512_and_si512(b, _mm512_set1_epi8(0x0f)); }
IRKIT_INLINE Bytes high(Bytes b) { return _mm512_and_si512(_mm512_srli_epi16(b, 4), _mm512_set1_epi8(0x0f)); }
// codes with the bits of h that lie under `mask`, moved left by `by`, which may be negative, before masking
template <int by, int mask>
IRKIT_INLINE Bytes with_bits(Bytes codes, Bytes h) {
  const Bytes moved = by >= 0 ? _mm512_slli_epi16(h, by >= 0 ? by : 0) : _mm512_srli_epi16(h, by < 0 ? -by : 0);
  return _mm512_ternarylogic_epi32(codes, moved, _mm512_set1_epi8(mask), 0xf8);  // codes | (moved & mask)
}

IRKIT_INLINE Acc acc_zero() { return _mm512_setzero_si512(); }
template <int shift>
IRKIT_INLINE Acc acc_shifted(const int32_t* p) {
  return _mm512_slli_epi32(_mm512_set1_epi32(*p), shift);
}
IRKIT_INLINE Vec to_float(Acc a) { return _mm512_cvtepi32_ps(a); }
// Each lane: acc plus the products of its 4 codes and the 4 int8 at `a`.
template <int bits>
IRKIT_INLINE Acc dot(Acc acc, Bytes codes, const int8_t* a) {
  int32_t quad;
  __builtin_memcpy(&quad, a, 4);
  return _mm512_dpbusd_epi32(acc, codes, _mm512_set1_epi32(quad));
}
template <int bits, bool all>
Acc settled(Acc acc);  // nothing is held back
// v rounded to int8, to out[16]; the sum of these
IRKIT_INLINE int32_t quantize(Vec v, int8_t* out) {
  const __m128i codes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v));
  _mm_storeu_si128((__m128i*)out, codes);
  // The sum of unsigned bytes is an instruction: 128 more, each.
  const __m128i two = _mm_sad_epu8(_mm_xor_si128(codes, _mm_set1_epi8(-128)), _mm_setzero_si128());
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_unpackhi_epi64(two, two))) - 16 * 128;
}

}  // namespace
}  // namespace irkit
