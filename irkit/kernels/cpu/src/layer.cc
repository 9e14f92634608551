#include "layer.h"

#include <algorithm>

#include "pool.h"

namespace irkit {
namespace {

constexpr int64_t kCacheLine = 64;
// Keys of a part, when the keys that a few queries see are divided among threads: always as many, so that neither
// the number of threads nor that of queries changes a bit of the result.
constexpr int64_t kPartKeys = 128;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t aligned(int64_t bytes) { return ceil_div(bytes, kCacheLine) * kCacheLine; }

// Hands out pieces of the scratch memory; run without memory, it says how much is needed.
class Scratch {
 public:
  explicit Scratch(uint8_t* memory) : memory_(memory) {}
  uint8_t* bytes(int64_t count) {
    uint8_t* const here = memory_ ? memory_ + used_ : nullptr;
    used_ += aligned(count);
    return here;
  }
  float* floats(int64_t count) { return reinterpret_cast<float*>(bytes(count * (int64_t)sizeof(float))); }
  int64_t used() const { return used_; }

 private:
  uint8_t* memory_;
  int64_t used_ = 0;
};

// Room for rows of activations in both kinds of tiles.
Tiles tiles(Scratch& scratch, int64_t rows, int64_t cols) {
  const int64_t blocks = rows * ceil_div(cols, kBlock);
  uint8_t* const coded = scratch.bytes(blocks * kCodedBlock);
  float* const floats = reinterpret_cast<float*>(scratch.bytes(blocks * kFloatBlock));
  return {coded, floats, rows, cols};
}

// The rows of x in the tiles that these matrices read.
Tiles prepared(Tiles room, const float* x, int64_t rows, const float* norm, float eps,
               std::initializer_list<const Matrix*> readers) {
  Tiles made = {nullptr, nullptr, rows, room.cols};
  for (const Matrix* m : readers) {
    if (kFormInfo[m->form].groups) made.coded = room.coded;
    else made.floats = room.floats;
  }
  const int64_t step = kernels().tile_rows;
  if (rows <= 2) {  // less work than waking another thread
    kernels().prepare(x, made.cols, norm, eps, made, 0, rows);
  } else {
    parallel(ceil_div(rows, step), [&](int64_t i) {
      kernels().prepare(x, made.cols, norm, eps, made, i * step, std::min(rows, (i + 1) * step));
    });
  }
  return made;
}

// All panels of the products, which share x, divided among the threads.
void multiply_all(std::initializer_list<const Product*> products) {
  const int64_t tile_rows = kernels().tile_rows;
  const int64_t tiles = ceil_div((*products.begin())->x.rows, tile_rows);
  int64_t total = 0;
  for (const Product* p : products) total += panels(p->matrix.rows);
  // Enough tasks that a slow thread can be relieved, few enough that taking one costs nothing beside it; panels that
  // stay in a core's cache while all the tiles pass.
  const int64_t threads = irkit::threads();
  const int64_t tile_groups = std::max<int64_t>(1, std::min(tiles / 4, threads * 2));
  const int64_t group = ceil_div(tiles, tile_groups);
  const int64_t step = std::clamp<int64_t>(ceil_div(total, threads * 6), 1, 32);
  const int64_t steps = ceil_div(total, step);
  parallel(steps * ceil_div(tiles, group), [&](int64_t task) {
    const int64_t first_tile = task / steps * group;
    int64_t first = task % steps * step, last = std::min(first + step, total);
    for (const Product* p : products) {
      const int64_t count = panels(p->matrix.rows);
      if (first < count && last > 0)
        kernels().multiply(*p, std::max<int64_t>(first, 0), std::min(last, count), first_tile,
                           std::min(first_tile + group, tiles));
      first -= count;
      last -= count;
    }
  });
}

Product product(const Matrix& matrix, const Tiles& x, float* out, int64_t stride) {
  return {matrix, matrix, x, Finish::kStore, nullptr, out, stride};
}

// Single tokens are computed one way and several another, whatever else there is: the same text, divided into other
// calls, then gives the same bits.
bool are_few(int64_t tokens, int64_t group) { return tokens == 1 && group <= kMostFewRows; }

const uint8_t* head_of(const Attention& a, const void* cache, int64_t b, int64_t head) {
  const int64_t number = a.half ? 2 : 4;
  return static_cast<const uint8_t*>(cache) + (b * a.n_kv_heads + head) * a.capacity * a.d_head * number;
}

}  // namespace

int64_t linear_scratch(int64_t rows, int64_t cols) {
  Scratch scratch(nullptr);
  tiles(scratch, rows, cols);
  return scratch.used();
}

void linear(const Matrix& matrix, const float* x, int64_t rows, const float* norm, float eps, float* y,
            uint8_t* memory) {
  Scratch scratch(memory);
  const Tiles made = prepared(tiles(scratch, rows, matrix.cols), x, rows, norm, eps, {&matrix});
  const Product p = product(matrix, made, y, matrix.rows);
  multiply_all({&p});
}

int64_t attention_scratch(int64_t batch, int64_t tokens, int64_t n_heads, int64_t n_kv_heads, int64_t d_head,
                          int64_t capacity) {
  const int64_t rows = n_heads / n_kv_heads;
  if (are_few(tokens, rows))
    return aligned(batch * n_kv_heads * ceil_div(capacity, kPartKeys) * rows * (d_head + 2) * 4);
  return aligned(batch * n_kv_heads * ceil_div(tokens, 16) * aligned(many_scratch(d_head, n_heads / n_kv_heads) * 4));
}

void attend(const Attention& a, uint8_t* scratch) {
  const int64_t group = a.n_heads / a.n_kv_heads, rows = group;
  const int64_t z_stride = a.n_heads * a.d_head;
  if (are_few(a.tokens, group)) {
    int64_t most = 0;
    for (int64_t b = 0; b < a.batch; ++b) most = std::max<int64_t>(most, a.start[b] + a.count[b]);
    const int64_t parts = ceil_div(most, kPartKeys);
    const int64_t step = rows * (a.d_head + 2);
    float* const partial = reinterpret_cast<float*>(scratch);
    const auto query = [&](int64_t b, int64_t head, int64_t r, int64_t stride) {
      return (b * a.tokens + r / group) * stride + (head * group + r % group) * a.d_head;
    };
    parallel(a.batch * a.n_kv_heads * parts, [&](int64_t task) {
      const int64_t part = task % parts, head = task / parts % a.n_kv_heads;
      const int64_t b = task / parts / a.n_kv_heads;
      const float* q[kMostFewRows];
      int64_t limit[kMostFewRows];
      for (int64_t r = 0; r < rows; ++r) {
        q[r] = a.q + query(b, head, r, a.stride);
        limit[r] = a.start[b] + r / group + 1;
      }
      const int64_t end = a.start[b] + a.count[b], first = part * kPartKeys;
      const Cached keys = {head_of(a, a.keys, b, head), a.half}, values = {head_of(a, a.values, b, head), a.half};
      kernels().attend_few({q, limit, (int)rows, keys, values, a.d_head, first, std::min(first + kPartKeys, end),
                            a.scale, partial + task * step});
    });
    for (int64_t pair = 0; pair < a.batch * a.n_kv_heads; ++pair) {
      float* z[kMostFewRows];
      for (int64_t r = 0; r < rows; ++r) z[r] = a.z + query(pair / a.n_kv_heads, pair % a.n_kv_heads, r, z_stride);
      kernels().merge(partial + pair * parts * step, parts, step, (int)rows, a.d_head, z);
    }
    return;
  }
  const int64_t blocks = ceil_div(a.tokens, 16), each = aligned(many_scratch(a.d_head, group) * 4);
  parallel(a.batch * a.n_kv_heads * blocks, [&](int64_t task) {
    // The last tokens see the most: they come first, so that the end is not waiting for one of them.
    const int64_t pair = task % (a.batch * a.n_kv_heads), block = blocks - 1 - task / (a.batch * a.n_kv_heads);
    const int64_t b = pair / a.n_kv_heads, head = pair % a.n_kv_heads, first = block * 16;
    const int64_t count = std::min<int64_t>(16, a.count[b] - first);
    if (count <= 0) return;
    const int64_t token = b * a.tokens + first;
    kernels().attend_many({a.q + token * a.stride + head * group * a.d_head,
                           a.z + token * z_stride + head * group * a.d_head, a.stride, z_stride, group, a.d_head,
                           a.start[b] + first + 1, (int)count, {head_of(a, a.keys, b, head), a.half},
                           {head_of(a, a.values, b, head), a.half}, a.scale,
                           reinterpret_cast<float*>(scratch + task * each)});
  });
}

namespace {

struct LayerRoom {
  Tiles model, heads, mlp;
  float *qkv, *z, *resid, *hidden;
  uint8_t* attention;
  int64_t bytes;

  LayerRoom(uint8_t* memory, int64_t batch, int64_t tokens, int64_t n_heads, int64_t n_kv_heads, int64_t d_head,
            int64_t capacity, int64_t d_model, int64_t d_mlp) {
    Scratch scratch(memory);
    const int64_t rows = batch * tokens;
    model = tiles(scratch, rows, d_model);
    heads = tiles(scratch, rows, n_heads * d_head);
    mlp = tiles(scratch, rows, d_mlp);
    qkv = scratch.floats(rows * (n_heads + 2 * n_kv_heads) * d_head);
    z = scratch.floats(rows * n_heads * d_head);
    resid = scratch.floats(rows * d_model);
    hidden = scratch.floats(rows * d_mlp);
    attention = scratch.bytes(attention_scratch(batch, tokens, n_heads, n_kv_heads, d_head, capacity));
    bytes = scratch.used();
  }
};

// Rotates q in place, and writes the rotated k, and v, into the cache.
void remember(const Layer& l, float* qkv, int64_t rows) {
  const Attention& a = l.attention;
  const int64_t stride = (a.n_heads + 2 * a.n_kv_heads) * a.d_head;
  const auto one = [&](int64_t row) {
    const int64_t b = row / a.tokens, t = row % a.tokens;
    if (t >= a.count[b]) return;
    const float* cos = l.cos + row * l.rotary;
    const float* sin = l.sin + row * l.rotary;
    float* const q = qkv + row * stride;
    for (int64_t head = 0; head < a.n_heads + a.n_kv_heads; ++head) {
      float* const x = q + head * a.d_head;
      kernels().rotate(x, cos, sin, l.rotary, a.d_head, x);
    }
    for (int64_t head = 0; head < a.n_kv_heads; ++head) {
      const int64_t at = ((b * a.n_kv_heads + head) * a.capacity + a.start[b] + t) * a.d_head;
      const float* const k = q + (a.n_heads + head) * a.d_head;
      const float* const v = k + a.n_kv_heads * a.d_head;
      if (a.half) {
        kernels().to_half(k, a.d_head, static_cast<uint16_t*>(l.keys) + at);
        kernels().to_half(v, a.d_head, static_cast<uint16_t*>(l.values) + at);
      } else {
        std::copy_n(k, a.d_head, static_cast<float*>(l.keys) + at);
        std::copy_n(v, a.d_head, static_cast<float*>(l.values) + at);
      }
    }
  };
  if (rows <= 4) {
    for (int64_t row = 0; row < rows; ++row) one(row);
  } else {
    parallel(rows, one);
  }
}

}  // namespace

int64_t layer_scratch(int64_t batch, int64_t tokens, int64_t n_heads, int64_t n_kv_heads, int64_t d_head,
                      int64_t capacity, int64_t d_model, int64_t d_mlp) {
  return LayerRoom(nullptr, batch, tokens, n_heads, n_kv_heads, d_head, capacity, d_model, d_mlp).bytes;
}

void layer(const Layer& l, uint8_t* scratch) {
  Attention a = l.attention;
  const int64_t d_model = l.o.rows, d_mlp = l.down.cols, q = l.q.rows, kv = l.k.rows;
  const LayerRoom room(scratch, a.batch, a.tokens, a.n_heads, a.n_kv_heads, a.d_head, a.capacity, d_model, d_mlp);
  // Of a single sequence, the padding at the end is not computed at all.
  const int64_t rows = a.batch > 1 ? a.batch * a.tokens : std::min<int64_t>(a.count[0], a.tokens);
  const int64_t stride = q + 2 * kv;

  Tiles x = prepared(room.model, l.resid, rows, l.ln1, l.eps, {&l.q, &l.k, &l.v});
  const Product pq = product(l.q, x, room.qkv, stride), pk = product(l.k, x, room.qkv + q, stride),
                pv = product(l.v, x, room.qkv + q + kv, stride);
  multiply_all({&pq, &pk, &pv});
  remember(l, room.qkv, rows);
  a.q = room.qkv;
  a.stride = stride;
  a.keys = l.keys;
  a.values = l.values;
  a.z = room.z;
  attend(a, room.attention);

  x = prepared(room.heads, room.z, rows, nullptr, 0, {&l.o});
  Product p = product(l.o, x, room.resid, d_model);
  p.finish = Finish::kAdd;
  p.add = l.resid;
  multiply_all({&p});

  x = prepared(room.model, room.resid, rows, l.ln2, l.eps, {&l.gate, &l.up});
  p = product(l.gate, x, room.hidden, d_mlp);
  p.finish = Finish::kGate;
  p.up = l.up;
  multiply_all({&p});

  x = prepared(room.mlp, room.hidden, rows, nullptr, 0, {&l.down});
  p = product(l.down, x, l.out, d_model);
  p.finish = Finish::kAdd;
  p.add = room.resid;
  multiply_all({&p});
}

}  // namespace irkit
