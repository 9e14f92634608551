// From GGUF's blocks to the packed forms, and back to numbers.
//
// Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, F16, BF16 and F32 keep every weight as it is. Q4_K, Q5_K and Q6_K hold their scales
// and minima as products of a float16 and a small integer; the packed forms hold these rounded to float16 once, so
// that each is off by at most 2^-11 of itself (below 2^-14, where float16 is subnormal, by at most 2^-25).
#pragma once

#include <cstdint>

extern "C" {

// The form that tensors of a format take, -1 if there is none.
int32_t irkit_form(int32_t ggml_type);

// Null if there is no such form.
const char* irkit_form_name(int32_t form);

// The size of a matrix, -1 if there is no such form.
int64_t irkit_packed_bytes(int32_t form, int64_t rows, int64_t cols);

// Packs panels [first_panel, last_panel) of the tensor `raw` [rows, cols]; packed row i is its row order[i], or i if
// `order` is null. `packed` is where panel 0 goes. Rows past the last are filled with zero bytes.
//
// Returns 0; 1 if a finite scale or minimum is too large for float16, which makes it infinite: then the form does not
// hold this tensor; -1 if there is no form for the format and `cols`, or if a panel or row does not exist.
int32_t irkit_pack(int32_t ggml_type, const uint8_t* raw, int64_t rows, int64_t cols, const int32_t* order,
                   int64_t first_panel, int64_t last_panel, uint8_t* packed);

// The arguments of one call of irkit_pack, and what it returned.
struct irkit_pack_task {
  const uint8_t* raw;
  const int32_t* order;
  uint8_t* packed;
  int64_t rows, cols, first_panel, last_panel;
  int32_t ggml_type, result;
};

// One call for many: a caller in Python has to wait for its interpreter after each.
void irkit_pack_all(irkit_pack_task* tasks, int64_t count);

// Rows `ids` as float32 [count, cols], the ids clipped to the rows there are. Products and sums are rounded one after
// the other, as in GGUF's own formulas.
void irkit_unpack_rows(int32_t form, const uint8_t* packed, int64_t rows, int64_t cols, const int32_t* ids,
                       int64_t count, float* out);

}  // extern "C"
