// What the tests share: random matrices and caches, and what attention is to give. What is expected is computed one
// number after the other, in float64.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "half.h"
#include "kernels.h"
#include "pack.h"

using namespace irkit;

namespace {

using Floats = std::vector<float>;

constexpr float kUntouched = 12345.0f;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::atomic<int> failures{0};

__attribute__((format(printf, 2, 3))) void expect(bool ok, const char* what, ...) {
  if (ok || ++failures > 20) return;
  va_list arguments;
  va_start(arguments, what);
  std::vfprintf(stderr, what, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
}

bool near(double got, double wanted, double tolerance) { return std::fabs(got - wanted) <= tolerance; }

std::mt19937 random_bits(20240607);

float normal() { return std::normal_distribution<float>()(random_bits); }
int64_t between(int64_t first, int64_t last) {
  return std::uniform_int_distribution<int64_t>(first, last)(random_bits);
}
Floats normals(int64_t count, float scale = 1) {
  Floats made(count);
  for (float& x : made) x = scale * normal();
  return made;
}

// A GGUF format: its blocks of `columns`, and where these hold float16.
struct Format {
  int32_t ggml_type;
  int64_t columns, bytes;
  std::vector<int64_t> halves;
};
const std::vector<Format> kFormats = {
    {0, 1, 4, {}},         {1, 1, 2, {0}},       {2, 32, 18, {0}},       {3, 32, 20, {0, 2}},
    {6, 32, 22, {0}},      {7, 32, 24, {0, 2}},  {8, 32, 34, {0}},       {12, 256, 144, {0, 2}},
    {13, 256, 176, {0, 2}}, {14, 256, 210, {208}}, {30, 1, 2, {}},
};

// A packed matrix of random numbers, and the numbers.
struct Weights {
  Form form;
  int64_t rows, cols;
  std::vector<uint8_t> packed;
  Floats numbers;

  Weights(const Format& format, int64_t rows, int64_t cols) : rows(rows), cols(cols), numbers(rows * cols) {
    const int64_t blocks = rows * cols / format.columns;
    std::vector<uint8_t> raw(blocks * format.bytes);
    for (uint8_t& byte : raw) byte = (uint8_t)random_bits();
    for (int64_t b = 0; b < blocks; ++b) {
      uint8_t* const block = &raw[b * format.bytes];
      for (int64_t at : format.halves) {
        const uint16_t half = float_to_half(0.1f * normal());
        std::memcpy(block + at, &half, 2);
      }
      const float x = normal();
      if (format.ggml_type == 0) std::memcpy(block, &x, 4);
      if (format.ggml_type == 30) std::memcpy(block, (const char*)&x + 2, 2);
    }
    form = (Form)irkit_form(format.ggml_type);
    packed.resize(irkit_packed_bytes(form, rows, cols));
    const int32_t failed =
        irkit_pack(format.ggml_type, raw.data(), rows, cols, nullptr, 0, panels(rows), packed.data());
    expect(!failed, "format %d was not packed", format.ggml_type);
    std::vector<int32_t> ids(rows);
    for (int64_t i = 0; i < rows; ++i) ids[i] = (int32_t)i;
    irkit_unpack_rows(form, packed.data(), rows, cols, ids.data(), rows, numbers.data());
  }

  Matrix matrix(const Floats& bias = {}) const {
    return {packed.data(), bias.empty() ? nullptr : bias.data(), form, rows, cols};
  }
};

double silu(double x) { return x / (1 + std::exp(-x)); }

// Keys or values: in the cache's own numbers, and as float32.
struct Cache {
  std::vector<uint16_t> halves;
  Floats floats;
  bool half;

  Cache(int64_t count, bool half) : floats(normals(count)), half(half) {
    if (!half) return;
    for (float& x : floats) {
      halves.push_back(float_to_half(x));
      x = half_to_float(halves.back());
    }
  }
  void* data() { return half ? (void*)halves.data() : (void*)floats.data(); }
  double number(int64_t i) const { return half ? half_to_float(halves[i]) : floats[i]; }
  void set(int64_t i, float x) {
    if (half) halves[i] = float_to_half(x);
    else floats[i] = x;
  }
  Cached cached() const { return {half ? (const void*)halves.data() : (const void*)floats.data(), half}; }
};

// What a query gives over the keys below `limit`, of which the first begins at `from`.
std::vector<double> attention(const float* q, const Cache& keys, const Cache& values, int64_t from, int64_t d_head,
                              int64_t limit, float scale) {
  std::vector<double> score(limit), mix(d_head);
  double most = -1e300, total = 0;
  for (int64_t j = 0; j < limit; ++j) {
    for (int64_t i = 0; i < d_head; ++i) score[j] += scale * q[i] * keys.number(from + j * d_head + i);
    most = std::max(most, score[j]);
  }
  for (double& s : score) total += s = std::exp(s - most);
  for (int64_t j = 0; j < limit; ++j) {
    for (int64_t i = 0; i < d_head; ++i) mix[i] += score[j] / total * values.number(from + j * d_head + i);
  }
  return mix;
}

void check_attention(const char* name, const float* z, const float* q, const Cache& keys, const Cache& values,
                     int64_t from, int64_t d_head, int64_t limit, float scale) {
  const std::vector<double> wanted = attention(q, keys, values, from, d_head, limit, scale);
  for (int64_t i = 0; i < d_head; ++i)
    expect(near(z[i], wanted[i], 3e-5), "%s: d_head %d, half %d, limit %d: dimension %d is %.8g, not %.8g", name,
           (int)d_head, keys.half, (int)limit, (int)i, z[i], wanted[i]);
}

}  // namespace
