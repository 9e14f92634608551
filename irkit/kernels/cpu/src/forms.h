// How a matrix lies in memory for the kernels: the packed forms.
//
// A packed matrix [rows, cols] is a sequence of panels of 16 rows, the last filled up with zeros. A panel of a
// quantized form holds, for nb = cols / 32 blocks, one array after the other:
//
//   codes   nb x 256 bytes (bits 4, 5, 6) or nb x 512 (bits 8)
//   high    nb x 64 bytes (bits 5) or nb x 128 (bits 6)
//   scales  nb x groups x 16 float16
//   minima  nb x 16 float16, in the forms that have them
//
// filled up to a multiple of 64 bytes. A code is an unsigned number; the 32 columns of a block are 8 quads of 4.
// In 8 bits, quad j of a block is 64 bytes at 64 * j: 4 columns of row 0, 4 of row 1, ... In fewer bits, byte i of the
// 64 at 64 * j (j < 4) holds the lowest four bits of byte i of quad j in its lower nibble and of quad j + 4 in its
// upper nibble. The fifth bit of byte i of quad j is bit j of byte i of `high`; bits five and six are bits
// 2 * (j % 4) and the one above it of byte i of the 64 at 64 * (j / 4).
//
// weight = scale * (code - zero), or scale * code + minimum. With two groups, the first 16 columns of a block take
// the first 16 scales.
//
// A panel of a form without codes holds its numbers column by column: cols x 16, rows side by side.
#pragma once

#include <cstddef>
#include <cstdint>

namespace irkit {

constexpr int64_t kRows = 16;   // of a panel
constexpr int64_t kBlock = 32;  // columns that share a scale

enum Form : int32_t { kQ4 = 0, kQ4M, kQ5, kQ5M, kQ6, kQ8, kF16, kBF16, kF32, kForms };

struct FormInfo {
  const char* name;
  int bits;    // of a code, or of a number where there are none
  int zero;    // the code that means zero; unused where there are minima
  int groups;  // scales of a row in a block; 0 where there are no codes
  bool minima;
};

constexpr FormInfo kFormInfo[kForms] = {
    {"q4", 4, 8, 1, false},  {"q4m", 4, 0, 1, true},   {"q5", 5, 16, 1, false},
    {"q5m", 5, 0, 1, true},  {"q6", 6, 32, 2, false},  {"q8", 8, 128, 1, false},
    {"f16", 16, 0, 0, false}, {"bf16", 16, 0, 0, false}, {"f32", 32, 0, 0, false},
};

// Functions here are static: of an inline one the linker would keep a single copy, which may be the one that was
// compiled for instructions this machine lacks.

// Where the parts of a panel begin, and its size, in bytes.
struct PanelLayout {
  int64_t high, scales, minima, bytes;
};

static constexpr PanelLayout panel_layout(Form form, int64_t cols) {
  const FormInfo& f = kFormInfo[form];
  if (f.groups == 0) return {0, 0, 0, (cols * kRows * f.bits / 8 + 63) / 64 * 64};
  const int64_t nb = cols / kBlock;
  const int64_t high = nb * (f.bits == 8 ? 512 : 256);
  const int64_t scales = high + nb * (f.bits == 5 ? 64 : f.bits == 6 ? 128 : 0);
  const int64_t minima = scales + nb * f.groups * kRows * 2;
  const int64_t end = minima + (f.minima ? nb * kRows * 2 : 0);
  return {high, scales, minima, (end + 63) / 64 * 64};
}

static constexpr int64_t panels(int64_t rows) { return (rows + kRows - 1) / kRows; }

}  // namespace irkit
