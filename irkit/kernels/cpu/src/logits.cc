#include "logits.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "kernels.h"

namespace irkit {
namespace {

// What is no number counts as the least, so that there is an order.
float key(float x) { return std::isnan(x) ? -std::numeric_limits<float>::infinity() : x; }

}  // namespace

void top_k(const float* x, int64_t count, int64_t k, float* values, int32_t* places) {
  // Of k groups, each has a number at least as large as the least of their largest: nothing below that is in question.
  std::vector<float> largest((count + 63) / 64);
  kernels().group_largest(x, count, largest.data());
  float least = -std::numeric_limits<float>::infinity();
  if ((int64_t)largest.size() >= k) {
    std::vector<float> sorted(largest.size());
    std::transform(largest.begin(), largest.end(), sorted.begin(), key);
    std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<float>());
    least = sorted[k - 1];
  }
  std::vector<int32_t> found;
  for (size_t group = 0; group < largest.size(); ++group) {
    if (largest[group] < least) continue;
    for (int64_t i = 64 * group; i < std::min<int64_t>(count, 64 * (group + 1)); ++i)
      if (!(x[i] < least)) found.push_back((int32_t)i);
  }
  k = std::min<int64_t>(k, found.size());
  const auto better = [&](int32_t a, int32_t b) {
    return key(x[a]) > key(x[b]) || (key(x[a]) == key(x[b]) && a < b);
  };
  if (k < (int64_t)found.size() / 8) {
    std::partial_sort(found.begin(), found.begin() + k, found.end(), better);
  } else {  // whose heap would take twice as long
    std::sort(found.begin(), found.end(), better);
  }
  for (int64_t i = 0; i < k; ++i) {
    places[i] = found[i];
    values[i] = x[found[i]];
  }
}

float log_sum_exp(const float* x, int64_t count) {
  std::vector<float> largest((count + 63) / 64);
  kernels().group_largest(x, count, largest.data());
  const float most = *std::max_element(largest.begin(), largest.end());
  return std::isfinite(most) ? most + std::log(kernels().sum_exponentials(x, count, most)) : most;
}

}  // namespace irkit
