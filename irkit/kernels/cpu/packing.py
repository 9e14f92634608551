"""Tensors of a GGUF file in the layouts that the CPU kernels read, the packed forms (src/forms.h).

Packing keeps every weight of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, F16, BF16 and F32 as it is. Q4_K, Q5_K and Q6_K compose
their scales and minima of a float16 and a small integer; these are rounded to float16 once, by at most 2^-11 of
themselves (2^-25 where float16 is subnormal, below 2^-14).

The functions let other threads run while they work: a large tensor may be packed by several, a range of panels each;
`pack_all` packs several tensors without asking for Python's lock in between.
"""

import ctypes
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from irkit.errors import OptionError
from irkit.gguf.formats import BY_NAME

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Shape = tuple[int, int]

PANEL_ROWS = 16

_BLOCK_BYTES = {"q4": 18, "q4m": 20, "q5": 22, "q5m": 24, "q6": 28, "q8": 34, "f16": 64, "bf16": 64, "f32": 128}
"""Of 32 columns of a row, scales and minima included."""

FORMS = tuple(_BLOCK_BYTES)
"""The names of the packed forms, in the order of their numbers."""


def form_of(lib: ctypes.CDLL, format_name: str, shape: Shape) -> str | None:
    """The form for a tensor of a GGUF format; None if there is none, or `shape` does not divide into its blocks."""
    known = BY_NAME.get(format_name)
    if known is None or min(shape) < 1 or shape[1] % known.block_size:
        return None
    number = _typed(lib).irkit_form(known.number)
    return FORMS[number] if number >= 0 else None


def packed_bytes(form: str, shape: Shape) -> int:
    """The size of a packed matrix: panels of 16 rows, each filled up to a multiple of 64 bytes.

    Raises:
        OptionError: If there is no such form, or `shape` does not divide into its blocks.
    """
    return -(-shape[0] // PANEL_ROWS) * _panel_bytes(form, shape)


class Task(ctypes.Structure):
    """What `pack_all` is to pack: made by `task`, as src/pack.h has it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("raw", "order", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "first_panel", "last_panel")),
        *((name, ctypes.c_int32) for name in ("ggml_type", "result")),
    )
    arrays: tuple[np.ndarray | None, ...]
    """What the addresses belong to."""


def task(
    lib: ctypes.CDLL,
    raw: Bytes,
    format_name: str,
    shape: Shape,
    out: Bytes,
    order: Ints | None = None,
    panels: range | None = None,
) -> Task:
    """The packing of a tensor, or of a part of it, into its form.

    Args:
        lib: The library of CPU kernels.
        raw: The tensor's bytes, as they lie in the file.
        format_name: The GGUF name of the format, such as "Q4_K".
        shape: Its rows and columns; blocks run along the columns.
        out: Where the whole packed matrix goes: contiguous bytes, as many as `packed_bytes` says.
        order: Which row of the tensor each packed row is [rows]; if not given, they keep their places.
        panels: Which panels of 16 packed rows to write; if not given, all.

    Raises:
        OptionError: If the format has no form, or an argument does not fit it and the shape.
    """
    rows, cols = shape
    form = form_of(lib, format_name, shape)
    if form is None:
        raise OptionError(f"format_name: there is no packed form for {format_name} and shape {shape}")
    known = BY_NAME[format_name]
    _check("raw", raw, np.uint8, (rows * (cols // known.block_size) * known.block_bytes,))
    _check("out", out, np.uint8, (packed_bytes(form, shape),))
    if not out.flags.writeable:
        raise OptionError("out: must be writeable")
    if order is not None:
        _check("order", order, np.int32, (rows,))
        if order.min() < 0 or order.max() >= rows:
            raise OptionError(f"order: must name rows from 0 to {rows - 1}")
    count = -(-rows // PANEL_ROWS)
    chosen = range(count) if panels is None else panels
    if chosen.step != 1 or not 0 <= chosen.start <= chosen.stop <= count:
        raise OptionError(f"panels: must be a range within {range(count)}, got {panels}")
    order_address = None if order is None else order.ctypes.data
    where = raw.ctypes.data, order_address, out.ctypes.data
    made = Task(*where, rows, cols, chosen.start, chosen.stop, known.number, 0)
    made.arrays = raw, order, out
    return made


def pack_all(lib: ctypes.CDLL, tasks: Sequence[Task]) -> list[bool]:
    """Pack several tensors, or parts of them, one after the other.

    Returns:
        For each task False if a finite scale or minimum is too large for float16: then its `out` does not hold the
        tensor's values.
    """
    together = (Task * len(tasks))(*tasks)
    _typed(lib).irkit_pack_all(together, len(tasks))
    return [done.result == 0 for done in together]


def unpack(lib: ctypes.CDLL, packed: Bytes, form: str, shape: Shape, ids: Ints | None = None) -> Floats:
    """Rows `ids` [n] of a packed matrix, or all of them: float32 [n, cols].

    An id that is too small or too large means the first or the last row.

    Raises:
        OptionError: If there is no such form, or an argument does not fit it and the shape.
    """
    rows, cols = shape
    _check("packed", packed, np.uint8, (packed_bytes(form, shape),))
    chosen = np.arange(rows, dtype=np.int32) if ids is None else ids
    _check("ids", chosen, np.int32, (chosen.size,))
    out = np.empty((chosen.size, cols), np.float32)
    addresses = packed.ctypes.data, rows, cols, chosen.ctypes.data, chosen.size, out.ctypes.data
    _typed(lib).irkit_unpack_rows(FORMS.index(form), *addresses)
    return out


def _panel_bytes(form: str, shape: Shape) -> int:
    if form not in FORMS:
        raise OptionError(f"form: {form!r} is none of {', '.join(FORMS)}")
    blocks = form[0] == "q"
    if min(shape) < 1 or (blocks and shape[1] % 32):
        raise OptionError(f"shape: {shape} does not divide into blocks of {32 if blocks else 1} for {form}")
    return -(-PANEL_ROWS * shape[1] * _BLOCK_BYTES[form] // 32 // 64) * 64


def _check(name: str, array: np.ndarray, dtype: type, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        wanted = f"a contiguous {np.dtype(dtype)} array of shape {shape}"
        raise OptionError(f"{name}: must be {wanted}, got {array.dtype} of shape {array.shape}")


@cache
def _typed(lib: ctypes.CDLL) -> ctypes.CDLL:
    """`lib` with the types of its arguments declared, as in src/pack.h."""
    i32, i64, address = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
    lib.irkit_form.argtypes = [i32]
    lib.irkit_pack_all.argtypes = [ctypes.POINTER(Task), i64]
    lib.irkit_pack_all.restype = None
    lib.irkit_unpack_rows.argtypes = [i32, address, i64, i64, address, i64, address]
    lib.irkit_unpack_rows.restype = None
    return lib
