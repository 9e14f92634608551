#include "sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "half.h"
#include "logits.h"

namespace irkit {
namespace {

struct Pair {
  uint32_t first, second;
};

// Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3").
Pair threefry(Pair key, Pair x) {
  constexpr int kRotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const uint32_t keys[3] = {key.first, key.second, key.first ^ key.second ^ 0x1BD11BDA};
  x = {x.first + keys[0], x.second + keys[1]};
  for (uint32_t group = 0; group < 5; ++group) {
    for (int rotation : kRotations[group % 2]) {
      x.first += x.second;
      x.second = x.first ^ (x.second << rotation | x.second >> (32 - rotation));
    }
    x.first += keys[(group + 1) % 3];
    x.second += keys[(group + 2) % 3] + group + 1;
  }
  return x;
}

// Number `index` of jax.random.uniform(jax.random.fold_in(key, data)), from 0 to below 1.
float uniform(const uint32_t* key, uint32_t data, uint32_t index) {
  const Pair bits = threefry(threefry({key[0], key[1]}, {0, data}), {0, index});
  return bits_float((bits.first ^ bits.second) >> 9 | 0x3F800000) - 1.0f;
}

// Candidates, best first.
struct Candidates {
  std::vector<float> x;
  std::vector<int32_t> ids;

  void cut(size_t size) {
    if (size >= x.size()) return;
    x.resize(size);
    ids.resize(size);
  }

  // All after the first that are below `least`; no number is below NaN.
  void cut_below(float least) {
    size_t size = 1;
    while (size < x.size() && !(x[size] < least)) ++size;
    cut(size);
  }
};

std::vector<float> softmax(const std::vector<float>& x, float temperature) {
  std::vector<float> p(x.size());
  float total = 0;
  for (size_t i = 0; i < x.size(); ++i) total += p[i] = std::exp((x[i] - x[0]) / temperature);
  for (float& each : p) each /= total;
  return p;
}

void penalize(const Sampling& s, std::vector<float>* x) {
  if (s.repeat_penalty == 1 && s.presence_penalty == 0 && s.frequency_penalty == 0) return;
  const int64_t window = s.repeat_last_n < 0 ? s.length : std::min<int64_t>(s.repeat_last_n, s.length);
  std::vector<int32_t> seen;
  for (int64_t i = s.length - window; i < s.length; ++i)
    if (s.history[i] >= 0 && s.history[i] < s.count) seen.push_back(s.history[i]);
  std::sort(seen.begin(), seen.end());
  for (size_t i = 0, next; i < seen.size(); i = next) {
    next = std::upper_bound(seen.begin() + i, seen.end(), seen[i]) - seen.begin();
    float& logit = (*x)[seen[i]];
    logit = logit <= 0 ? logit * s.repeat_penalty : logit / s.repeat_penalty;
    logit -= (float)(next - i) * s.frequency_penalty + s.presence_penalty;
  }
}

constexpr float kNever = -std::numeric_limits<float>::infinity();

// Whether any token was ruled out.
bool rule_out(const Sampling& s, std::vector<float>* x) {
  bool any = false;
  for (int64_t from = 0; from < s.count; from += 32) {
    const uint32_t word = s.allowed[from / 32];
    if (word == 0xFFFFFFFF) continue;
    any = true;
    for (int64_t i = from; i < std::min(from + 32, s.count); ++i)
      if (!(word >> (i - from) & 1)) (*x)[i] = kNever;
  }
  return any;
}

// Of those that are not ruled out.
float deviation(const std::vector<float>& x) {
  double sum = 0, squares = 0, count = 0;
  for (float each : x)
    if (each != kNever) {
      sum += each;
      ++count;
    }
  const double mean = sum / count;
  for (float each : x)
    if (each != kNever) squares += (each - mean) * (each - mean);
  return (float)std::sqrt(squares / count);
}

// Locally typical sampling (Meister et al., arXiv:2202.00666): those whose surprise is nearest the entropy.
void keep_typical(float mass, Candidates* c) {
  const std::vector<float> p = softmax(c->x, 1);
  std::vector<float> off(p.size());
  float entropy = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    off[i] = -std::log(p[i]);
    if (p[i] > 0) entropy += p[i] * off[i];
  }
  for (float& each : off) each = std::isfinite(each) ? std::fabs(each - entropy) : std::numeric_limits<float>::max();
  std::vector<int32_t> order(p.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return off[a] < off[b]; });
  size_t kept = 0;
  for (float before = 0; kept < order.size() && before <= mass; ++kept) before += p[order[kept]];
  order.resize(kept);
  std::sort(order.begin(), order.end());
  for (size_t i = 0; i < kept; ++i) {
    c->x[i] = c->x[order[i]];
    c->ids[i] = c->ids[order[i]];
  }
  c->cut(kept);
}

void keep_top_p(float mass, Candidates* c) {
  const std::vector<float> p = softmax(c->x, 1);
  size_t kept = 1;
  for (float before = p[0]; kept < p.size() && before < mass; ++kept) before += p[kept];
  c->cut(kept);
}

// XTC: of the tokens at or above the threshold, only the least likely stays.
void exclude_top(float threshold, Candidates* c) {
  const std::vector<float> p = softmax(c->x, 1);
  const auto above = std::find_if(p.begin(), p.end(), [&](float each) { return !(each >= threshold); }) - p.begin();
  if (above < 2) return;
  c->x.erase(c->x.begin(), c->x.begin() + (above - 1));
  c->ids.erase(c->ids.begin(), c->ids.begin() + (above - 1));
}

int32_t draw(float random, float temperature, const Candidates& c) {
  const std::vector<float> p = softmax(c.x, temperature);
  const float total = std::accumulate(p.begin(), p.end(), 0.0f);
  size_t last = 0;
  float sum = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    if (!(p[i] > 0)) continue;  // rounding may carry the sum past the last token with any odds
    last = i;
    sum += p[i];
    if (sum > random * total) break;
  }
  return c.ids[last];
}

}  // namespace

int32_t sample(const Sampling& s) {
  std::vector<float> x(s.count);
  for (int64_t i = 0; i < s.count; ++i) x[i] = s.logits[i] + s.bias[i];
  const bool restricted = rule_out(s, &x);
  penalize(s, &x);
  const bool greedy = s.temperature <= 0, likeliest = greedy && s.typical_p >= 1 && s.xtc_probability <= 0;
  const int64_t some = s.top_k > 0 ? std::min<int64_t>(s.top_k, s.count) : s.count, k = likeliest ? 1 : some;
  Candidates c = {std::vector<float>(k), std::vector<int32_t>(k)};
  top_k(x.data(), s.count, k, c.x.data(), c.ids.data());
  if (likeliest) return c.ids[0];
  if (restricted) c.cut_below(std::numeric_limits<float>::lowest());
  if (s.top_n_sigma > 0) c.cut_below(c.x[0] - s.top_n_sigma * deviation(x));
  if (s.typical_p < 1) keep_typical(s.typical_p, &c);
  if (s.top_p < 1) keep_top_p(s.top_p, &c);
  c.cut_below(c.x[0] + std::log(s.min_p));
  const uint32_t position = (uint32_t)s.length;
  if (s.xtc_threshold <= 0.5f && uniform(s.key, position, 0) < s.xtc_probability) exclude_top(s.xtc_threshold, &c);
  return greedy ? c.ids[0] : draw(uniform(s.key, position, 1), s.temperature, c);
}

}  // namespace irkit
