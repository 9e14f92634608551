#include "layer.h"

#include <algorithm>

#include "pool.h"

namespace irkit {
namespace {

constexpr int64_t kCacheLine = 64;
// Keys of a part, when the keys that a few queries see are divided among threads: always as many, so that neither
// the number of threads nor that of queries changes a bit of the result.
constexpr int64_t kPartKeys = 128;
// Of the panels that one task multiplies: what half of a core's second cache holds.
constexpr int64_t kPanelsBytes = 384 << 10;

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
  int64_t bytes = 1;
  for (const Product* p : products) bytes = std::max(bytes, panel_layout(p->matrix.form, p->matrix.cols).bytes);
  // Enough tasks that a slow thread can be relieved, few enough that taking one costs nothing beside it; panels that
  // stay in a core's cache while all the tiles pass, and pass them once where there are enough.
  const int64_t threads = irkit::threads();
  const int64_t most = std::clamp<int64_t>(kPanelsBytes / bytes, 1, 32);
  const int64_t step = std::clamp<int64_t>(ceil_div(total, threads * 6), 1, most);
  const int64_t steps = ceil_div(total, step);
  const int64_t tile_groups = steps >= threads * 6 ? 1 : std::max<int64_t>(1, std::min(tiles / 4, threads * 2));
  const int64_t group = ceil_div(tiles, tile_groups);
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

  LayerRoom(uint8_t* memory, int64_t rows, int64_t n_heads, int64_t n_kv_heads, int64_t d_head, int64_t d_model,
            int64_t d_mlp, int64_t attention_bytes) {
    Scratch scratch(memory);
    model = tiles(scratch, rows, d_model);
    heads = tiles(scratch, rows, n_heads * d_head);
    mlp = tiles(scratch, rows, d_mlp);
    qkv = scratch.floats(rows * (n_heads + 2 * n_kv_heads) * d_head);
    z = scratch.floats(rows * n_heads * d_head);
    resid = scratch.floats(rows * d_model);
    hidden = scratch.floats(rows * d_mlp);
    attention = scratch.bytes(attention_bytes);
    bytes = scratch.used();
  }
};

// Does it for every row: on several threads, where that is not more work than waking them.
template <class Work>
void each(int64_t rows, const Work& one) {
  if (rows > 4) return parallel(rows, one);
  for (int64_t row = 0; row < rows; ++row) one(row);
}

// q, k and v of each row, one behind the other, of the stream that enters the layer.
void project(const Layer& l, int64_t rows, Tiles model, float* qkv) {
  const int64_t q = l.q.rows, kv = l.k.rows, stride = q + 2 * kv;
  const Tiles x = prepared(model, l.resid, rows, l.ln1, l.eps, {&l.q, &l.k, &l.v});
  const Product pq = product(l.q, x, qkv, stride), pk = product(l.k, x, qkv + q, stride),
                pv = product(l.v, x, qkv + q + kv, stride);
  multiply_all({&pq, &pk, &pv});
}

// Rotates so many heads of a row in place.
void turn(const Layer& l, int64_t row, int64_t heads, int64_t d_head, float* x) {
  const float* const cos = l.cos + row * l.rotary;
  const float* const sin = l.sin + row * l.rotary;
  for (int64_t head = 0; head < heads; ++head, x += d_head) kernels().rotate(x, cos, sin, l.rotary, d_head, x);
}

// Rotates q in place, and writes the rotated k, and v, into the cache.
void remember(const Layer& l, float* qkv, int64_t rows) {
  const Attention& a = l.attention;
  const int64_t stride = (a.n_heads + 2 * a.n_kv_heads) * a.d_head;
  each(rows, [&](int64_t row) {
    const int64_t b = row / a.tokens, t = row % a.tokens;
    if (t >= a.count[b]) return;
    float* const q = qkv + row * stride;
    turn(l, row, a.n_heads + a.n_kv_heads, a.d_head, q);
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
  });
}

void show_norm(const Layer& l, const float* x, int64_t rows, Point scale, Point normalized) {
  const int64_t d_model = l.down.rows;
  float* const root = l.shown[scale];
  float* const out = l.shown[normalized];
  if (!root && !out) return;
  each(rows, [&](int64_t row) {
    kernels().norm(x + row * d_model, d_model, l.eps, root ? root + row : nullptr, out ? out + row * d_model : nullptr);
  });
}

// The product with what is in the tiles, added to the stream; and by itself, where it is asked for.
void add_to(const Layer& l, const float* stream, const Matrix& matrix, const Tiles& x, Point point, float* out) {
  Product p = product(matrix, x, out, matrix.rows);
  p.finish = Finish::kAdd;
  p.add = stream;
  p.alone = l.shown[point];
  multiply_all({&p});
}

// The second half of a layer, from the stream in the middle to l.out.
void feed_forward(const Layer& l, const float* mid, int64_t rows, Tiles model, Tiles mlp, float* room) {
  const int64_t d_mlp = l.down.cols;
  show_norm(l, mid, rows, kScale2, kNormalized2);
  Tiles x = prepared(model, mid, rows, l.ln2, l.eps, {&l.gate, &l.up});
  float* const hidden = l.shown[kPost] ? l.shown[kPost] : room;
  if (l.shown[kPre] || l.shown[kPreLinear]) {
    float* const pre = l.shown[kPre] ? l.shown[kPre] : hidden;
    float* const linear = l.shown[kPreLinear] ? l.shown[kPreLinear] : hidden;
    const Product gated = product(l.gate, x, pre, d_mlp), up = product(l.up, x, linear, d_mlp);
    multiply_all({&gated, &up});
    each(rows, [&](int64_t row) {
      kernels().gate(pre + row * d_mlp, linear + row * d_mlp, d_mlp, hidden + row * d_mlp);
    });
  } else {
    Product p = product(l.gate, x, hidden, d_mlp);
    p.finish = Finish::kGate;
    p.up = l.up;
    multiply_all({&p});
  }
  x = prepared(mlp, hidden, rows, nullptr, 0, {&l.down});
  add_to(l, mid, l.down, x, kMlpOut, l.out);
}

}  // namespace

int64_t mlp_scratch(int64_t rows, int64_t d_model, int64_t d_mlp) {
  Scratch scratch(nullptr);
  tiles(scratch, rows, d_model);
  tiles(scratch, rows, d_mlp);
  scratch.floats(rows * d_mlp);
  return scratch.used();
}

void mlp(const Layer& l, int64_t rows, uint8_t* memory) {
  Scratch scratch(memory);
  const Tiles model = tiles(scratch, rows, l.down.rows), inside = tiles(scratch, rows, l.down.cols);
  feed_forward(l, l.resid, rows, model, inside, scratch.floats(rows * l.down.cols));
}

int64_t layer_scratch(int64_t batch, int64_t tokens, int64_t n_heads, int64_t n_kv_heads, int64_t d_head,
                      int64_t capacity, int64_t d_model, int64_t d_mlp) {
  return LayerRoom(nullptr, batch * tokens, n_heads, n_kv_heads, d_head, d_model, d_mlp,
                   attention_scratch(batch, tokens, n_heads, n_kv_heads, d_head, capacity))
      .bytes;
}

namespace {

// The runs of a head are dealt out to at most this many tasks: room for each run would be more than the caches hold.
constexpr int64_t kParts = 16;

}  // namespace

int64_t runs_scratch(int64_t runs, int64_t length, int64_t n_heads, int64_t n_kv_heads, int64_t d_head) {
  const int64_t cached = aligned(2 * length * d_head * 4), own = aligned(many_scratch(d_head, n_heads / n_kv_heads) * 4);
  return std::min(runs, kParts) * n_kv_heads * (cached + own);
}

void attend_runs(const Runs& r, uint8_t* scratch) {
  constexpr int64_t kAtOnce = 16;
  const int64_t h = r.d_head, group = r.n_heads / r.n_kv_heads, z_stride = r.n_heads * h;
  const int64_t parts = std::min(r.runs, kParts), each = runs_scratch(1, r.length, group, 1, h);
  parallel(parts * r.n_kv_heads, [&](int64_t task) {
    const int64_t head = task % r.n_kv_heads;
    float* const keys = reinterpret_cast<float*>(scratch + task * each);
    float* const values = keys + r.length * h;
    float* const room = reinterpret_cast<float*>(scratch + task * each + aligned(2 * r.length * h * 4));
    for (int64_t run = task / r.n_kv_heads; run < r.runs; run += parts) {
      const int64_t first = r.first[run], count = r.last[run] - first + 1;
      if (count <= 0) continue;
      const int64_t begin = r.position[first];
      for (int64_t at = 0; at < begin + count; ++at) {
        const bool own = at >= begin;
        const int64_t from = (own ? (first + at - begin) * r.stride : at * r.n_kv_heads * h) + head * h;
        std::copy_n((own ? r.keys : r.common_keys) + from, h, keys + at * h);
        std::copy_n((own ? r.values : r.common_values) + from, h, values + at * h);
      }
      for (int64_t i = 0; i < count; i += kAtOnce) {
        const int64_t token = first + i, at = head * group * h;
        kernels().attend_many({r.q + token * r.stride + at, r.z + token * z_stride + at, r.stride, z_stride, group, h,
                               begin + i + 1, (int)std::min(kAtOnce, count - i), {keys, false}, {values, false},
                               r.scale, room});
      }
    }
  });
}

void pattern(const Attention& a, const int32_t* positions, float* out) {
  constexpr int64_t kAtOnce = 16;
  const int64_t group = a.n_heads / a.n_kv_heads, blocks = ceil_div(a.tokens, kAtOnce);
  parallel(a.batch * a.n_heads * blocks, [&](int64_t task) {
    // The longest rows first, and those of heads that share keys one after the other.
    const int64_t block = blocks - 1 - task / (a.batch * a.n_heads), head = task % a.n_heads;
    const int64_t b = task / a.n_heads % a.batch, first = block * kAtOnce;
    const int count = (int)std::min(kAtOnce, a.tokens - first);
    int64_t limit[kAtOnce];
    for (int i = 0; i < count; ++i)
      limit[i] = std::clamp<int64_t>((int64_t)positions[b * a.tokens + first + i] + 1, 1, a.capacity);
    kernels().pattern({a.q + (b * a.tokens + first) * a.stride + head * a.d_head, a.stride, count, limit,
                       {head_of(a, a.keys, b, head / group), a.half}, a.d_head, a.capacity, a.scale,
                       out + ((b * a.n_heads + head) * a.tokens + first) * a.capacity, a.capacity});
  });
}

int64_t width(const Layer& l, Point point) {
  switch (point) {
    case kScale1:
    case kScale2:
      return 1;
    case kQ:
    case kRotQ:
    case kZ:
      return l.q.rows;
    case kK:
    case kV:
    case kRotK:
      return l.k.rows;
    case kPre:
    case kPreLinear:
    case kPost:
      return l.down.cols;
    default:
      return l.o.rows;
  }
}

void layer(const Layer& l, uint8_t* scratch) {
  Attention a = l.attention;
  const int64_t d_model = l.o.rows, d_mlp = l.down.cols, q = l.q.rows, kv = l.k.rows;
  const LayerRoom room(scratch, a.batch * a.tokens, a.n_heads, a.n_kv_heads, a.d_head, d_model, d_mlp,
                       attention_scratch(a.batch, a.tokens, a.n_heads, a.n_kv_heads, a.d_head, a.capacity));
  // Of a single sequence, the padding at the end is not computed at all.
  const int64_t rows = a.batch > 1 ? a.batch * a.tokens : std::min<int64_t>(a.count[0], a.tokens);
  const int64_t stride = q + 2 * kv;

  float* const* const shown = l.shown;
  // Part of each row of what q, k and v are computed to.
  const auto show = [&](Point point, int64_t from, int64_t count) {
    if (!shown[point]) return;
    each(rows, [&](int64_t row) {
      std::copy_n(room.qkv + row * stride + from, count, shown[point] + row * count);
    });
  };

  show_norm(l, l.resid, rows, kScale1, kNormalized1);
  project(l, rows, room.model, room.qkv);
  show(kQ, 0, q);
  show(kK, q, kv);
  show(kV, q + kv, kv);
  remember(l, room.qkv, rows);
  show(kRotQ, 0, q);
  show(kRotK, q, kv);
  a.q = room.qkv;
  a.stride = stride;
  a.keys = l.keys;
  a.values = l.values;
  a.z = shown[kZ] ? shown[kZ] : room.z;
  attend(a, room.attention);

  const Tiles x = prepared(room.heads, a.z, rows, nullptr, 0, {&l.o});
  float* const mid = shown[kResidMid] ? shown[kResidMid] : room.resid;
  add_to(l, l.resid, l.o, x, kAttnOut, mid);

  feed_forward(l, mid, rows, room.model, room.mlp, room.hidden);
  // Padding that was not computed holds nothing that was in this memory before.
  for (int point = 0; point < kPoints; ++point) {
    const int64_t numbers = width(l, (Point)point);
    if (shown[point]) std::fill(shown[point] + rows * numbers, shown[point] + a.batch * a.tokens * numbers, 0.0f);
  }
}

int64_t layer_of_runs_scratch(int64_t runs, int64_t tokens, int64_t length, int64_t n_heads, int64_t n_kv_heads,
                              int64_t d_head, int64_t d_model, int64_t d_mlp) {
  return LayerRoom(nullptr, tokens, n_heads, n_kv_heads, d_head, d_model, d_mlp,
                   runs_scratch(runs, length, n_heads, n_kv_heads, d_head))
      .bytes;
}

void layer_of_runs(const Layer& l, Runs r, int64_t tokens, const float* table, const int32_t* begins, uint8_t* scratch) {
  const int64_t d_model = l.o.rows, q = l.q.rows, kv = l.k.rows;
  const LayerRoom room(scratch, tokens, r.n_heads, r.n_kv_heads, r.d_head, d_model, l.down.cols,
                       runs_scratch(r.runs, r.length, r.n_heads, r.n_kv_heads, r.d_head));
  int64_t rows = 0;  // what lies behind the last run is not computed
  for (int64_t run = 0; run < r.runs; ++run)
    if (r.first[run] <= r.last[run]) rows = std::max<int64_t>(rows, r.last[run] + 1);
  r.stride = q + 2 * kv;
  r.q = room.qkv;
  r.keys = r.q + q;
  r.values = r.keys + kv;
  r.z = room.z;

  project(l, rows, room.model, room.qkv);
  each(rows, [&](int64_t row) { turn(l, row, r.n_heads + r.n_kv_heads, r.d_head, room.qkv + row * r.stride); });
  attend_runs(r, room.attention);
  add_to(l, l.resid, l.o, prepared(room.heads, r.z, rows, nullptr, 0, {&l.o}), kAttnOut, room.resid);
  for (int64_t row = 0; row < rows; ++row)
    if (begins[row] >= 0) std::copy_n(table + begins[row] * d_model, d_model, room.resid + row * d_model);
  feed_forward(l, room.resid, rows, room.model, room.mlp, room.hidden);
  std::fill(l.out + rows * d_model, l.out + tokens * d_model, 0.0f);
}

}  // namespace irkit
