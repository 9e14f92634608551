// What sampling asks of a row of logits.
#pragma once

#include <cstdint>

namespace irkit {

// The k largest of x, largest first, equal ones in rising order of their places. k is at most `count`.
void top_k(const float* x, int64_t count, int64_t k, float* values, int32_t* places);

// log(sum(exp(x)))
float log_sum_exp(const float* x, int64_t count);

}  // namespace irkit
