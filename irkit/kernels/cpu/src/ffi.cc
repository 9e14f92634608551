// The kernels as XLA calls them. Sizes are checked against each other here; shapes are what Python traced.
#include "xla/ffi/api/ffi.h"

#include <algorithm>
#include <string>

#include "api.h"
#include "layer.h"
#include "logits.h"
#include "pack.h"
#include "pool.h"
#include "sample.h"

namespace ffi = xla::ffi;

namespace irkit {
namespace {

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;
using Bytes = ffi::Buffer<ffi::U8>;
using Dimensions = ffi::AnyBuffer::Dimensions;

ffi::Error wrong(const std::string& what) { return ffi::Error(ffi::ErrorCode::kInvalidArgument, "irkit: " + what); }

// Whether the packed matrix that begins at byte `start` lies within the buffer.
bool fits(const Bytes& packed, int64_t start, int64_t form, int64_t rows, int64_t cols) {
  if (form < 0 || form >= kForms || rows <= 0 || cols <= 0 || start < 0 || start % 64) return false;
  return start + panels(rows) * panel_layout((Form)form, cols).bytes <= (int64_t)packed.element_count();
}

Matrix matrix(const Bytes& packed, int64_t start, int64_t form, int64_t rows, int64_t cols) {
  return {packed.typed_data() + start, nullptr, (Form)form, rows, cols};
}

// A matrix of a layer, and the buffer that it is to be read from.
struct Packed {
  Matrix* to;
  const Bytes* from;
  int64_t rows, cols;
};

// Sets it, with its bias if there are biases and the one of this number is not empty.
ffi::Error set_matrix(const std::string& name, const Packed& m, int64_t start, int64_t form, ffi::RemainingArgs biases,
                      size_t number) {
  if (!fits(*m.from, start, form, m.rows, m.cols)) return wrong(name + ": a packed matrix has another size");
  *m.to = matrix(*m.from, start, form, m.rows, m.cols);
  if (biases.size() == 0) return ffi::Error::Success();
  const auto bias = biases.get<Floats>(number);
  if (bias.has_error()) return bias.error();
  if (bias->element_count() == 0) return ffi::Error::Success();
  if ((int64_t)bias->element_count() != m.rows) return wrong(name + ": a bias has another size");
  m.to->bias = bias->typed_data();
  return ffi::Error::Success();
}

int64_t product_but_last(Dimensions dims) {
  int64_t product = 1;
  for (size_t i = 0; i + 1 < dims.size(); ++i) product *= dims[i];
  return product;
}

ffi::Error take_rows(Bytes packed, Ints ids, int64_t start, int64_t form, int64_t rows, ffi::ResultBuffer<ffi::F32> out) {
  const int64_t cols = out->dimensions()[out->dimensions().size() - 1];
  if (!fits(packed, start, form, rows, cols)) return wrong("take: the packed matrix has another size");
  const int64_t count = (int64_t)ids.element_count();
  constexpr int64_t kAtOnce = 64;  // neighbouring rows lie in the same panel, which stays in one core's cache
  parallel((count + kAtOnce - 1) / kAtOnce, [&](int64_t i) {
    const int64_t first = i * kAtOnce;
    irkit_unpack_rows((int32_t)form, packed.typed_data() + start, rows, cols, ids.typed_data() + first,
                      std::min(kAtOnce, count - first), out->typed_data() + first * cols);
  });
  return ffi::Error::Success();
}

ffi::Error multiply(Floats x, Bytes packed, int64_t start, int64_t form, int64_t rows, ffi::ResultBuffer<ffi::F32> y,
                    ffi::ResultBuffer<ffi::U8> scratch) {
  const int64_t cols = x.dimensions()[x.dimensions().size() - 1], count = product_but_last(x.dimensions());
  if (!fits(packed, start, form, rows, cols)) return wrong("linear: the packed matrix has another size");
  if ((int64_t)scratch->element_count() < linear_scratch(count, cols)) return wrong("linear: too little scratch memory");
  linear(matrix(packed, start, form, rows, cols), x.typed_data(), count, nullptr, 0, y->typed_data(), scratch->typed_data());
  return ffi::Error::Success();
}

// What is read off the shapes of q [b, t, H, h] and of the keys [b, K, c, h]; false where they disagree.
bool shape_keys(Attention* a, Dimensions q, const ffi::AnyBuffer& keys, float scale) {
  const Dimensions cache = keys.dimensions();
  if (q.size() != 4 || cache.size() != 4) return false;
  a->batch = q[0];
  a->tokens = q[1];
  a->n_heads = q[2];
  a->d_head = q[3];
  a->n_kv_heads = cache[1];
  a->capacity = cache[2];
  a->keys = keys.untyped_data();
  a->half = keys.element_type() == ffi::F16;
  a->scale = scale;
  return cache[0] == a->batch && cache[3] == a->d_head && a->d_head % 16 == 0 && a->n_kv_heads > 0 &&
         a->n_heads % a->n_kv_heads == 0 && (a->half || keys.element_type() == ffi::F32);
}

// The same for attention, which also reads values, and says where the tokens stand.
bool shape_attention(Attention* a, Dimensions q, const ffi::AnyBuffer& keys, const ffi::AnyBuffer& values, const Ints& start,
                     const Ints& count, float scale) {
  if (!shape_keys(a, q, keys, scale)) return false;
  a->start = start.typed_data();
  a->count = count.typed_data();
  a->values = values.untyped_data();
  if (keys.element_type() != values.element_type() || keys.element_count() != values.element_count()) return false;
  if ((int64_t)start.element_count() != a->batch || (int64_t)count.element_count() != a->batch) return false;
  // Numbers in arrays are nobody's promise: nothing is read or written outside the cache.
  for (int64_t b = 0; b < a->batch; ++b) {
    const int64_t from = a->start[b], tokens = a->count[b];
    if (from < 0 || tokens < 0 || tokens > a->tokens || from + tokens > a->capacity) return false;
  }
  return true;
}

ffi::Error attention(Floats q, ffi::AnyBuffer keys, ffi::AnyBuffer values, Ints start, Ints count, float scale,
                     ffi::ResultBuffer<ffi::F32> z, ffi::ResultBuffer<ffi::U8> scratch) {
  Attention a = {};
  if (!shape_attention(&a, q.dimensions(), keys, values, start, count, scale))
    return wrong("attention: shapes or positions do not fit");
  if ((int64_t)scratch->element_count() < attention_scratch(a.batch, a.tokens, a.n_heads, a.n_kv_heads, a.d_head, a.capacity))
    return wrong("attention: too little scratch memory");
  a.q = q.typed_data();
  a.stride = a.n_heads * a.d_head;
  a.z = z->typed_data();
  attend(a, scratch->typed_data());
  return ffi::Error::Success();
}

ffi::Error look(Floats q, ffi::AnyBuffer keys, Ints positions, float scale, ffi::ResultBuffer<ffi::F32> out) {
  Attention a = {};
  if (!shape_keys(&a, q.dimensions(), keys, scale) || a.capacity < 1 ||
      (int64_t)positions.element_count() != a.batch * a.tokens ||
      (int64_t)out->element_count() != a.batch * a.n_heads * a.tokens * a.capacity)
    return wrong("pattern: shapes do not fit");
  a.q = q.typed_data();
  a.stride = a.n_heads * a.d_head;
  pattern(a, positions.typed_data(), out->typed_data());
  return ffi::Error::Success();
}

// What a layer reads beside its stream and its cache, for `rows` tokens.
ffi::Error set_layer(Layer* l, int64_t rows, int64_t d_model, int64_t heads, int64_t kv, int64_t d_mlp, int64_t d_head,
                     const Floats& cos, const Floats& sin, const Floats& ln1, const Floats& ln2,
                     std::initializer_list<const Bytes*> packed, ffi::RemainingArgs biases, ffi::Span<const int64_t> starts,
                     ffi::Span<const int64_t> forms) {
  if (starts.size() != 7 || forms.size() != 7) return wrong("layer: shapes do not fit");
  l->rotary = rows ? (int64_t)cos.element_count() / rows : 0;
  if (2 * l->rotary > d_head || cos.element_count() != sin.element_count() ||
      (int64_t)cos.element_count() != rows * l->rotary || (int64_t)ln1.element_count() != d_model ||
      (int64_t)ln2.element_count() != d_model)
    return wrong("layer: the rotation or the norms have another size");
  const Bytes* const* from = packed.begin();
  const Packed matrices[] = {{&l->q, from[0], heads, d_model},    {&l->k, from[1], kv, d_model},
                             {&l->v, from[2], kv, d_model},       {&l->o, from[3], d_model, heads},
                             {&l->gate, from[4], d_mlp, d_model}, {&l->up, from[5], d_mlp, d_model},
                             {&l->down, from[6], d_model, d_mlp}};
  for (int i = 0; i < 7; ++i) {
    const ffi::Error error = set_matrix("layer", matrices[i], starts[i], forms[i], biases, i);
    if (error.failure()) return error;
  }
  l->cos = cos.typed_data();
  l->sin = sin.typed_data();
  l->ln1 = ln1.typed_data();
  l->ln2 = ln2.typed_data();
  return ffi::Error::Success();
}

ffi::Error block(Floats resid, Ints start, Ints count, Floats cos, Floats sin, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                 Floats ln1, Floats ln2, Bytes q, Bytes k, Bytes v, Bytes o, Bytes gate, Bytes up, Bytes down,
                 ffi::RemainingArgs biases, ffi::Span<const int64_t> starts, ffi::Span<const int64_t> forms,
                 ffi::Span<const int64_t> shown, int64_t n_heads, int64_t d_mlp, float eps, float scale,
                 ffi::ResultBuffer<ffi::F32> out, ffi::Result<ffi::AnyBuffer> new_keys,
                 ffi::Result<ffi::AnyBuffer> new_values, ffi::ResultBuffer<ffi::U8> scratch, ffi::RemainingRets asked) {
  const Dimensions shape = resid.dimensions(), cache = keys.dimensions();
  if (shape.size() != 3 || cache.size() != 4) return wrong("layer: shapes do not fit");
  if (keys.untyped_data() != new_keys->untyped_data() || values.untyped_data() != new_values->untyped_data())
    return wrong("layer: the cache must be written in place");
  Layer l = {};
  const int64_t dims[] = {shape[0], shape[1], n_heads, cache[3]};
  if (!shape_attention(&l.attention, Dimensions(dims, 4), keys, values, start, count, scale))
    return wrong("layer: shapes or positions do not fit");
  const Attention& a = l.attention;
  const int64_t d_model = shape[2], rows = a.batch * a.tokens;
  const ffi::Error error = set_layer(&l, rows, d_model, n_heads * a.d_head, a.n_kv_heads * a.d_head, d_mlp, a.d_head, cos,
                                     sin, ln1, ln2, {&q, &k, &v, &o, &gate, &up, &down}, biases, starts, forms);
  if (error.failure()) return error;
  if ((int64_t)scratch->element_count() <
      layer_scratch(a.batch, a.tokens, n_heads, a.n_kv_heads, a.d_head, a.capacity, d_model, d_mlp))
    return wrong("layer: too little scratch memory");
  if (asked.size() != shown.size()) return wrong("layer: not as many results as are asked for");
  for (size_t i = 0; i < shown.size(); ++i) {
    auto result = asked.get<Floats>(i);
    if (result.has_error()) return result.error();
    if (shown[i] < 0 || shown[i] >= kPoints ||
        (int64_t)(*result)->element_count() != rows * width(l, (Point)shown[i]))
      return wrong("layer: what is asked for has another size");
    l.shown[shown[i]] = (*result)->typed_data();
  }
  l.resid = resid.typed_data();
  l.out = out->typed_data();
  l.keys = new_keys->untyped_data();
  l.values = new_values->untyped_data();
  l.eps = eps;
  layer(l, scratch->typed_data());
  return ffi::Error::Success();
}

ffi::Error block_of_runs(Floats resid, Floats common_keys, Floats common_values, Floats table, Ints begins, Ints first,
                         Ints last, Ints position, Floats cos, Floats sin, Floats ln1, Floats ln2, Bytes q, Bytes k,
                         Bytes v, Bytes o, Bytes gate, Bytes up, Bytes down, ffi::RemainingArgs biases,
                         ffi::Span<const int64_t> starts, ffi::Span<const int64_t> forms, int64_t n_heads, int64_t d_mlp,
                         float eps, float scale, ffi::ResultBuffer<ffi::F32> out, ffi::ResultBuffer<ffi::U8> scratch) {
  const Dimensions shape = resid.dimensions(), common = common_keys.dimensions(), rows = table.dimensions();
  if (shape.size() != 3 || shape[0] != 1 || common.size() != 3 || rows.size() != 2) return wrong("runs: shapes do not fit");
  const int64_t tokens = shape[1], d_model = shape[2];
  Runs r = {};
  r.runs = (int64_t)first.element_count();
  r.length = common[0];
  r.n_heads = n_heads;
  r.n_kv_heads = common[1];
  r.d_head = common[2];
  r.scale = scale;
  if (r.d_head % 16 || r.n_kv_heads < 1 || n_heads % r.n_kv_heads || rows[1] != d_model ||
      common_values.element_count() != common_keys.element_count() || (int64_t)last.element_count() != r.runs ||
      (int64_t)position.element_count() != tokens || (int64_t)begins.element_count() != tokens ||
      out->element_count() != resid.element_count())
    return wrong("runs: shapes do not fit");
  Layer l = {};
  const ffi::Error error = set_layer(&l, tokens, d_model, n_heads * r.d_head, r.n_kv_heads * r.d_head, d_mlp, r.d_head, cos,
                                     sin, ln1, ln2, {&q, &k, &v, &o, &gate, &up, &down}, biases, starts, forms);
  if (error.failure()) return error;
  if ((int64_t)scratch->element_count() <
      layer_of_runs_scratch(r.runs, tokens, r.length, n_heads, r.n_kv_heads, r.d_head, d_model, d_mlp))
    return wrong("runs: too little scratch memory");
  r.first = first.typed_data();
  r.last = last.typed_data();
  r.position = position.typed_data();
  for (int64_t run = 0; run < r.runs; ++run) {
    const int64_t from = r.first[run], to = r.last[run];
    if (to < from) continue;
    if (from < 0 || to >= tokens || r.position[from] < 0 || r.position[from] + to - from >= r.length)
      return wrong("runs: tokens or positions do not fit");
  }
  for (int64_t token = 0; token < tokens; ++token)
    if (begins.typed_data()[token] >= rows[0]) return wrong("runs: a stream that is not in the table");
  r.common_keys = common_keys.typed_data();
  r.common_values = common_values.typed_data();
  l.resid = resid.typed_data();
  l.out = out->typed_data();
  l.eps = eps;
  layer_of_runs(l, r, tokens, table.typed_data(), begins.typed_data(), scratch->typed_data());
  return ffi::Error::Success();
}

ffi::Error feed_forward(Floats resid, Floats ln2, Bytes gate, Bytes up, Bytes down, ffi::RemainingArgs biases,
                        ffi::Span<const int64_t> starts, ffi::Span<const int64_t> forms, int64_t d_mlp, float eps,
                        ffi::ResultBuffer<ffi::F32> out, ffi::ResultBuffer<ffi::U8> scratch) {
  const int64_t d_model = resid.dimensions()[resid.dimensions().size() - 1], rows = product_but_last(resid.dimensions());
  Layer l = {};
  if (starts.size() != 3 || forms.size() != 3 || (int64_t)ln2.element_count() != d_model ||
      out->element_count() != resid.element_count())
    return wrong("mlp: shapes do not fit");
  const Packed matrices[] = {
      {&l.gate, &gate, d_mlp, d_model}, {&l.up, &up, d_mlp, d_model}, {&l.down, &down, d_model, d_mlp}};
  for (int i = 0; i < 3; ++i) {
    const ffi::Error error = set_matrix("mlp", matrices[i], starts[i], forms[i], biases, i);
    if (error.failure()) return error;
  }
  if ((int64_t)scratch->element_count() < mlp_scratch(rows, d_model, d_mlp)) return wrong("mlp: too little scratch memory");
  l.resid = resid.typed_data();
  l.out = out->typed_data();
  l.ln2 = ln2.typed_data();
  l.eps = eps;
  mlp(l, rows, scratch->typed_data());
  return ffi::Error::Success();
}

// The last axis of x, row by row.
ffi::Error largest(Floats x, ffi::ResultBuffer<ffi::F32> values, ffi::ResultBuffer<ffi::S32> places) {
  const int64_t count = x.dimensions()[x.dimensions().size() - 1];
  const int64_t k = values->dimensions()[values->dimensions().size() - 1];
  if (k > count || values->element_count() != places->element_count()) return wrong("top_k: shapes do not fit");
  for (int64_t row = 0; row < product_but_last(x.dimensions()); ++row)
    top_k(x.typed_data() + row * count, count, k, values->typed_data() + row * k, places->typed_data() + row * k);
  return ffi::Error::Success();
}

// Settings are those of irkit/transformer/sampling.py, in their order, a number for each row.
ffi::Error draw(Floats logits, Ints history, Ints length, ffi::Buffer<ffi::U32> allowed, ffi::RemainingArgs settings,
                ffi::ResultBuffer<ffi::S32> token, ffi::ResultBuffer<ffi::F32> logprob,
                ffi::ResultBuffer<ffi::F32> normalizer) {
  constexpr size_t kSettings = 14;
  const Dimensions shape = logits.dimensions(), past = history.dimensions();
  if (shape.size() != 2 || past.size() != 2 || settings.size() != kSettings) return wrong("sample: shapes do not fit");
  const int64_t rows = shape[0], count = shape[1], words = (count + 31) / 32;
  const void* data[kSettings];
  for (size_t i = 0; i < kSettings; ++i) {
    const auto setting = settings.get<ffi::AnyBuffer>(i);
    if (setting.has_error()) return setting.error();
    const int64_t each = i == 12 ? count : i == 13 ? 2 : 1;
    const ffi::DataType type = i == 0 || i == 5 ? ffi::S32 : i == 13 ? ffi::U32 : ffi::F32;
    if (setting->element_type() != type || (int64_t)setting->element_count() != rows * each)
      return wrong("sample: a setting has another shape or type");
    data[i] = setting->untyped_data();
  }
  if (count < 1 || past[0] != rows || (int64_t)length.element_count() != rows ||
      (int64_t)allowed.element_count() != rows * words)
    return wrong("sample: shapes do not fit");
  for (int64_t row = 0; row < rows; ++row) {
    const auto whole = [&](size_t i) { return static_cast<const int32_t*>(data[i])[row]; };
    const auto number = [&](size_t i) { return static_cast<const float*>(data[i])[row]; };
    const uint32_t* key = static_cast<const uint32_t*>(data[13]) + 2 * row;
    const int64_t counted = length.typed_data()[row];
    if (counted < 0 || counted > past[1]) return wrong("sample: more tokens than there is history");
    const float* of_row = logits.typed_data() + row * count;
    const int32_t drawn = sample({of_row, static_cast<const float*>(data[12]) + row * count,
                                  allowed.typed_data() + row * words, count,
                                  history.typed_data() + row * past[1], counted, whole(0), number(1), number(2),
                                  number(3), number(4), whole(5), number(6), number(7), number(8), number(9),
                                  number(10), number(11), {key[0], key[1]}});
    token->typed_data()[row] = drawn;
    normalizer->typed_data()[row] = log_sum_exp(of_row, count);
    logprob->typed_data()[row] = of_row[drawn] - normalizer->typed_data()[row];
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace irkit

extern "C" {

// XLA finds the handlers by these symbols.
IRKIT_API XLA_FFI_Error* irkit_take(XLA_FFI_CallFrame*);
IRKIT_API XLA_FFI_Error* irkit_linear(XLA_FFI_CallFrame*);
IRKIT_API XLA_FFI_Error* irkit_attention(XLA_FFI_CallFrame*);
IRKIT_API XLA_FFI_Error* irkit_pattern(XLA_FFI_CallFrame*);
IRKIT_API XLA_FFI_Error* irkit_layer(XLA_FFI_CallFrame*);
IRKIT_API XLA_FFI_Error* irkit_layer_of_runs(XLA_FFI_CallFrame*);
IRKIT_API XLA_FFI_Error* irkit_mlp(XLA_FFI_CallFrame*);
IRKIT_API XLA_FFI_Error* irkit_top_k(XLA_FFI_CallFrame*);
IRKIT_API XLA_FFI_Error* irkit_sample(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(irkit_take, irkit::take_rows,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("start")
                                  .Attr<int64_t>("form")
                                  .Attr<int64_t>("rows")
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(irkit_linear, irkit::multiply,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Attr<int64_t>("start")
                                  .Attr<int64_t>("form")
                                  .Attr<int64_t>("rows")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::U8>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(irkit_attention, irkit::attention,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<float>("scale")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::U8>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(irkit_pattern, irkit::look,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<float>("scale")
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(irkit_layer, irkit::block,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .RemainingArgs()
                                  .Attr<ffi::Span<const int64_t>>("starts")
                                  .Attr<ffi::Span<const int64_t>>("forms")
                                  .Attr<ffi::Span<const int64_t>>("shown")
                                  .Attr<int64_t>("n_heads")
                                  .Attr<int64_t>("d_mlp")
                                  .Attr<float>("eps")
                                  .Attr<float>("scale")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(irkit_layer_of_runs, irkit::block_of_runs,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .RemainingArgs()
                                  .Attr<ffi::Span<const int64_t>>("starts")
                                  .Attr<ffi::Span<const int64_t>>("forms")
                                  .Attr<int64_t>("n_heads")
                                  .Attr<int64_t>("d_mlp")
                                  .Attr<float>("eps")
                                  .Attr<float>("scale")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::U8>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(irkit_mlp, irkit::feed_forward,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .RemainingArgs()
                                  .Attr<ffi::Span<const int64_t>>("starts")
                                  .Attr<ffi::Span<const int64_t>>("forms")
                                  .Attr<int64_t>("d_mlp")
                                  .Attr<float>("eps")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::U8>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    irkit_top_k, irkit::largest,
    ffi::Ffi::Bind().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(irkit_sample, irkit::draw,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

IRKIT_API const char* irkit_handlers() {
  return "irkit_take,irkit_linear,irkit_attention,irkit_pattern,irkit_layer,irkit_layer_of_runs,irkit_mlp,irkit_top_k,irkit_sample";
}

IRKIT_API void irkit_set_threads(int32_t threads) { irkit::set_threads(threads); }

IRKIT_API int64_t irkit_linear_scratch(int64_t rows, int64_t cols) { return irkit::linear_scratch(rows, cols); }

IRKIT_API int64_t irkit_attention_scratch(int64_t batch, int64_t tokens, int64_t n_heads, int64_t n_kv_heads,
                                          int64_t d_head, int64_t capacity) {
  return irkit::attention_scratch(batch, tokens, n_heads, n_kv_heads, d_head, capacity);
}

IRKIT_API int64_t irkit_mlp_scratch(int64_t rows, int64_t d_model, int64_t d_mlp) {
  return irkit::mlp_scratch(rows, d_model, d_mlp);
}

IRKIT_API int64_t irkit_layer_scratch(int64_t batch, int64_t tokens, int64_t n_heads, int64_t n_kv_heads,
                                      int64_t d_head, int64_t capacity, int64_t d_model, int64_t d_mlp) {
  return irkit::layer_scratch(batch, tokens, n_heads, n_kv_heads, d_head, capacity, d_model, d_mlp);
}

IRKIT_API int64_t irkit_layer_of_runs_scratch(int64_t runs, int64_t tokens, int64_t length, int64_t n_heads,
                                              int64_t n_kv_heads, int64_t d_head, int64_t d_model, int64_t d_mlp) {
  return irkit::layer_of_runs_scratch(runs, tokens, length, n_heads, n_kv_heads, d_head, d_model, d_mlp);
}

}  // extern "C"
