// Matrix products, attention and whole layers, on one and on several threads.
#pragma once

#include "layer.h"
#include "pool.h"
#include "support.h"

namespace {

constexpr int kThreads[] = {1, 2, 4};

void test_linear(const Format& format, int64_t rows) {
  const int64_t cols = 256;
  const Weights w(format, 300, cols);
  const Floats x = normals(rows * cols), norm = normals(cols), bias = normals(w.rows);
  std::vector<uint8_t> scratch(linear_scratch(rows, cols));
  Floats first;
  for (int threads : kThreads) {
    set_threads(threads);
    Floats y(rows * w.rows, kNaN);
    linear(w.matrix(bias), x.data(), rows, norm.data(), 1e-5f, y.data(), scratch.data());
    if (threads > 1) {
      expect(y == first, "linear: form %d, %d rows: another result with %d threads", w.form, (int)rows, threads);
      continue;
    }
    first = y;
    for (int64_t r = 0; r < rows; ++r) {
      double squares = 0;
      for (int64_t c = 0; c < cols; ++c) squares += (double)x[r * cols + c] * x[r * cols + c];
      for (int64_t i = 0; i < w.rows; i += 23) {
        double value = 0, length = 0;
        for (int64_t c = 0; c < cols; ++c) {
          const double term = w.numbers[i * cols + c] * norm[c] * x[r * cols + c] / std::sqrt(squares / cols + 1e-5);
          value += term;
          length += term * term;
        }
        // An int8 number is off by up to 1 in 254 of the largest of its 32: by much less of the sum of all.
        expect(near(y[r * w.rows + i], value + bias[i], 0.05 * std::sqrt(length) + 1e-6),
               "linear: form %d, %d rows: [%d, %d] is %g, not %g", w.form, (int)rows, (int)r, (int)i,
               y[r * w.rows + i], value + bias[i]);
      }
    }
  }
}

void test_attend(int64_t tokens, int64_t group, bool half) {
  const int64_t batch = 2, kv_heads = 2, heads = kv_heads * group, d_head = 32, capacity = 700;
  Cache keys(batch * kv_heads * capacity * d_head, half), values(batch * kv_heads * capacity * d_head, half);
  const int64_t stride = heads * d_head + 7;
  const Floats q = normals(batch * tokens * stride);
  const int32_t start[] = {(int32_t)(capacity - tokens), 0}, count[] = {(int32_t)tokens, (int32_t)(tokens / 2)};
  std::vector<uint8_t> scratch(attention_scratch(batch, tokens, heads, kv_heads, d_head, capacity));
  Floats first;
  for (int threads : kThreads) {
    set_threads(threads);
    Floats z(batch * tokens * heads * d_head, kUntouched);
    attend({batch, tokens, heads, kv_heads, d_head, capacity, start, count, q.data(), stride, keys.data(),
            values.data(), half, 0.3f, z.data()}, scratch.data());
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t t = 0; t < count[b]; ++t) {
        for (int64_t head = 0; head < heads; ++head) {
          const int64_t at = b * tokens + t;
          check_attention("attend", &z[(at * heads + head) * d_head], &q[at * stride + head * d_head], keys, values,
                          (b * kv_heads + head / group) * capacity * d_head, d_head, start[b] + t + 1, 0.3f);
        }
      }
      if (threads == 1) first = z;
      const int64_t each = heads * d_head, from = b * tokens * each;
      expect(std::equal(&z[from], &z[from] + count[b] * each, &first[from]),
             "attend: %d tokens: another result with %d threads", (int)tokens, threads);
    }
  }
}

void test_pattern(int64_t tokens, int64_t group, int64_t d_head, int64_t capacity, bool half) {
  const int64_t batch = 2, kv_heads = 2, heads = kv_heads * group, stride = heads * d_head + 7;
  const float scale = 0.3f;
  Cache keys(batch * kv_heads * capacity * d_head, half);
  const Floats q = normals(batch * tokens * stride);
  std::vector<int32_t> positions(batch * tokens);
  for (int32_t& each : positions) each = (int32_t)between(0, capacity - 1);
  positions[0] = (int32_t)capacity + 5;  // what lies outside sees all there is
  for (int64_t key = 0; key < capacity; ++key) {  // what nobody sees must not matter
    const bool seen = key <= *std::max_element(positions.begin() + tokens, positions.end());
    for (int64_t i = 0; !seen && i < kv_heads * d_head; ++i)
      keys.set(((kv_heads + i / d_head) * capacity + key) * d_head + i % d_head, kNaN);
  }
  for (int threads : kThreads) {
    set_threads(threads);
    Floats out(batch * heads * tokens * capacity + 1, kUntouched);
    pattern({batch, tokens, heads, kv_heads, d_head, capacity, nullptr, nullptr, q.data(), stride, keys.data(),
             nullptr, half, scale, nullptr}, positions.data(), out.data());
    expect(out.back() == kUntouched, "pattern: wrote behind its end");
    for (int64_t row = 0; row < batch * heads * tokens; ++row) {
      const int64_t b = row / heads / tokens, head = row / tokens % heads, at = b * tokens + row % tokens;
      const int64_t limit = std::min<int64_t>(positions[at] + 1, capacity);
      std::vector<double> wanted(capacity);
      double most = -1e30, total = 0;
      for (int64_t key = 0; key < limit; ++key) {
        for (int64_t i = 0; i < d_head; ++i)
          wanted[key] += scale * q[at * stride + head * d_head + i] *
                         keys.number(((b * kv_heads + head / group) * capacity + key) * d_head + i);
        most = std::max(most, wanted[key]);
      }
      for (int64_t key = 0; key < limit; ++key) total += wanted[key] = std::exp(wanted[key] - most);
      for (int64_t key = 0; key < capacity; ++key)
        expect(near(out[row * capacity + key], wanted[key] / total, 3e-6),
               "pattern: d_head %d, capacity %d, half %d, limit %d: key %d is %.8g, not %.8g", (int)d_head, (int)capacity,
               half, (int)limit, (int)key, out[row * capacity + key], wanted[key] / total);
    }
  }
}

void test_runs(int64_t group, int64_t d_head) {
  // More than there is room for at a time: those behind the sixteenth take that of others.
  const int64_t length = 70, kv_heads = 2, heads = kv_heads * group, runs = 20;
  const int32_t begin[runs] = {0, 69, 13, 40, 68, 67, 66, 65, 64, 63, 62, 61, 60, 59, 58, 57, 56, 30, 69, 1};
  int32_t first[runs + 1], last[runs + 1];
  std::vector<int32_t> position;
  for (int64_t run = 0; run < runs; ++run) {
    first[run] = (int32_t)position.size();
    const int64_t end = run == 2 ? 50 : length;
    for (int64_t at = begin[run]; at < end; ++at) position.push_back((int32_t)at);
    last[run] = (int32_t)position.size() - 1;
  }
  first[runs] = 1, last[runs] = 0;  // one without tokens
  const int64_t tokens = (int64_t)position.size(), each = kv_heads * d_head, stride = (heads + 2 * kv_heads) * d_head;
  const Floats common_keys = normals(length * each), common_values = normals(length * each);
  const Floats q = normals(tokens * stride);  // and behind each row of it k and v
  const float* const keys = q.data() + heads * d_head;
  const float* const values = keys + each;
  std::vector<uint8_t> scratch(runs_scratch(runs + 1, length, heads, kv_heads, d_head));
  for (int threads : kThreads) {
    set_threads(threads);
    Floats z(tokens * heads * d_head, kUntouched);
    attend_runs({runs + 1, length, heads, kv_heads, d_head, first, last, position.data(), common_keys.data(),
                 common_values.data(), q.data(), keys, values, stride, 0.3f, z.data()}, scratch.data());
    for (int64_t run = 0; run < runs; ++run) {
      for (int64_t head = 0; head < kv_heads; ++head) {
        Cache all_keys(length * d_head, false), all_values(length * d_head, false);
        for (int64_t at = 0; at <= position[last[run]]; ++at) {
          const bool own = at >= begin[run];
          const int64_t from = (own ? (first[run] + at - begin[run]) * stride : at * each) + head * d_head;
          for (int64_t i = 0; i < d_head; ++i) {
            all_keys.set(at * d_head + i, (own ? keys : common_keys.data())[from + i]);
            all_values.set(at * d_head + i, (own ? values : common_values.data())[from + i]);
          }
        }
        for (int64_t token = first[run]; token <= last[run]; ++token)
          for (int64_t of = head * group; of < (head + 1) * group; ++of)
            check_attention("attend_runs", &z[(token * heads + of) * d_head], &q[token * stride + of * d_head], all_keys,
                            all_values, 0, d_head, position[token] + 1, 0.3f);
      }
    }
  }
}

std::vector<double> normed(const double* x, const Floats& norm, float eps) {
  std::vector<double> out(norm.size());
  double squares = 0;
  for (size_t i = 0; i < norm.size(); ++i) squares += x[i] * x[i];
  for (size_t i = 0; i < norm.size(); ++i) out[i] = x[i] * norm[i] / std::sqrt(squares / (double)norm.size() + eps);
  return out;
}

std::vector<double> times(const Weights& w, const Floats& bias, const std::vector<double>& x) {
  std::vector<double> y(bias.begin(), bias.end());
  y.resize(w.rows);
  for (int64_t i = 0; i < w.rows; ++i) {
    for (int64_t c = 0; c < w.cols; ++c) y[i] += w.numbers[i * w.cols + c] * x[c];
  }
  return y;
}

// A small layer in matrices of one format, where not said otherwise.
struct SmallLayer {
  static constexpr int64_t batch = 2, capacity = 300, heads = 4, kv_heads = 2, d_head = 16, d_model = 96, d_mlp = 160;
  static constexpr int64_t rotary = 6, kv = kv_heads * d_head, cache_size = batch * kv_heads * capacity * d_head;
  static constexpr float eps = 1e-5f, scale = 0.25f;
  int64_t tokens;
  bool half;
  Weights q, k, v, o, gate, up, down;
  Floats q_bias = normals(heads * d_head), k_bias = normals(kv), v_bias = normals(kv), down_bias = normals(d_model);
  Floats ln1 = normals(d_model), ln2 = normals(d_model), resid, cos, sin;
  Cache keys, values;
  int32_t start[batch], count[batch];

  SmallLayer(const Format& format, const Format& other, int64_t tokens, bool half)
      : tokens(tokens), half(half), q(format, heads * d_head, d_model), k(format, kv, d_model), v(other, kv, d_model),
        o(format, d_model, heads * d_head), gate(format, d_mlp, d_model), up(other, d_mlp, d_model),
        down(other, d_model, d_mlp), resid(normals(batch * tokens * d_model)), keys(cache_size, half),
        values(cache_size, half), start{(int32_t)(capacity - tokens), 0},
        count{(int32_t)tokens, (int32_t)(tokens / 2)} {
    for (int64_t i = 0; i < batch * tokens * rotary; ++i) {
      const float angle = normal();
      cos.push_back(std::cos(angle));
      sin.push_back(std::sin(angle));
    }
    // So that sums of squares, and what a rounding changes, stay of the order of one.
    for (Weights* w : {&q, &k, &v, &o, &gate, &up, &down}) shrink(w);
  }

  static void shrink(Weights* w) {
    if (w->form != kF32) return;
    for (float& x : w->numbers) x *= 0.1f;
    for (size_t at = 0; at < w->packed.size(); at += 4) {
      float x;
      std::memcpy(&x, &w->packed[at], 4);
      x *= 0.1f;
      std::memcpy(&w->packed[at], &x, 4);
    }
  }

  // The result, and what has become of the cache; into `shown`, if given, what its points have room for.
  Floats run(Cache* new_keys, Cache* new_values, std::vector<Floats>* shown = nullptr) const {
    Floats out(batch * tokens * d_model, kUntouched);
    const int64_t size = layer_scratch(batch, tokens, heads, kv_heads, d_head, capacity, d_model, d_mlp);
    std::vector<uint8_t> scratch(size, 0xff);
    Layer l = {};
    l.attention = {batch, tokens, heads, kv_heads, d_head, capacity, start, count, nullptr, 0, nullptr, nullptr, half,
                   scale, nullptr};
    l.resid = resid.data();
    l.out = out.data();
    l.cos = cos.data();
    l.sin = sin.data();
    l.rotary = rotary;
    l.keys = new_keys->data();
    l.values = new_values->data();
    l.ln1 = ln1.data();
    l.ln2 = ln2.data();
    l.eps = eps;
    l.q = q.matrix(q_bias), l.k = k.matrix(k_bias), l.v = v.matrix(v_bias), l.o = o.matrix(), l.gate = gate.matrix();
    l.up = up.matrix(), l.down = down.matrix(down_bias);
    for (size_t i = 0; shown && i < shown->size(); ++i) {
      Floats& each = (*shown)[i];
      if (each.empty()) continue;
      each.assign(batch * tokens * width(l, (Point)i) + 1, kUntouched);
      l.shown[i] = each.data();
    }
    layer(l, scratch.data());
    return out;
  }

  void rotate(std::vector<double>* x, int64_t row) const {
    for (size_t head = 0; head < x->size(); head += d_head) {
      for (int64_t i = 0; i < rotary; ++i) {
        double &a = (*x)[head + i], &b = (*x)[head + rotary + i];
        const double c = cos[row * rotary + i], s = sin[row * rotary + i], old = a;
        a = a * c - b * s;
        b = b * c + old * s;
      }
    }
  }

  void check(const Floats& out, const Cache& new_keys, const Cache& new_values) const {
    const double tolerance = half ? 1e-2 : 1e-4;
    Cache old_keys = keys, old_values = values;
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t t = 0; t < count[b]; ++t) {
        const int64_t row = b * tokens + t;
        std::vector<double> x(&resid[row * d_model], &resid[row * d_model] + d_model);
        const std::vector<double> first = normed(x.data(), ln1, eps);
        std::vector<double> query = times(q, q_bias, first), key = times(k, k_bias, first);
        const std::vector<double> value = times(v, v_bias, first);
        rotate(&query, row);
        rotate(&key, row);
        std::vector<double> z;
        for (int64_t head = 0; head < kv_heads; ++head) {
          const int64_t at = ((b * kv_heads + head) * capacity + start[b] + t) * d_head;
          for (int64_t i = 0; i < d_head; ++i) {
            old_keys.set(at + i, (float)key[head * d_head + i]);
            old_values.set(at + i, (float)value[head * d_head + i]);
          }
        }
        for (int64_t head = 0; head < heads; ++head) {
          const Floats mine(&query[head * d_head], &query[head * d_head] + d_head);
          const auto mix = attention(mine.data(), old_keys, old_values,
                                     (b * kv_heads + head / (heads / kv_heads)) * capacity * d_head, d_head,
                                     start[b] + t + 1, scale);
          z.insert(z.end(), mix.begin(), mix.end());
        }
        const std::vector<double> attended = times(o, {}, z);
        for (int64_t i = 0; i < d_model; ++i) x[i] += attended[i];
        const std::vector<double> second = normed(x.data(), ln2, eps);
        std::vector<double> hidden = times(gate, {}, second);
        const std::vector<double> other = times(up, {}, second);
        for (int64_t i = 0; i < d_mlp; ++i) hidden[i] = silu(hidden[i]) * other[i];
        const std::vector<double> last = times(down, down_bias, hidden);
        for (int64_t i = 0; i < d_model; ++i)
          expect(near(out[row * d_model + i], x[i] + last[i], tolerance),
                 "layer: %d tokens, half %d: [%d, %d, %d] is %g, not %g", (int)tokens, half, (int)b, (int)t, (int)i,
                 out[row * d_model + i], x[i] + last[i]);
      }
    }
    for (int64_t i = 0; i < cache_size; ++i)
      expect(near(new_keys.number(i), old_keys.number(i), tolerance) &&
                 near(new_values.number(i), old_values.number(i), tolerance),
             "layer: %d tokens, half %d: number %d of the cache is wrong", (int)tokens, half, (int)i);
  }
};

// What is shown changes nothing, alone or with the rest, and adds up to the result.
void test_shown(const Format& format, int64_t tokens) {
  const SmallLayer l(format, format, tokens, false);
  Cache keys = l.keys, values = l.values;
  const Floats plain = l.run(&keys, &values);
  std::vector<Floats> all(kPoints, Floats(1));
  const auto run = [&](std::vector<Floats>* shown) {
    Cache new_keys = l.keys, new_values = l.values;
    const Floats out = l.run(&new_keys, &new_values, shown);
    for (int64_t b = 0; b < l.batch; ++b)
      for (int64_t i = b * tokens * l.d_model; i < (b * tokens + l.count[b]) * l.d_model; ++i)
        expect(out[i] == plain[i], "shown: %d tokens: number %d is another", (int)tokens, (int)i);
    for (const Floats& each : *shown) expect(each.empty() || each.back() == kUntouched, "shown: wrote behind the end");
  };
  run(&all);
  for (int point = 0; point < kPoints; ++point) {
    std::vector<Floats> one(kPoints);
    one[point] = Floats(1);
    run(&one);
    const int64_t each = (int64_t)(one[point].size() - 1) / (l.batch * tokens);
    for (int64_t b = 0; b < l.batch; ++b)
      for (int64_t i = b * tokens * each; i < (b * tokens + l.count[b]) * each; ++i)
        expect(one[point][i] == all[point][i], "shown: point %d, number %d is another alone", point, (int)i);
  }
  for (int64_t b = 0; b < l.batch; ++b) {
    for (int64_t row = b * tokens; row < b * tokens + l.count[b]; ++row) {
      for (int64_t i = row * l.d_model; i < (row + 1) * l.d_model; ++i) {
        expect(all[kResidMid][i] == l.resid[i] + all[kAttnOut][i], "shown: the stream in the middle is wrong");
        expect(plain[i] == all[kResidMid][i] + all[kMlpOut][i], "shown: what the MLP adds is wrong");
        const float first = l.resid[i], second = all[kResidMid][i];
        expect(near(all[kNormalized1][i] * all[kScale1][row], first, 1e-5 * (1 + std::fabs(first))) &&
                   near(all[kNormalized2][i] * all[kScale2][row], second, 1e-5 * (1 + std::fabs(second))),
               "shown: a norm is wrong");
      }
      for (int64_t i = row * l.d_mlp; i < (row + 1) * l.d_mlp; ++i)
        expect(near(all[kPost][i], silu(all[kPre][i]) * all[kPreLinear][i], 1e-5 * (1 + std::fabs(all[kPost][i]))), "shown: the gate is wrong");
      const int64_t t = row - b * tokens, q = l.heads * l.d_head;
      std::vector<double> query(&all[kQ][row * q], &all[kQ][row * q] + q);
      std::vector<double> key(&all[kK][row * l.kv], &all[kK][row * l.kv] + l.kv);
      l.rotate(&query, row);
      l.rotate(&key, row);
      for (int64_t i = 0; i < q; ++i) expect(near(all[kRotQ][row * q + i], query[i], 1e-4), "shown: a query is wrong");
      for (int64_t i = 0; i < l.kv; ++i) {
        const int64_t at = ((b * l.kv_heads + i / l.d_head) * l.capacity + l.start[b] + t) * l.d_head + i % l.d_head;
        expect(near(all[kRotK][row * l.kv + i], key[i], 1e-4) && all[kRotK][row * l.kv + i] == keys.number(at) &&
                   all[kV][row * l.kv + i] == values.number(at), "shown: a key or value is wrong");
      }
      for (int64_t head = 0; format.ggml_type == 0 && head < l.heads; ++head)
        check_attention("shown", &all[kZ][row * q + head * l.d_head], &all[kRotQ][row * q + head * l.d_head], keys, values,
                        (b * l.kv_heads + head / (l.heads / l.kv_heads)) * l.capacity * l.d_head, l.d_head,
                        l.start[b] + t + 1, l.scale);
    }
  }
}

void test_layer(const Format& format, const Format& other, int64_t tokens, bool half) {
  const SmallLayer l(format, other, tokens, half);
  Floats first;
  for (int threads : kThreads) {
    set_threads(threads);
    Cache keys = l.keys, values = l.values;
    const Floats out = l.run(&keys, &values);
    if (format.ggml_type == 0 && other.ggml_type == 0) l.check(out, keys, values);
    if (threads == 1) first = out;
    for (int64_t b = 0; b < l.batch; ++b) {
      for (int64_t i = b * tokens * l.d_model; i < (b * tokens + l.count[b]) * l.d_model; ++i)
        expect(first[i] == out[i], "layer: %d tokens: another result with %d threads", (int)tokens, threads);
    }
  }
}

void test_layers() {
  for (const Format& format : kFormats) {
    for (int64_t rows : {1, 3, 20}) test_linear(format, rows);
  }
  test_runs(3, 32);
  test_runs(1, 80);
  for (int64_t tokens : {1, 4, 5, 20, 50}) {
    for (bool half : {false, true}) {
      test_attend(tokens, 3, half);
      test_pattern(tokens, 3, 32, 100, half);
      test_pattern(tokens, 1, 80, 64, half);
      test_layer(kFormats[0], kFormats[0], tokens, half);
    }
    test_layer(kFormats[3], kFormats[6], tokens, true);
    for (int format : {0, 3}) test_shown(kFormats[format], tokens);
  }
}

}  // namespace
