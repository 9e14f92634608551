// Attention over the cache where it lies. Included by kernels.cc. d_head is a multiple of 16.

IRKIT_INLINE Vec load_cached(Cached c, int64_t index) {
  return c.half ? load_half((const uint16_t*)c.data + index) : load((const float*)c.data + index);
}

// Has memory send some numbers of the cache into this core's second cache.
IRKIT_INLINE void ask_for(Cached c, int64_t index, int64_t count) {
  const int64_t size = c.half ? 2 : 4;
  const uint8_t* const from = (const uint8_t*)c.data + index * size;
  for (int64_t at = 0; at < count * size; at += 64) __builtin_prefetch(from + at, 0, 1);
}

constexpr float kLowest = -1e30f;  // below every score; finite, so that differences are numbers

// Lanes are dimensions of the head: a key is read once for all rows, and 16 sums are folded at a time.
template <int rows, bool half>
void attend_rows(const FewQueries& f, int first_row) {
  const int64_t h = f.d_head;
  const Cached keys = {f.keys.data, half}, values = {f.values.data, half};
  for (int r = 0; r < rows; ++r) {
    float* out = f.partial + (first_row + r) * (h + 2);
    out[0] = kLowest;
    out[1] = 0;
    for (int64_t i = 0; i < h; ++i) out[2 + i] = 0;
  }
  for (int64_t key = f.first; key < f.last; key += 16) {
    const int count = (int)(f.last - key < 16 ? f.last - key : 16);
    ask_for(keys, (key + 16) * h, 16 * h);
    ask_for(values, (key + 16) * h, 16 * h);
    Vec parts[rows][16];
    for (int j = 0; j < 16; ++j) {
      Vec sum[rows];
      IRKIT_UNROLL
      for (int r = 0; r < rows; ++r) sum[r] = zero();
      if (j < count) {
        for (int64_t i = 0; i < h; i += 16) {
          const Vec k = load_cached(keys, (key + j) * h + i);
          IRKIT_UNROLL
          for (int r = 0; r < rows; ++r) sum[r] = fma(k, load(f.q[first_row + r] + i), sum[r]);
        }
      }
      IRKIT_UNROLL
      for (int r = 0; r < rows; ++r) parts[r][j] = sum[r];
    }
    alignas(64) float weights[rows][16];
    Vec correction[rows];
    for (int r = 0; r < rows; ++r) {
      float* out = f.partial + (first_row + r) * (h + 2);
      int64_t end = f.limit[first_row + r] < f.last ? f.limit[first_row + r] : f.last;
      const Vec low = set1(kLowest);
      const Vec score = below(0, set1((float)(end - key)), mul(sums(parts[r]), set1(f.scale)), low);
      const float most = largest(score);
      const float top = most > out[0] ? most : out[0];
      const Vec weight = where_less(set1(0.5f * kLowest), score, exponential(sub(score, set1(top))), zero());
      alignas(64) float shrink[16];
      store(shrink, exponential(set1(out[0] - top)));
      correction[r] = set1(shrink[0]);
      out[1] = out[1] * shrink[0] + sum(weight);
      out[0] = top;
      store(weights[r], weight);
    }
    for (int64_t i = 0; i < h; i += 16) {
      Vec mix[rows];
      IRKIT_UNROLL
      for (int r = 0; r < rows; ++r)
        mix[r] = mul(load(f.partial + (first_row + r) * (h + 2) + 2 + i), correction[r]);
      for (int j = 0; j < count; ++j) {
        const Vec v = load_cached(values, (key + j) * h + i);
        IRKIT_UNROLL
        for (int r = 0; r < rows; ++r) mix[r] = fma(v, set1(weights[r][j]), mix[r]);
      }
      IRKIT_UNROLL
      for (int r = 0; r < rows; ++r) store(f.partial + (first_row + r) * (h + 2) + 2 + i, mix[r]);
    }
  }
}

template <bool half>
void attend_few_of(const FewQueries& f) {
  int row = 0;
  for (; row + 4 <= f.rows; row += 4) attend_rows<4, half>(f, row);
  if (f.rows - row == 3) attend_rows<3, half>(f, row);
  if (f.rows - row == 2) attend_rows<2, half>(f, row);
  if (f.rows - row == 1) attend_rows<1, half>(f, row);
}

void attend_few(const FewQueries& f) { f.keys.half ? attend_few_of<true>(f) : attend_few_of<false>(f); }

void merge(const float* partial, int64_t parts, int64_t step, int rows, int64_t d_head, float* const* z) {
  for (int r = 0; r < rows; ++r) {
    const float* from = partial + r * (d_head + 2);
    float most = kLowest, total = 0;
    for (int64_t p = 0; p < parts; ++p) most = from[p * step] > most ? from[p * step] : most;
    for (int64_t i = 0; i < d_head; ++i) z[r][i] = 0;
    for (int64_t p = 0; p < parts; ++p) {
      const float* part = from + p * step;
      alignas(64) float weight[16];
      store(weight, exponential(set1(part[0] - most)));
      total += weight[0] * part[1];
      for (int64_t i = 0; i < d_head; i += 16)
        store(z[r] + i, fma(load(part + 2 + i), set1(weight[0]), load(z[r] + i)));
    }
    for (int64_t i = 0; i < d_head; i += 16) store(z[r] + i, div(load(z[r] + i), set1(total)));
  }
}

// Lanes are tokens: keys and values are turned into float32 once for all of them, and enter number by number.
void attend_many(const ManyQueries& m) {
  const int64_t h = m.d_head;
  float* keys = m.scratch;
  float* values = keys + kKeys * h;
  float* scores = values + kKeys * h;   // [kKeys][16]
  float* state = scores + kKeys * 16;   // a head's: q [h][16], mix [h][16], largest score and sum [16]
  const int64_t state_size = (2 * h + 2) * 16;
  for (int64_t head = 0; head < m.heads; ++head) {
    float* q = state + head * state_size;
    for (int64_t i = 0; i < h; ++i)
      for (int t = 0; t < 16; ++t) q[i * 16 + t] = t < m.count ? m.q[t * m.q_stride + head * h + i] * m.scale : 0.0f;
    for (int64_t i = 0; i < h * 16; ++i) q[h * 16 + i] = 0;
    store(q + 2 * h * 16, set1(kLowest));
    store(q + 2 * h * 16 + 16, zero());
  }
  const int64_t end = m.limit + m.count - 1;  // keys that the last token sees
  for (int64_t key = 0; key < end; key += kKeys) {
    const int64_t count = end - key < kKeys ? end - key : kKeys;
    for (int64_t i = 0; i < count * h; i += 16) {
      store(keys + i, load_cached(m.keys, key * h + i));
      store(values + i, load_cached(m.values, key * h + i));
    }
    for (int64_t head = 0; head < m.heads; ++head) {
      float* q = state + head * state_size;
      float* mix = q + h * 16;
      Vec top = load(mix + h * 16), most = top;
      for (int64_t j = 0; j < kKeys; j += 8) {
        Vec score[8];
        IRKIT_UNROLL
        for (int e = 0; e < 8; ++e) score[e] = zero();
        for (int64_t i = 0; i < h; ++i) {
          const Vec lane = load(q + i * 16);
          IRKIT_UNROLL
          for (int e = 0; e < 8; ++e) score[e] = fma(lane, set1(keys[(j + e) * h + i]), score[e]);
        }
        IRKIT_UNROLL
        for (int e = 0; e < 8; ++e) {
          // Token t sees keys below limit + t.
          const Vec seen = set1((float)(key + j + e + 1 - m.limit));
          const Vec masked = j + e < count ? below(0, seen, set1(kLowest), score[e]) : set1(kLowest);
          most = max(most, masked);
          store(scores + (j + e) * 16, masked);
        }
      }
      const Vec shrink = exponential(sub(top, most));
      Vec total = mul(load(mix + h * 16 + 16), shrink);
      for (int64_t j = 0; j < kKeys; ++j) {
        const Vec score = load(scores + j * 16);
        const Vec weight = where_less(set1(0.5f * kLowest), score, exponential(sub(score, most)), zero());
        total = add(total, weight);
        store(scores + j * 16, weight);
      }
      store(mix + h * 16, most);
      store(mix + h * 16 + 16, total);
      for (int64_t i = 0; i < h; i += 8) {
        Vec part[8];
        IRKIT_UNROLL
        for (int e = 0; e < 8; ++e) part[e] = mul(load(mix + (i + e) * 16), shrink);
        for (int64_t j = 0; j < count; ++j) {
          const Vec weight = load(scores + j * 16);
          IRKIT_UNROLL
          for (int e = 0; e < 8; ++e) part[e] = fma(weight, set1(values[j * h + i + e]), part[e]);
        }
        IRKIT_UNROLL
        for (int e = 0; e < 8; ++e) store(mix + (i + e) * 16, part[e]);
      }
    }
  }
  for (int64_t head = 0; head < m.heads; ++head) {
    float* mix = state + head * state_size + h * 16;
    const Vec total = load(mix + h * 16 + 16);
    for (int64_t i = 0; i < h; ++i) store(mix + i * 16, div(load(mix + i * 16), total));
    for (int t = 0; t < m.count; ++t)
      for (int64_t i = 0; i < h; ++i) m.z[t * m.z_stride + head * h + i] = mix[i * 16 + t];
  }
}

// Scores of one query: lanes are dimensions of the head, and the sums of 16 keys are folded at a time.
void score_one(const Pattern& p, int row, float* out) {
  const float* const q = p.q + row * p.q_stride;
  for (int64_t key = 0; key < p.limit[row]; key += 16) {
    const int64_t count = p.keys_count - key < 16 ? p.keys_count - key : 16;
    Vec parts[16];
    for (int64_t j = 0; j < 16; ++j) {
      parts[j] = zero();
      for (int64_t i = 0; j < count && i < p.d_head; i += 16)
        parts[j] = fma(load_cached(p.keys, (key + j) * p.d_head + i), load(q + i), parts[j]);
    }
    alignas(64) float scores[16];
    store(scores, sums(parts));
    __builtin_memcpy(out + key, scores, count * sizeof(float));
  }
}

// Scores of several queries: lanes are queries, which are turned once for all keys.
void score_many(const Pattern& p, int64_t most) {
  constexpr int64_t kDims = 64;  // turned at a time
  constexpr int kAtOnce = 16;    // keys
  const int64_t h = p.d_head, c = p.keys_count;
  alignas(64) float turned[kDims * 16], keys[kAtOnce * kDims], scores[kAtOnce * 16];
  for (int64_t d = 0; d < h; d += kDims) {
    const int64_t dims = h - d < kDims ? h - d : kDims;
    for (int64_t i = 0; i < dims; ++i)
      for (int r = 0; r < 16; ++r) turned[i * 16 + r] = r < p.count ? p.q[r * p.q_stride + d + i] : 0.0f;
    for (int64_t key = 0; key < most; key += kAtOnce) {
      const int count = (int)(c - key < kAtOnce ? c - key : kAtOnce);
      for (int j = 0; j < kAtOnce; ++j)
        for (int64_t i = 0; i < dims; i += 16)
          store(keys + j * kDims + i, j < count ? load_cached(p.keys, (key + j) * h + d + i) : zero());
      if (d > 0)
        for (int j = 0; j < count; ++j)
          for (int r = 0; r < p.count; ++r) scores[j * 16 + r] = p.out[r * p.out_stride + key + j];
      for (int j = 0; j < kAtOnce; j += 8) {
        Vec score[8];
        IRKIT_UNROLL
        for (int e = 0; e < 8; ++e) score[e] = d > 0 ? load(scores + (j + e) * 16) : zero();
        for (int64_t i = 0; i < dims; ++i) {
          const Vec lane = load(turned + i * 16);
          IRKIT_UNROLL
          for (int e = 0; e < 8; ++e) score[e] = fma(lane, set1(keys[(j + e) * kDims + i]), score[e]);
        }
        IRKIT_UNROLL
        for (int e = 0; e < 8; ++e) store(scores + (j + e) * 16, score[e]);
      }
      for (int r = 0; r < p.count; ++r)
        for (int j = 0; j < count; ++j) p.out[r * p.out_stride + key + j] = scores[j * 16 + r];
    }
  }
}

void pattern(const Pattern& p) {
  const int64_t c = p.keys_count;
  int64_t most = 0;
  for (int r = 0; r < p.count; ++r) most = p.limit[r] > most ? p.limit[r] : most;
  if (p.count > 2) score_many(p, most);
  for (int r = 0; r < p.count; ++r) {
    if (p.count <= 2) score_one(p, r, p.out + r * p.out_stride);
    float* const out = p.out + r * p.out_stride;
    const int64_t limit = p.limit[r], whole = limit / 16 * 16;
    const Vec scale = set1(p.scale), low = set1(kLowest);
    alignas(64) float rest[16];
    for (int64_t i = 0; i < 16; ++i) rest[i] = whole + i < limit ? out[whole + i] : kLowest;
    const Vec rest_scores = below(whole, set1((float)limit), mul(load(rest), scale), low);
    Vec top = rest_scores;
    for (int64_t i = 0; i < whole; i += 16) {
      const Vec score = mul(load(out + i), scale);
      store(out + i, score);
      top = max(top, score);
    }
    top = set1(largest(top));
    const Vec rest_weights = below(whole, set1((float)limit), exponential(sub(rest_scores, top)), zero());
    Vec total = rest_weights;
    for (int64_t i = 0; i < whole; i += 16) {
      const Vec weight = exponential(sub(load(out + i), top));
      store(out + i, weight);
      total = add(total, weight);
    }
    const Vec all = set1(sum(total));
    for (int64_t i = 0; i < whole; i += 16) store(out + i, div(load(out + i), all));
    store(rest, div(rest_weights, all));
    for (int64_t i = whole; i < c; ++i) out[i] = i < limit ? rest[i - whole] : 0.0f;
  }
}

void rotate(const float* x, const float* cos, const float* sin, int64_t r, int64_t d_head, float* out) {
  for (int64_t i = 0; i < r; ++i) {
    const float a = x[i], b = x[i + r];
    out[i] = a * cos[i] - b * sin[i];
    out[i + r] = b * cos[i] + a * sin[i];
  }
  for (int64_t i = 2 * r; i < d_head; ++i) out[i] = x[i];
}

void to_half(const float* x, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; i += 16) store_half(out + i, load(x + i));
}
