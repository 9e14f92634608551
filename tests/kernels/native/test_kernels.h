// The kernels of one instruction set, each by itself.
#pragma once

#include "support.h"

namespace {

// Rows of activations in tiles, and the numbers that these hold.
struct Activations {
  std::vector<uint8_t> coded;
  Floats floats;
  Tiles tiles;

  Activations(const Floats& x, int64_t rows, int64_t cols, int64_t stride, const float* norm, float eps)
      : coded(rows * ((cols + 31) / 32) * kCodedBlock), floats(rows * ((cols + 31) / 32) * 32) {
    tiles = {coded.data(), floats.data(), rows, cols};
    const int64_t half = rows / 2;
    kernels().prepare(x.data(), stride, norm, eps, tiles, 0, half);
    kernels().prepare(x.data(), stride, norm, eps, tiles, half, rows);
  }

  // The rows of the tile that holds `row`, and where its part of a block of 32 columns begins.
  int64_t tile(int64_t row, int64_t block, int64_t* place) const {
    const int64_t start = row / kernels().tile_rows * kernels().tile_rows;
    const int64_t n = std::min<int64_t>(kernels().tile_rows, tiles.rows - start);
    *place = start * ((tiles.cols + 31) / 32) + block * n;
    return n;
  }

  // Of the int8 numbers of a block: 0 and 1 the scales of its halves, 2 the scaled sum, 3 and 4 minus the halves' sums.
  double about(int64_t row, int64_t block, int which) const {
    int64_t place;
    const int64_t n = tile(row, block, &place);
    const uint8_t* const at = &coded[place * kCodedBlock + 32 * n + 4 * (which * n + row % kernels().tile_rows)];
    float number;
    int32_t whole;
    std::memcpy(&number, at, 4);
    std::memcpy(&whole, at, 4);
    return which < 3 ? number : whole;
  }

  int code(int64_t row, int64_t col) const {
    int64_t place;
    const int64_t n = tile(row, col / 32, &place);
    return (int8_t)coded[place * kCodedBlock + (col % 32 / 4 * n + row % kernels().tile_rows) * 4 + col % 4];
  }

  double number(int64_t row, int64_t col, bool as_code) const {
    if (as_code) return about(row, col / 32, (int)(col % 32 / 16)) * code(row, col);
    int64_t place;
    const int64_t n = tile(row, col / 32, &place);
    return floats[place * 32 + col % 32 * n + row % kernels().tile_rows];
  }
};

void test_prepare() {
  for (int64_t rows : {1, 2, 5, 13}) {
    for (int64_t cols : {32, 40, 160}) {
      for (bool normed : {false, true}) {
        const int64_t stride = cols + 3;
        Floats x = normals(rows * stride, 3), norm = normals(cols);
        for (int64_t c = 0; c < 32; ++c) x[(rows - 1) * stride + c] = 0;
        const Activations made(x, rows, cols, stride, normed ? norm.data() : nullptr, 1e-5f);
        for (int64_t r = 0; r < rows; ++r) {
          double squares = 0;
          for (int64_t c = 0; c < cols; ++c) squares += (double)x[r * stride + c] * x[r * stride + c];
          const double factor = normed ? 1 / std::sqrt(squares / (double)cols + 1e-5) : 1;
          for (int64_t b = 0; b < (cols + 31) / 32; ++b) {
            int total[2] = {0, 0};
            for (int64_t c = 32 * b; c < 32 * b + 32; ++c) {
              const double wanted = c < cols ? x[r * stride + c] * factor * (normed ? norm[c] : 1) : 0;
              const double step = made.about(r, b, (int)(c % 32 / 16));
              total[c % 32 / 16] += made.code(r, c);
              expect(near(made.number(r, c, false), wanted, 1e-6 * std::fabs(wanted)) &&
                         near(made.number(r, c, true), wanted, 0.5001 * step),
                     "prepare: row %d of %d, column %d of %d is %g and %g, not %g", (int)r, (int)rows, (int)c,
                     (int)cols, made.number(r, c, false), made.number(r, c, true), wanted);
            }
            const double sum = made.about(r, b, 0) * total[0] + made.about(r, b, 1) * total[1];
            const double room = 1e-6 * (made.about(r, b, 0) + made.about(r, b, 1)) * 127 * 16;
            expect(near(made.about(r, b, 2), sum, room) && made.about(r, b, 3) == -total[0] &&
                       made.about(r, b, 4) == -total[1],
                   "prepare: the sums of row %d, block %d are wrong", (int)r, (int)b);
          }
        }
      }
    }
  }
  // Whatever a model computes, it must not end the process.
  for (float x : {kNaN, std::numeric_limits<float>::infinity(), 1e-38f, 1e-45f, 3e38f}) {
    Floats many = normals(64);
    many[5] = x;
    Activations(many, 1, 64, 64, nullptr, 0);
    Activations(Floats(64, x), 1, 64, 64, nullptr, 0);
  }
}

// A number, and by how much the kernels may miss it.
struct Wanted {
  double value, tolerance;
};

Wanted times(const Weights& w, int64_t row, const Activations& x, int64_t x_row, const Floats& bias) {
  const bool coded = kFormInfo[w.form].groups > 0;
  double value = bias.empty() ? 0 : bias[row], most = 0, total = 0;
  for (int64_t c = 0; c < w.cols; ++c) {
    const double weight = w.numbers[row * w.cols + c], number = x.number(x_row, c, coded);
    value += weight * number;
    total += std::fabs(number);
    most = std::max(most, std::fabs(weight));
  }
  return {value, 3e-6 * (most * total + std::fabs(value)) + 1e-30};
}

void test_multiply(const Format& format, int64_t cols, int64_t x_rows, Finish finish, bool biased) {
  const int64_t rows = 21, stride = rows + 3;
  const Weights w(format, rows, cols), up(kFormats[1], rows, cols);
  const Floats bias = biased ? normals(rows) : Floats(), up_bias = biased ? normals(rows) : Floats();
  const Activations x(normals(x_rows * cols), x_rows, cols, cols, nullptr, 0);
  const Floats before = normals(x_rows * stride);
  Floats out(x_rows * stride, kUntouched), alone(x_rows * stride, kUntouched);
  const Product product = {w.matrix(bias), up.matrix(up_bias), x.tiles, finish, before.data(), out.data(), stride,
                           finish == Finish::kAdd ? alone.data() : nullptr};
  const int64_t tiles = (x_rows + kernels().tile_rows - 1) / kernels().tile_rows;
  kernels().multiply(product, 0, 1, 0, tiles);
  kernels().multiply(product, 1, panels(rows), 0, 1);
  kernels().multiply(product, 1, panels(rows), 1, tiles);
  for (int64_t r = 0; r < x_rows; ++r) {
    for (int64_t i = 0; i < stride; ++i) {
      const float got = out[r * stride + i];
      Wanted wanted = {kUntouched, 0};
      if (i < rows) {
        wanted = times(w, i, x, r, bias);
        if (finish == Finish::kAdd) {
          expect(near(alone[r * stride + i], wanted.value, wanted.tolerance), "multiply: [%d, %d] alone is %.8g, not %.8g",
                 (int)r, (int)i, alone[r * stride + i], wanted.value);
          wanted.value += before[r * stride + i];
        }
        if (finish == Finish::kGate) {
          const Wanted other = times(up, i, x, r, up_bias);
          const double gate = silu(wanted.value);
          wanted.tolerance = 1.1 * wanted.tolerance * (std::fabs(other.value) + other.tolerance) +
                             std::fabs(gate) * (other.tolerance + 1e-6 * std::fabs(other.value));
          wanted.value = gate * other.value;
        }
      }
      expect(near(got, wanted.value, wanted.tolerance),
             "multiply: form %s, %d columns, %d rows, finish %d, bias %d: [%d, %d] is %.8g, not %.8g +- %g",
             irkit_form_name(w.form), (int)cols, (int)x_rows, (int)finish, biased, (int)r, (int)i, got, wanted.value,
             wanted.tolerance);
    }
  }
}

void test_products() {
  for (const Format& format : kFormats) {
    const std::vector<int64_t> widths = format.columns == 1    ? std::vector<int64_t>{33, 160}
                                        : format.columns == 32 ? std::vector<int64_t>{32, 160}
                                                               : std::vector<int64_t>{256};
    for (int64_t cols : widths) {
      for (int64_t rows = 1; rows <= 13; ++rows) test_multiply(format, cols, rows, (Finish)(rows % 3), rows % 2 == 0);
    }
  }
}

// silu over the whole range of its argument: an exponential that overflows would show.
void test_silu() {
  const int64_t rows = 4000, cols = 32;
  Weights gate(kFormats[0], rows, cols), up(kFormats[0], rows, cols);
  const int64_t panel = panel_layout(kF32, cols).bytes / 4;
  const auto value = [](int64_t i) { return 0.1f * (float)(i - 2000); };
  for (int64_t i = 0; i < rows; ++i) {
    ((float*)gate.packed.data())[i / 16 * panel + i % 16] = value(i);
    ((float*)up.packed.data())[i / 16 * panel + i % 16] = 1;
  }
  Floats one(cols, 0), out(rows);
  one[0] = 1;
  const Activations x(one, 1, cols, cols, nullptr, 0);
  kernels().multiply({gate.matrix(), up.matrix(), x.tiles, Finish::kGate, nullptr, out.data(), rows}, 0, panels(rows),
                     0, 1);
  for (int64_t i = 0; i < rows; ++i)
    expect(near(out[i], silu(value(i)), 1e-6 * std::fabs(silu(value(i))) + 1e-33), "silu(%g) is %g", value(i), out[i]);
}

void test_attend_few(int64_t d_head, bool half) {
  for (int rows = 1; rows <= 16; ++rows) {
    const int64_t count = between(1, 150), part = 16 * between(1, 4), parts = (count + part - 1) / part + 1;
    const Cache keys(count * d_head, half), values(count * d_head, half);
    const Floats q = normals(rows * d_head, 2);
    const int64_t step = rows * (d_head + 2);
    Floats partial(parts * step, kNaN), z(rows * d_head, kNaN);
    std::vector<const float*> queries;
    std::vector<float*> outs;
    std::vector<int64_t> limit;
    for (int r = 0; r < rows; ++r) {
      queries.push_back(&q[r * d_head]);
      outs.push_back(&z[r * d_head]);
      limit.push_back(r == 0 ? count : between(1, count));
    }
    for (int64_t p = 0; p < parts; ++p)  // the last is empty, as of a sequence shorter than another
      kernels().attend_few({queries.data(), limit.data(), rows, keys.cached(), values.cached(), d_head, p * part,
                            std::min(count, (p + 1) * part), 0.2f, &partial[p * step]});
    kernels().merge(partial.data(), parts, step, rows, d_head, outs.data());
    for (int r = 0; r < rows; ++r)
      check_attention("attend_few", outs[r], queries[r], keys, values, 0, d_head, limit[r], 0.2f);
  }
}

void test_attend_many(int64_t d_head, bool half) {
  for (int count = 1; count <= 16; ++count) {
    const int64_t heads = between(1, 3), limit = between(1, 100), end = limit + count - 1;
    const int64_t q_stride = heads * d_head + 5, z_stride = heads * d_head + 1;
    const Cache keys(end * d_head, half), values(end * d_head, half);
    const Floats q = normals(count * q_stride, 2);
    Floats z(count * z_stride, kUntouched), scratch(many_scratch(d_head, heads), kNaN);
    kernels().attend_many({q.data(), z.data(), q_stride, z_stride, heads, d_head, limit, count, keys.cached(),
                           values.cached(), 0.2f, scratch.data()});
    for (int t = 0; t < count; ++t) {
      for (int64_t head = 0; head < heads; ++head)
        check_attention("attend_many", &z[t * z_stride + head * d_head], &q[t * q_stride + head * d_head], keys, values,
                        0, d_head, limit + t, 0.2f);
      expect(z[t * z_stride + heads * d_head] == kUntouched, "attend_many: wrote behind a token");
    }
  }
}

void test_rotate() {
  for (int64_t r : {0, 8, 12, 16}) {
    const int64_t d_head = 32;
    Floats x = normals(d_head), out(d_head, kNaN);
    const Floats angles = normals(r);
    Floats cos, sin;
    for (float angle : angles) cos.push_back(std::cos(angle)), sin.push_back(std::sin(angle));
    kernels().rotate(x.data(), cos.data(), sin.data(), r, d_head, out.data());
    for (int64_t i = 0; i < d_head; ++i) {
      const int64_t k = r ? i % r : 0;
      double wanted = x[i];
      if (i < r) wanted = x[i] * cos[k] - x[i + r] * sin[k];
      else if (i < 2 * r) wanted = x[i] * cos[k] + x[i - r] * sin[k];
      expect(near(out[i], wanted, 1e-6), "rotate: %d of %d is %g, not %g", (int)i, (int)r, out[i], wanted);
    }
    kernels().rotate(x.data(), cos.data(), sin.data(), r, d_head, x.data());
    expect(x == out, "rotate: another result in place");
  }
}

void test_to_half() {
  Floats x = {0.0f,   -0.0f,   65504.0f, 65519.9f, 65520.0f, -1e9f,
              6e-8f,  2.9e-8f, 5.96e-8f, 1e-40f,   6.1e-5f,  1.00048828125f};
  while (x.size() < 4096) x.push_back(std::ldexp(normal(), (int)between(-28, 17)));
  std::vector<uint16_t> out(x.size());
  kernels().to_half(x.data(), (int64_t)x.size(), out.data());
  for (size_t i = 0; i < x.size(); ++i) expect(out[i] == float_to_half(x[i]), "to_half(%g) is %04x", x[i], out[i]);
}

void test_reductions() {
  for (int64_t count : {1, 15, 64, 130, 1000}) {
    const Floats x = normals(count, 4);
    Floats groups((count + 63) / 64);
    kernels().group_largest(x.data(), count, groups.data());
    float most = x[0];
    for (int64_t g = 0; g < (int64_t)groups.size(); ++g) {
      const float wanted = *std::max_element(&x[64 * g], &x[0] + std::min(count, 64 * g + 64));
      expect(groups[g] == wanted, "group_largest: group %d of %d numbers is %g, not %g", (int)g, (int)count, groups[g],
             wanted);
      most = std::max(most, wanted);
    }
    double wanted = 0;
    for (float number : x) wanted += std::exp((double)number - most);
    const float got = kernels().sum_exponentials(x.data(), count, most);
    expect(near(got, wanted, 2e-6 * wanted), "sum_exponentials: of %d numbers %g, not %g", (int)count, got, wanted);
  }
}

void test_kernels() {
  test_prepare();
  test_products();
  test_silu();
  for (int64_t d_head : {16, 64, 80, 128}) {
    for (bool half : {false, true}) {
      test_attend_few(d_head, half);
      test_attend_many(d_head, half);
    }
  }
  test_rotate();
  test_to_half();
  test_reductions();
}

}  // namespace
