// Reductions over a row of logits. Included by kernels.cc.

// out[g]: the largest of the numbers [64 g, 64 (g + 1)) of x.
void group_largest(const float* x, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 64 <= count; i += 64)
    *out++ = largest(max(max(load(x + i), load(x + i + 16)), max(load(x + i + 32), load(x + i + 48))));
  if (i == count) return;
  float most = x[i];
  for (; i < count; ++i) most = x[i] > most ? x[i] : most;
  *out = most;
}

// The sum of exp(x - most).
float sum_exponentials(const float* x, int64_t count, float most) {
  Vec total[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    IRKIT_UNROLL
    for (int e = 0; e < 4; ++e) total[e] = add(total[e], exponential(sub(load(x + i + 16 * e), set1(most))));
  }
  float rest = 0;
  for (; i < count; i += 16) {
    alignas(64) float part[16];
    for (int e = 0; e < 16; ++e) part[e] = i + e < count ? x[i + e] - most : -1e30f;
    const Vec v = load(part);
    rest += sum(where_less(set1(-1e29f), v, exponential(v), zero()));
  }
  return sum(add(add(total[0], total[1]), add(total[2], total[3]))) + rest;
}
