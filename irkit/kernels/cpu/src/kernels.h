// What each instruction set implements: the arithmetic of a layer, without threads and without allocation.
#pragma once

#include "forms.h"

namespace irkit {

// A matrix as the kernels read it. `data` is null where the model has no such matrix.
struct Matrix {
  const uint8_t* data;
  const float* bias;  // [rows], or null
  Form form;
  int64_t rows, cols;
};

// Activations are laid out for the matrix products in tiles of a few rows of the batch. A tile of n rows holds, block by
// block of 32 columns, for forms with codes: 8 quads of n x 4 int8; then, n numbers each, the scale of the first 16
// columns, that of the others, the sum of the scaled int8, and minus the sums of the int8 of either half. For the
// other forms n x 32 float32, column by column.
constexpr int64_t kCodedBlock = 52;   // bytes of a row in a block of the first kind
constexpr int64_t kFloatBlock = 128;  // and of the second

struct Tiles {
  uint8_t* coded;  // null where no matrix asks for it
  float* floats;
  int64_t rows, cols;
};

enum class Finish { kStore, kAdd, kGate };

// y[row, i] = x[row] . matrix[i] + bias[i]; kAdd adds add[row, i], and leaves y itself in `alone` where that is not
// null; kGate is silu(y) times the product with `up`.
struct Product {
  Matrix matrix;
  Matrix up;
  Tiles x;
  Finish finish;
  const float* add;
  float* out;
  int64_t stride;  // of `out`, `add` and `alone`, from row to row
  float* alone = nullptr;
};

// Keys or values of one sequence and one head: [capacity, d_head], of float16 or float32.
struct Cached {
  const void* data;
  bool half;
};

// A few queries [rows, d_head] over keys [first, last); query i sees keys below limit[i]. What a part of the keys
// gives is `partial` [rows, 2 + d_head]: the largest score, the sum of the exponentials, and the mix of the values.
struct FewQueries {
  const float* const* q;
  const int64_t* limit;
  int rows;
  Cached keys, values;
  int64_t d_head, first, last;
  float scale;
  float* partial;
};

// Queries of `count` <= 16 neighbouring tokens and of all `heads` that share keys and values. q and z are of the
// first token and head; from token to token it is as many numbers as their strides say. The first token sees `limit` keys, the next
// one more. `scratch` holds many_scratch(d_head, heads) numbers.
struct ManyQueries {
  const float* q;
  float* z;
  int64_t q_stride, z_stride, heads, d_head, limit;
  int count;
  Cached keys, values;
  float scale;
  float* scratch;
};

// The probabilities with which `count` <= 16 queries look at the keys: those of a token see `limit[i]` of them. q is of
// the first; from query to query it is `q_stride` numbers, and `out_stride` from one row of `keys_count` results to
// the next. What is not seen is 0.
struct Pattern {
  const float* q;
  int64_t q_stride;
  int count;
  const int64_t* limit;
  Cached keys;
  int64_t d_head, keys_count;
  float scale;
  float* out;
  int64_t out_stride;
};

constexpr int64_t kKeys = 32;  // taken at a time by many queries
static constexpr int64_t many_scratch(int64_t d_head, int64_t heads) {
  return kKeys * d_head * 2 + heads * (2 * d_head + 2) * 16 + kKeys * 16;
}

struct Kernels {
  const char* name;
  int tile_rows;  // the most rows of activations in a tile
  // Rows [first, last) of x [rows, cols], normed first where `norm` is not null, into their tiles.
  void (*prepare)(const float* x, int64_t stride, const float* norm, float eps, Tiles tiles, int64_t first, int64_t last);
  // Panels [first, last) of the product, for the tiles of activations [first_tile, last_tile).
  void (*multiply)(const Product& product, int64_t first, int64_t last, int64_t first_tile, int64_t last_tile);
  void (*attend_few)(const FewQueries& queries);
  // Partial results of `parts` ranges of keys, `step` numbers apart, into z [rows, d_head], `stride` numbers apart.
  void (*merge)(const float* partial, int64_t parts, int64_t step, int rows, int64_t d_head, float* const* z);
  void (*attend_many)(const ManyQueries& queries);
  void (*pattern)(const Pattern& pattern);
  // The root of the mean square of x [count], and x divided by it.
  void (*norm)(const float* x, int64_t count, float eps, float* scale, float* normalized);
  // silu(x) times y, to `out`, which may be either.
  void (*gate)(const float* x, const float* y, int64_t count, float* out);
  // x [d_head] with its first 2 r dimensions rotated, to `out`, which may be x.
  void (*rotate)(const float* x, const float* cos, const float* sin, int64_t r, int64_t d_head, float* out);
  void (*to_half)(const float* x, int64_t count, uint16_t* out);
  void (*group_largest)(const float* x, int64_t count, float* out);
  float (*sum_exponentials)(const float* x, int64_t count, float most);
};

const Kernels& kernels();  // those for the best instruction set of this machine

}  // namespace irkit
