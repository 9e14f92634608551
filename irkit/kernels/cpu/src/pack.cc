// The layouts of the blocks that are read here are ggml's (ggml-common.h), as written down in irkit/gguf/quants.py.
#include "pack.h"

#include <algorithm>
#include <cstring>

#include "api.h"
#include "forms.h"
#include "half.h"

namespace irkit {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bytes are moved as words");

template <class T>
T load(const uint8_t* p) {
  T x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

template <class T>
void store(uint8_t* p, T x) {
  std::memcpy(p, &x, sizeof x);
}

// A block of 32 columns of one row, as its form holds it.
struct Piece {
  uint32_t quads[8];  // 4 where two codes share a byte
  uint32_t high[2];
  uint16_t scales[2];
  uint16_t minimum;
};

// Each format below: `read` makes the pieces of a block; false if a finite scale or minimum does not fit float16.

// The lower nibbles hold columns 0-15 and the upper ones 16-31, which is how a form holds them.
void read_nibbles(const uint8_t* nibbles, Piece* piece) { std::memcpy(piece->quads, nibbles, 16); }

// Column 4j + k is bit 4j + k, and is to be bit j of byte k.
uint32_t fifth_bits(uint32_t bits) {
  uint32_t high = 0;
  for (int k = 0; k < 4; ++k) {
    uint32_t x = bits >> k & 0x11111111;
    x = (x | x >> 3) & 0x03030303;
    x = (x | x >> 6) & 0x000F000F;
    high |= ((x | x >> 12) & 0xFF) << 8 * k;
  }
  return high;
}

template <Form form_>
struct Blocks {
  static constexpr Form form = form_;
  static constexpr int64_t columns = 32;
  static constexpr int64_t head = kFormInfo[form].minima ? 4 : 2;
  static constexpr int64_t bytes = head + kFormInfo[form].bits * 4;

  static bool read(const uint8_t* block, Piece* piece) {
    piece->scales[0] = load<uint16_t>(block);
    if (head == 4) piece->minimum = load<uint16_t>(block + 2);
    const uint8_t* codes = block + head;
    if (form == kQ8) {
      for (int j = 0; j < 8; ++j) piece->quads[j] = load<uint32_t>(codes + 4 * j) ^ 0x80808080;  // adds 128
    } else if (form == kQ5 || form == kQ5M) {
      piece->high[0] = fifth_bits(load<uint32_t>(codes));
      read_nibbles(codes + 4, piece);
    } else {
      read_nibbles(codes, piece);
    }
    return true;
  }
};

bool round_to_half(float x, uint16_t* half) {
  *half = float_to_half(x);
  return (*half & 0x7FFF) != 0x7C00 || (float_bits(x) & 0x7F800000) == 0x7F800000;
}

// The head of Q4_K and Q5_K: the scales and minima of 8 pieces.
bool read_scales_and_minima(const uint8_t* block, Piece* pieces) {
  const uint32_t low_scales = load<uint32_t>(block + 4), low_minima = load<uint32_t>(block + 8);
  const uint32_t last = load<uint32_t>(block + 12);
  const uint32_t words[4] = {
      low_scales & 0x3F3F3F3F, (last & 0x0F0F0F0F) | (low_scales >> 2 & 0x30303030),
      low_minima & 0x3F3F3F3F, (last >> 4 & 0x0F0F0F0F) | (low_minima >> 2 & 0x30303030)};
  uint8_t numbers[16];
  std::memcpy(numbers, words, 16);
  const float scale = half_to_float(load<uint16_t>(block)), minimum = -half_to_float(load<uint16_t>(block + 2));
  bool fits = true;
  for (int s = 0; s < 8; ++s) {
    fits &= round_to_half(scale * numbers[s], &pieces[s].scales[0]);
    fits &= round_to_half(minimum * numbers[8 + s], &pieces[s].minimum);
  }
  return fits;
}

// Two pieces lie in the lower and the upper nibbles of 32 bytes; in a form each has 16 bytes of its own.
void read_nibbles_of_two(const uint8_t* nibbles, Piece* low, Piece* high) {
  for (int j = 0; j < 4; ++j) {
    const uint32_t left = load<uint32_t>(nibbles + 4 * j), right = load<uint32_t>(nibbles + 16 + 4 * j);
    low->quads[j] = (left & 0x0F0F0F0F) | (right & 0x0F0F0F0F) << 4;
    high->quads[j] = (left >> 4 & 0x0F0F0F0F) | (right & 0xF0F0F0F0);
  }
}

struct Q4K {
  static constexpr Form form = kQ4M;
  static constexpr int64_t columns = 256, bytes = 144;

  static bool read(const uint8_t* block, Piece* pieces) {
    for (int s = 0; s < 8; s += 2) read_nibbles_of_two(block + 16 + 16 * s, &pieces[s], &pieces[s + 1]);
    return read_scales_and_minima(block, pieces);
  }
};

struct Q5K {
  static constexpr Form form = kQ5M;
  static constexpr int64_t columns = 256, bytes = 176;

  static bool read(const uint8_t* block, Piece* pieces) {
    for (int s = 0; s < 8; ++s) {
      if (s % 2 == 0) read_nibbles_of_two(block + 48 + 16 * s, &pieces[s], &pieces[s + 1]);
      uint32_t high = 0;
      for (int j = 0; j < 8; ++j) high |= (load<uint32_t>(block + 16 + 4 * j) >> s & 0x01010101) << j;
      pieces[s].high[0] = high;
    }
    return read_scales_and_minima(block, pieces);
  }
};

struct Q6K {
  static constexpr Form form = kQ6;
  static constexpr int64_t columns = 256, bytes = 210;

  static bool read(const uint8_t* block, Piece* pieces) {
    const float scale = half_to_float(load<uint16_t>(block + 208));
    bool fits = true;
    for (int s = 0; s < 8; ++s) {
      const int half = s / 4, part = s % 4;  // of the 256 columns, and of its 128
      if (part < 2) read_nibbles_of_two(block + 64 * half + 32 * part, &pieces[s], &pieces[s + 2]);
      for (int h = 0; h < 2; ++h) {
        uint32_t high = 0;
        for (int j = 0; j < 4; ++j) {
          const uint32_t pairs = load<uint32_t>(block + 128 + 32 * half + 16 * h + 4 * j);
          high |= (pairs >> 2 * part & 0x03030303) << 2 * j;
        }
        pieces[s].high[h] = high;
        fits &= round_to_half(scale * (int8_t)block[192 + 2 * s + h], &pieces[s].scales[h]);
      }
    }
    return fits;
  }
};

// The rows that a panel is made of.
struct Rows {
  const uint8_t* at[kRows];
  int64_t count;
};

template <class Format>
bool pack_blocks(const Rows& rows, int64_t cols, uint8_t* panel) {
  constexpr FormInfo info = kFormInfo[Format::form];
  constexpr int64_t quads = info.bits == 8 ? 8 : 4, high = info.bits == 5 ? 1 : info.bits == 6 ? 2 : 0;
  constexpr int64_t pieces = Format::columns / kBlock;
  const PanelLayout layout = panel_layout(Format::form, cols);
  bool fits = true;
  for (int64_t b = 0; b < cols / Format::columns; ++b) {
    for (int64_t r = 0; r < rows.count; ++r) {
      Piece read[pieces];
      fits &= Format::read(rows.at[r] + b * Format::bytes, read);
      for (int64_t i = 0; i < pieces; ++i) {
        const Piece& piece = read[i];
        const int64_t at = b * pieces + i;
        for (int64_t j = 0; j < quads; ++j) store(panel + 64 * (quads * at + j) + 4 * r, piece.quads[j]);
        for (int64_t j = 0; j < high; ++j) store(panel + layout.high + 64 * (high * at + j) + 4 * r, piece.high[j]);
        for (int64_t j = 0; j < info.groups; ++j)
          store(panel + layout.scales + 2 * (kRows * (info.groups * at + j) + r), piece.scales[j]);
        if (info.minima) store(panel + layout.minima + 2 * (kRows * at + r), piece.minimum);
      }
    }
  }
  return fits;
}

template <class Number>
bool pack_numbers(const Rows& rows, int64_t cols, uint8_t* panel) {
  constexpr int64_t size = sizeof(Number);
  for (int64_t c = 0; c < cols; ++c) {
    for (int64_t r = 0; r < rows.count; ++r)
      store(panel + size * (kRows * c + r), load<Number>(rows.at[r] + size * c));
  }
  return true;
}

struct Format {
  int32_t ggml_type;
  Form form;
  int64_t columns, bytes;  // of a block
  bool (*pack_panel)(const Rows&, int64_t cols, uint8_t* panel);
};

template <class T>
constexpr Format blocks(int32_t ggml_type) {
  return {ggml_type, T::form, T::columns, T::bytes, pack_blocks<T>};
}

constexpr Format kFormats[] = {
    {0, kF32, 1, 4, pack_numbers<uint32_t>},  // F32
    {1, kF16, 1, 2, pack_numbers<uint16_t>},  // F16
    blocks<Blocks<kQ4>>(2),                   // Q4_0
    blocks<Blocks<kQ4M>>(3),                  // Q4_1
    blocks<Blocks<kQ5>>(6),                   // Q5_0
    blocks<Blocks<kQ5M>>(7),                  // Q5_1
    blocks<Blocks<kQ8>>(8),                   // Q8_0
    blocks<Q4K>(12),
    blocks<Q5K>(13),
    blocks<Q6K>(14),
    {30, kBF16, 1, 2, pack_numbers<uint16_t>},  // BF16
};

const Format* find_format(int32_t ggml_type) {
  for (const Format& format : kFormats) {
    if (format.ggml_type == ggml_type) return &format;
  }
  return nullptr;
}

template <Form form>
void unpack_blocks(const uint8_t* panel, int64_t row, int64_t cols, float* out) {
  constexpr FormInfo info = kFormInfo[form];
  const PanelLayout layout = panel_layout(form, cols);
  for (int64_t b = 0; b < cols / kBlock; ++b) {
    float scales[info.groups], minimum = 0;
    for (int64_t g = 0; g < info.groups; ++g)
      scales[g] = half_to_float(load<uint16_t>(panel + layout.scales + 2 * (kRows * (info.groups * b + g) + row)));
    if (info.minima) minimum = half_to_float(load<uint16_t>(panel + layout.minima + 2 * (kRows * b + row)));
    for (int64_t j = 0; j < 8; ++j) {
      uint32_t codes;
      if (info.bits == 8) {
        codes = load<uint32_t>(panel + 64 * (8 * b + j) + 4 * row);
      } else {
        codes = load<uint32_t>(panel + 64 * (4 * b + j % 4) + 4 * row) >> 4 * (j / 4) & 0x0F0F0F0F;
      }
      if (info.bits == 5)
        codes |= (load<uint32_t>(panel + layout.high + 64 * b + 4 * row) >> j & 0x01010101) << 4;
      if (info.bits == 6) {
        const uint32_t pairs = load<uint32_t>(panel + layout.high + 64 * (2 * b + j / 4) + 4 * row);
        codes |= (pairs >> 2 * (j % 4) & 0x03030303) << 4;
      }
      const float scale = scales[info.groups == 2 ? j / 4 : 0];
      for (int64_t k = 0; k < 4; ++k) {
        const float weight = scale * (float)((int32_t)(codes >> 8 * k & 0xFF) - info.zero);
        out[kBlock * b + 4 * j + k] = info.minima ? weight + minimum : weight;
      }
    }
  }
}

template <class Number, class ToFloat>
void unpack_numbers(const uint8_t* panel, int64_t row, int64_t cols, float* out, ToFloat to_float) {
  for (int64_t c = 0; c < cols; ++c) out[c] = to_float(load<Number>(panel + sizeof(Number) * (kRows * c + row)));
}

void unpack_row(Form form, const uint8_t* panel, int64_t row, int64_t cols, float* out) {
  switch (form) {
    case kQ4:
      return unpack_blocks<kQ4>(panel, row, cols, out);
    case kQ4M:
      return unpack_blocks<kQ4M>(panel, row, cols, out);
    case kQ5:
      return unpack_blocks<kQ5>(panel, row, cols, out);
    case kQ5M:
      return unpack_blocks<kQ5M>(panel, row, cols, out);
    case kQ6:
      return unpack_blocks<kQ6>(panel, row, cols, out);
    case kQ8:
      return unpack_blocks<kQ8>(panel, row, cols, out);
    case kF16:
      return unpack_numbers<uint16_t>(panel, row, cols, out, half_to_float);
    case kBF16:
      return unpack_numbers<uint16_t>(panel, row, cols, out, bfloat16_to_float);
    case kF32:
      return unpack_numbers<uint32_t>(panel, row, cols, out, bits_float);
    case kForms:
      break;
  }
}

bool is_form(int32_t form) { return form >= 0 && form < kForms; }

}  // namespace
}  // namespace irkit

using namespace irkit;

IRKIT_API int32_t irkit_form(int32_t ggml_type) {
  const Format* format = find_format(ggml_type);
  return format ? format->form : -1;
}

IRKIT_API const char* irkit_form_name(int32_t form) { return is_form(form) ? kFormInfo[form].name : nullptr; }

IRKIT_API int64_t irkit_packed_bytes(int32_t form, int64_t rows, int64_t cols) {
  return is_form(form) ? panels(rows) * panel_layout((Form)form, cols).bytes : -1;
}

IRKIT_API int32_t irkit_pack(int32_t ggml_type, const uint8_t* raw, int64_t rows, int64_t cols, const int32_t* order,
                             int64_t first_panel, int64_t last_panel, uint8_t* packed) {
  const Format* format = find_format(ggml_type);
  if (!format || cols % format->columns || first_panel < 0 || last_panel > panels(rows)) return -1;
  const int64_t row_bytes = cols / format->columns * format->bytes;
  const int64_t panel_bytes = panel_layout(format->form, cols).bytes;
  bool fits = true;
  for (int64_t p = first_panel; p < last_panel; ++p) {
    Rows sources;
    sources.count = std::min(kRows, rows - kRows * p);
    for (int64_t r = 0; r < sources.count; ++r) {
      const int64_t row = order ? order[kRows * p + r] : kRows * p + r;
      if (row < 0 || row >= rows) return -1;
      sources.at[r] = raw + row * row_bytes;
    }
    uint8_t* panel = packed + p * panel_bytes;
    // What lies behind the last part is less than 64 bytes.
    const int64_t cleared = sources.count < kRows ? panel_bytes : std::min<int64_t>(panel_bytes, 64);
    std::memset(panel + panel_bytes - cleared, 0, (size_t)cleared);
    fits &= format->pack_panel(sources, cols, panel);
  }
  return fits ? 0 : 1;
}

IRKIT_API void irkit_pack_all(irkit_pack_task* tasks, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    irkit_pack_task& t = tasks[i];
    t.result = irkit_pack(t.ggml_type, t.raw, t.rows, t.cols, t.order, t.first_panel, t.last_panel, t.packed);
  }
}

IRKIT_API void irkit_unpack_rows(int32_t form, const uint8_t* packed, int64_t rows, int64_t cols, const int32_t* ids,
                                 int64_t count, float* out) {
  if (!is_form(form) || rows < 1) return;
  const int64_t panel_bytes = panel_layout((Form)form, cols).bytes;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = std::min(std::max<int64_t>(ids[i], 0), rows - 1);
    unpack_row((Form)form, packed + row / kRows * panel_bytes, row % kRows, cols, out + i * cols);
  }
}
