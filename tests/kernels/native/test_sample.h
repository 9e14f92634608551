// Drawing tokens: whatever the settings, and wherever a vocabulary ends, one that is allowed.
#pragma once

#include "sample.h"
#include "support.h"

namespace {

// One of these, whatever they are.
float one_of(const Floats& choices) { return choices[between(0, (int64_t)choices.size() - 1)]; }

void check_draw(int64_t count, int64_t length, float share) {
  const Floats logits = normals(count, 3), bias(count);
  std::vector<uint32_t> allowed((count + 31) / 32);
  for (int64_t i = 0; i < count; ++i)
    if (share >= 1 || (double)between(0, 999) < 1000 * share) allowed[i / 32] |= 1u << (i % 32);
  const int64_t sure = between(0, count - 1);
  allowed[sure / 32] |= 1u << (sure % 32);
  std::vector<int32_t> history(length);
  for (int32_t& id : history) id = (int32_t)between(-1, count);  // two of them are no tokens
  Sampling s = {};
  s.logits = logits.data();
  s.bias = bias.data();
  s.allowed = allowed.data();
  s.count = count;
  s.history = history.data();
  s.length = length;
  s.repeat_last_n = (int32_t)between(-1, length + 2);
  s.repeat_penalty = one_of({1, 1.3f});
  s.presence_penalty = one_of({0, 0.5f});
  s.frequency_penalty = one_of({0, -0.2f});
  s.top_n_sigma = one_of({-1, 0.5f, 2});
  s.top_k = (int32_t)between(-1, count + 1);
  s.typical_p = one_of({0, 0.5f, 1});
  s.top_p = one_of({0, 0.5f, 1});
  s.min_p = one_of({0, 0.05f, 1});
  s.xtc_probability = one_of({0, 0.5f, 1});
  s.xtc_threshold = one_of({0, 0.1f, 0.6f});
  s.temperature = one_of({0, 0.8f, 2});
  s.key[0] = random_bits();
  s.key[1] = random_bits();
  const int64_t drawn = sample(s);
  expect(drawn >= 0 && drawn < count && (allowed[drawn / 32] >> (drawn % 32) & 1), "sample: %d of %d is not allowed",
         (int)drawn, (int)count);
}

void test_sample() {
  for (int round = 0; round < 400; ++round)
    for (int64_t count : {1, 31, 32, 33, 300}) check_draw(count, between(0, 20), one_of({0, 0.05f, 0.5f, 1}));
}

}  // namespace
