// A decoder layer, and its parts, on the threads of the pool.
#pragma once

#include "kernels.h"

namespace irkit {

// y = matrix . norm(x), row by row of x [rows, cols]; `norm` may be null. `scratch` holds linear_scratch() bytes.
int64_t linear_scratch(int64_t rows, int64_t cols);
void linear(const Matrix& matrix, const float* x, int64_t rows, const float* norm, float eps, float* y, uint8_t* scratch);

// [batch, tokens] queries at start[b] and after, of which only the first count[b] of each row are computed; keys
// and values already hold their own. q and z are [batch, tokens, n_heads, d_head]; the tokens of q lie `stride`
// numbers apart. The cache is [batch, n_kv_heads, capacity, d_head].
struct Attention {
  int64_t batch, tokens, n_heads, n_kv_heads, d_head, capacity;
  const int32_t* start;
  const int32_t* count;
  const float* q;
  int64_t stride;
  const void* keys;
  const void* values;
  bool half;
  float scale;
  float* z;
};
constexpr int64_t kMostFewRows = 16;  // queries of a token and key/value head up to which they count as few
int64_t attention_scratch(int64_t batch, int64_t tokens, int64_t n_heads, int64_t n_kv_heads, int64_t d_head,
                          int64_t capacity);
void attend(const Attention& a, uint8_t* scratch);

// The probabilities [batch, n_heads, tokens, capacity] by which attention mixes the values. Each query has a position
// of its own, [batch, tokens], and sees the keys up to it; of `a`, `start`, `count`, `values` and `z` are not read.
void pattern(const Attention& a, const int32_t* positions, float* out);

// Runs that differ from a common one from some position on. Of each, the tokens from there on lie in a row among all
// packed tokens, from `first` to `last`: their queries [n_heads, d_head], keys and values [n_kv_heads, d_head] lie
// `stride` numbers apart. What stands before them is the common run's, [length, n_kv_heads, d_head]. z is [tokens,
// n_heads, d_head]; runs with `last` before `first` have no tokens.
struct Runs {
  int64_t runs, length, n_heads, n_kv_heads, d_head;
  const int32_t* first;
  const int32_t* last;
  const int32_t* position;  // [tokens]
  const float* common_keys;
  const float* common_values;
  const float* q;
  const float* keys;
  const float* values;
  int64_t stride;
  float scale;
  float* z;
};
int64_t runs_scratch(int64_t runs, int64_t length, int64_t n_heads, int64_t n_kv_heads, int64_t d_head);
void attend_runs(const Runs& r, uint8_t* scratch);

// What a layer computes on its way, by the numbers with which it is asked for: [batch, tokens] rows of some width.
enum Point {
  kScale1, kNormalized1, kQ, kK, kV, kRotQ, kRotK, kZ, kAttnOut, kResidMid,
  kScale2, kNormalized2, kPre, kPreLinear, kPost, kMlpOut, kPoints
};

// One block of a Llama: resid [batch, tokens, d_model] to out; keys and values are written at the tokens' positions.
struct Layer {
  Attention attention;  // q, stride and z are the layer's own affair
  const float* resid;
  float* out;
  const float* cos;  // [batch, tokens, rotary]
  const float* sin;
  int64_t rotary;
  void* keys;
  void* values;
  const float* ln1;
  const float* ln2;
  float eps;
  Matrix q, k, v, o, gate, up, down;
  float* shown[kPoints];  // where to put what is asked for; null for the rest. It changes no bit of the result.
};
int64_t layer_scratch(int64_t batch, int64_t tokens, int64_t n_heads, int64_t n_kv_heads, int64_t d_head,
                      int64_t capacity, int64_t d_model, int64_t d_mlp);
int64_t width(const Layer& l, Point point);  // of a row
// The second half of a layer alone: from `rows` of resid, which is the stream in its middle, to out. Of the layer, what
// belongs to the first half is not read.
int64_t mlp_scratch(int64_t rows, int64_t d_model, int64_t d_mlp);
void mlp(const Layer& l, int64_t rows, uint8_t* scratch);
void layer(const Layer& l, uint8_t* scratch);
// A layer of runs, of which `tokens` are packed: what `r` says of queries, keys, values and z is the layer's own affair,
// and of `l` its attention is not read. Behind its attention, the stream of tokens whose `begins` is not negative
// becomes that row of `table`.
int64_t layer_of_runs_scratch(int64_t runs, int64_t tokens, int64_t length, int64_t n_heads, int64_t n_kv_heads,
                              int64_t d_head, int64_t d_model, int64_t d_mlp);
void layer_of_runs(const Layer& l, Runs r, int64_t tokens, const float* table, const int32_t* begins, uint8_t* scratch);

}  // namespace irkit
