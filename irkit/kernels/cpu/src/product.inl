// Matrix products of packed weights and tiles of activations. Included by kernels.cc.

// exp(x), to about 1e-7 of it: two to the whole part of x log2(e), times a polynomial in what is left (coefficients
// of the Cephes library's expf).
IRKIT_INLINE Vec exponential(Vec x) {
  x = min(max(x, set1(-87.0f)), set1(88.0f));
  const Vec n = round(mul(x, set1(1.44269504088896341f)));
  Vec r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  Vec p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  return scale2(fma(mul(p, r), r, add(r, set1(1.0f))), n);
}

IRKIT_INLINE Vec silu(Vec x) { return div(x, add(set1(1.0f), exponential(sub(zero(), x)))); }

// The 64 codes of quad j of the first or the second half of a block.
template <int bits, int half, int j>
IRKIT_INLINE Bytes quad(const uint8_t* codes, const uint8_t* upper) {
  if constexpr (bits == 8) {
    return load_bytes(codes + 64 * (j + 4 * half));
  } else {
    const Bytes both = load_bytes(codes + 64 * j);
    const Bytes four = half ? high(both) : low(both);
    if constexpr (bits == 5) return with_bits<(half ? -j : 4 - j), 0x10>(four, load_bytes(upper));
    if constexpr (bits == 6) return with_bits<4 - 2 * j, 0x30>(four, load_bytes(upper + 64 * half));
    return four;
  }
}

constexpr int log2_of(int power) { return power <= 1 ? 0 : 1 + log2_of(power / 2); }

template <int bits, int n, int half, int j>
IRKIT_INLINE void dot_quad(const uint8_t* codes, const uint8_t* upper, const int8_t* a, Acc* acc) {
  const Bytes w = quad<bits, half, j>(codes, upper);
  IRKIT_UNROLL
  for (int c = 0; c < n; ++c) acc[c] = dot<bits>(acc[c], w, a + ((j + 4 * half) * n + c) * 4);
}

// Adds to `total` the products with one half of a block.
template <int form, int n, int half>
IRKIT_INLINE void half_block(const uint8_t* codes, const uint8_t* upper, const uint16_t* scales, const uint8_t* tile,
                             Vec* total) {
  constexpr FormInfo f = kFormInfo[form];
  constexpr bool from_zero = f.minima || (f.bits == 8 && kSigned8);
  const int8_t* a = (const int8_t*)tile;
  const float* scale = (const float*)(tile + 32 * n) + half * n;
  const int32_t* minus_sum = (const int32_t*)(tile + 32 * n) + (3 + half) * n;
  Acc acc[n];
  IRKIT_UNROLL
  for (int c = 0; c < n; ++c) acc[c] = from_zero ? acc_zero() : acc_shifted<log2_of(f.zero)>(minus_sum + c);
  dot_quad<f.bits, n, half, 0>(codes, upper, a, acc);
  dot_quad<f.bits, n, half, 1>(codes, upper, a, acc);
  dot_quad<f.bits, n, half, 2>(codes, upper, a, acc);
  dot_quad<f.bits, n, half, 3>(codes, upper, a, acc);
  if constexpr (kHeldBits >= f.bits) {
    IRKIT_UNROLL
    for (int c = 0; c < n; ++c) acc[c] = settled<f.bits, true>(acc[c]);
  }
  const Vec s = load_half(scales + (f.groups == 2 ? 16 * half : 0));
  IRKIT_UNROLL
  for (int c = 0; c < n; ++c) total[c] = fma(to_float(acc[c]), mul(s, set1(scale[c])), total[c]);
}

// Up to so many rows it is the weights that are waited for, and they are asked for ahead.
constexpr int kFewRows = 8;

// out[c * 16 + i]: row i of the panel times row c of a tile of n.
template <int form, int n>
void coded_panel(const uint8_t* panel, const PanelLayout& at, int64_t cols, const uint8_t* tile, float* out) {
  constexpr FormInfo f = kFormInfo[form];
  Vec total[n];
  IRKIT_UNROLL
  for (int c = 0; c < n; ++c) total[c] = zero();
  constexpr int64_t kLines = (panel_layout((Form)form, 64 * kBlock).bytes / 64 + 63) / 64;  // of a block, rounded up
  const uint8_t* ahead = panel + at.bytes;
  const uint8_t* codes = panel;
  const uint8_t* upper = panel + at.high;
  const uint16_t* scales = (const uint16_t*)(panel + at.scales);
  const uint16_t* minima = (const uint16_t*)(panel + at.minima);
  for (int64_t b = cols / kBlock; b > 0; --b) {
    if (n <= kFewRows) {
      // With few rows memory is what is waited for: the next panel is asked for while this one is read.
      IRKIT_UNROLL
      for (int64_t line = 0; line < kLines; ++line) __builtin_prefetch(ahead + 64 * line, 0, 1);
      ahead += 64 * kLines;
    }
    half_block<form, n, 0>(codes, upper, scales, tile, total);
    half_block<form, n, 1>(codes, upper, scales, tile, total);
    if constexpr (f.minima) {
      const Vec m = load_half(minima);
      const float* scaled_sum = (const float*)(tile + 32 * n) + 2 * n;
      IRKIT_UNROLL
      for (int c = 0; c < n; ++c) total[c] = fma(m, set1(scaled_sum[c]), total[c]);
    }
    codes += f.bits == 8 ? 512 : 256;
    upper += f.bits == 5 ? 64 : 128;
    scales += 16 * f.groups;
    minima += 16;
    tile += kCodedBlock * n;
  }
  IRKIT_UNROLL
  for (int c = 0; c < n; ++c) store(out + 16 * c, total[c]);
}

template <int form>
IRKIT_INLINE Vec load_numbers(const uint8_t* panel, int64_t column) {
  if constexpr (form == kF32) return load((const float*)panel + 16 * column);
  if constexpr (form == kF16) return load_half((const uint16_t*)panel + 16 * column);
  return load_bf16((const uint16_t*)panel + 16 * column);
}

// How far ahead numbers are asked for, in bytes. A panel of them is one stream, which the core's own prefetching keeps
// up with when it is led by a little: with 4096 bytes a quarter less was read in the same time.
constexpr int64_t kFloatsAhead = 512;

// With few rows in all, the sums of one column would wait for each other: two of each are kept. Not so in the last tile
// of many rows: whatever its place among them, a row has the same bits.
template <int form, int n, int ways>
void float_panel(const uint8_t* panel, const PanelLayout& at, int64_t cols, const uint8_t* tile, float* out) {
  constexpr int64_t kColumn = kRows * kFormInfo[form].bits / 8;
  const float* a = (const float*)tile;
  Vec total[ways][n];
  IRKIT_UNROLL
  for (int way = 0; way < ways; ++way) {
    IRKIT_UNROLL
    for (int c = 0; c < n; ++c) total[way][c] = zero();
  }
  int64_t k = 0;
  for (; k + ways <= cols; k += ways) {
    // With many rows there is time to have the whole next panel come, which the first of their tiles waits for.
    const uint8_t* const ahead = panel + k * kColumn + (n <= kFewRows ? kFloatsAhead : at.bytes);
    IRKIT_UNROLL
    for (int64_t byte = 0; byte < ways * kColumn; byte += 64) __builtin_prefetch(ahead + byte, 0, 1);
    IRKIT_UNROLL
    for (int way = 0; way < ways; ++way) {
      const Vec w = load_numbers<form>(panel, k + way);
      IRKIT_UNROLL
      for (int c = 0; c < n; ++c) total[way][c] = fma(w, set1(a[(k + way) * n + c]), total[way][c]);
    }
  }
  for (; k < cols; ++k) {
    const Vec w = load_numbers<form>(panel, k);
    IRKIT_UNROLL
    for (int c = 0; c < n; ++c) total[0][c] = fma(w, set1(a[k * n + c]), total[0][c]);
  }
  IRKIT_UNROLL
  for (int way = 1; way < ways; ++way) {
    IRKIT_UNROLL
    for (int c = 0; c < n; ++c) total[0][c] = add(total[0][c], total[way][c]);
  }
  IRKIT_UNROLL
  for (int c = 0; c < n; ++c) store(out + 16 * c, total[0][c]);
}

using PanelFunction = void (*)(const uint8_t*, const PanelLayout&, int64_t, const uint8_t*, float*);

template <int form, int n, bool few>
constexpr PanelFunction panel_function() {
  if constexpr (n > (few ? kSeveralSums : kTileRows)) {
    return nullptr;
  } else if constexpr (kFormInfo[form].groups > 0) {
    return coded_panel<form, n>;
  } else {
    return float_panel<form, n, few ? 2 : 1>;
  }
}

constexpr int kMostRows = 12;
static_assert(kTileRows <= kMostRows, "a row more in the table below");
static_assert(kSeveralSums <= kTileRows, "few rows are one tile");
#define IRKIT_ROW(f, few)                                                                              \
  {panel_function<f, 1, few>(), panel_function<f, 2, few>(),  panel_function<f, 3, few>(),              \
   panel_function<f, 4, few>(), panel_function<f, 5, few>(),  panel_function<f, 6, few>(),              \
   panel_function<f, 7, few>(), panel_function<f, 8, few>(),  panel_function<f, 9, few>(),              \
   panel_function<f, 10, few>(), panel_function<f, 11, few>(), panel_function<f, 12, few>()}
#define IRKIT_ROWS(few)                                                                                \
  {IRKIT_ROW(kQ4, few), IRKIT_ROW(kQ4M, few), IRKIT_ROW(kQ5, few),   IRKIT_ROW(kQ5M, few), IRKIT_ROW(kQ6, few), \
   IRKIT_ROW(kQ8, few), IRKIT_ROW(kF16, few), IRKIT_ROW(kBF16, few), IRKIT_ROW(kF32, few)}
constexpr PanelFunction kPanelFunctions[2][kForms][kMostRows] = {IRKIT_ROWS(false), IRKIT_ROWS(true)};
#undef IRKIT_ROWS
#undef IRKIT_ROW

// A panel's products with the tile, bias included.
IRKIT_INLINE void panel_times_tile(const Matrix& m, const PanelLayout& at, int64_t panel, const Tiles& x, int64_t first,
                                   int n, float* out) {
  const bool coded = kFormInfo[m.form].groups > 0;
  const int64_t blocks = (m.cols + kBlock - 1) / kBlock;
  const uint8_t* tile = coded ? x.coded + first * blocks * kCodedBlock : (const uint8_t*)(x.floats + first * blocks * 32);
  kPanelFunctions[x.rows <= kSeveralSums][m.form][n - 1](m.data + panel * at.bytes, at, m.cols, tile, out);
  if (!m.bias) return;
  for (int64_t i = 0; i < kRows && panel * kRows + i < m.rows; ++i)
    for (int c = 0; c < n; ++c) out[16 * c + i] += m.bias[panel * kRows + i];
}

void multiply(const Product& p, int64_t first_panel, int64_t last_panel, int64_t first_tile, int64_t last_tile) {
  const PanelLayout at = panel_layout(p.matrix.form, p.matrix.cols);
  const PanelLayout up_at = p.finish == Finish::kGate ? panel_layout(p.up.form, p.up.cols) : at;
  alignas(64) float y[16 * kTileRows], up[16 * kTileRows];
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    const int64_t first = tile * kTileRows;
    const int n = (int)(p.x.rows - first < kTileRows ? p.x.rows - first : kTileRows);
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      panel_times_tile(p.matrix, at, panel, p.x, first, n, y);
      if (p.finish == Finish::kGate) {
        panel_times_tile(p.up, up_at, panel, p.x, first, n, up);
        for (int c = 0; c < n; ++c) store(y + 16 * c, mul(silu(load(y + 16 * c)), load(up + 16 * c)));
      }
      const int64_t rows = p.matrix.rows - panel * kRows;
      for (int c = 0; c < n; ++c) {
        const int64_t to = (first + c) * p.stride + panel * kRows;
        if (rows >= kRows) {
          const Vec v = load(y + 16 * c);
          if (p.alone) store(p.alone + to, v);
          store(p.out + to, p.finish == Finish::kAdd ? add(v, load(p.add + to)) : v);
        } else {
          for (int64_t i = 0; i < rows; ++i) {
            if (p.alone) p.alone[to + i] = y[16 * c + i];
            p.out[to + i] = y[16 * c + i] + (p.finish == Finish::kAdd ? p.add[to + i] : 0);
          }
        }
      }
    }
  }
}

// Sixteen numbers of x from column k on, zero past the end, normed.
IRKIT_INLINE Vec normed(const float* x, int64_t k, int64_t cols, const float* norm, Vec factor) {
  alignas(64) float part[2][16] = {};
  if (k + 16 > cols) {
    for (int64_t i = 0; k + i < cols; ++i) {
      part[0][i] = x[k + i];
      part[1][i] = norm ? norm[k + i] : 1.0f;
    }
    return mul(mul(load(part[0]), factor), load(part[1]));
  }
  const Vec v = load(x + k);
  return norm ? mul(mul(v, factor), load(norm + k)) : v;
}

IRKIT_INLINE float mean_square(const float* x, int64_t count) {
  Vec squares = zero();
  float rest = 0;
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) squares = fma(load(x + i), load(x + i), squares);
  for (; i < count; ++i) rest += x[i] * x[i];
  return (sum(squares) + rest) / (float)count;
}

void norm(const float* x, int64_t count, float eps, float* scale, float* normalized) {
  const float root = __builtin_sqrtf(mean_square(x, count) + eps);
  if (scale) *scale = root;
  for (int64_t i = 0; normalized && i < count; ++i) normalized[i] = x[i] / root;
}

void gate(const float* x, const float* y, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(out + i, mul(silu(load(x + i)), load(y + i)));
  alignas(64) float part[2][16] = {};
  for (int64_t j = i; j < count; ++j) {
    part[0][j - i] = x[j];
    part[1][j - i] = y[j];
  }
  store(part[0], mul(silu(load(part[0])), load(part[1])));
  for (int64_t j = i; j < count; ++j) out[j] = part[0][j - i];
}

// A block of a row of the tile that begins with row `start` and has n: its numbers, and their codes.
IRKIT_INLINE void prepare_block(Vec v0, Vec v1, const Tiles& tiles, int64_t start, int64_t blocks, int64_t b, int64_t n,
                                int64_t c) {
  if (tiles.floats) {
    alignas(64) float numbers[32];
    store(numbers, v0);
    store(numbers + 16, v1);
    float* to = tiles.floats + (start * blocks + b * n) * 32 + c;
    for (int i = 0; i < 32; ++i) to[i * n] = numbers[i];
  }
  if (tiles.coded) {
    uint8_t* to = tiles.coded + (start * blocks + b * n) * kCodedBlock;
    const Vec halves[2] = {v0, v1};
    float* floats = (float*)(to + 32 * n) + c;
    int32_t* sums = (int32_t*)(to + 32 * n) + 3 * n + c;
    floats[2 * n] = 0;
    for (int half = 0; half < 2; ++half) {
      const float most = largest(abs(halves[half]));
      alignas(16) int8_t codes[16];
      const int32_t sum = quantize(mul(halves[half], set1(most > 0 ? 127.0f / most : 0.0f)), codes);
      for (int j = 0; j < 4; ++j) __builtin_memcpy(to + ((j + 4 * half) * n + c) * 4, codes + 4 * j, 4);
      floats[half * n] = most / 127.0f;
      floats[2 * n] += most / 127.0f * (float)sum;
      sums[half * n] = -sum;
    }
  }
}

void prepare(const float* x, int64_t stride, const float* norm, float eps, Tiles tiles, int64_t first, int64_t last) {
  const int64_t cols = tiles.cols, blocks = (cols + kBlock - 1) / kBlock;
  for (int64_t row = first, end; row < last; row = end) {
    const int64_t start = row / kTileRows * kTileRows;
    const int64_t n = tiles.rows - start < kTileRows ? tiles.rows - start : kTileRows;
    end = start + n < last ? start + n : last;
    Vec factor[kTileRows];
    for (int64_t r = row; r < end; ++r)
      factor[r - row] = set1(norm ? 1.0f / __builtin_sqrtf(mean_square(x + r * stride, cols) + eps) : 1.0f);
    // Block by block: the rows of a block lie among each other, and a wide tile is more than the first cache holds.
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t r = row; r < end; ++r) {
        const Vec v0 = normed(x + r * stride, b * kBlock, cols, norm, factor[r - row]);
        const Vec v1 = normed(x + r * stride, b * kBlock + 16, cols, norm, factor[r - row]);
        prepare_block(v0, v1, tiles, start, blocks, b, n, r - start);
      }
    }
  }
}
