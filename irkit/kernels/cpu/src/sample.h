// Drawing the next token: what irkit/transformer/sampling.py says in jax, in one call. A compiled program that holds
// that chain instead takes several times as long to load, and 30 MB more.
#pragma once

#include <cstdint>

namespace irkit {

// Of one row; irkit/options.py explains the settings.
struct Sampling {
  const float* logits;  // [count]
  const float* bias;    // [count], added to the logits
  const uint32_t* allowed;  // a bit for each token that may be drawn, [(count + 31) / 32], lowest bit first
  int64_t count;
  const int32_t* history;  // [length]
  int64_t length;
  int32_t repeat_last_n;
  float repeat_penalty, presence_penalty, frequency_penalty;
  float top_n_sigma;
  int32_t top_k;
  float typical_p, top_p, min_p, xtc_probability, xtc_threshold, temperature;
  uint32_t key[2];
};

// The token drawn. The key and the length alone decide the random numbers, which are those of jax.random.
int32_t sample(const Sampling& s);

}  // namespace irkit
