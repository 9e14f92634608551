"""The packed forms, held to dequantizing the tensors they are made of."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import irkit.gguf
from irkit.errors import OptionError
from irkit.gguf.formats import BY_NAME
from irkit.kernels.cpu import library, packing

Shape = tuple[int, int]

FORM_OF = {
    "F32": "f32", "F16": "f16", "BF16": "bf16",
    "Q4_0": "q4", "Q4_1": "q4m", "Q5_0": "q5", "Q5_1": "q5m", "Q8_0": "q8",
    "Q4_K": "q4m", "Q5_K": "q5m", "Q6_K": "q6",
}  # fmt: skip
ROUNDED = ["Q4_K", "Q5_K", "Q6_K"]
EXACT = [name for name in FORM_OF if name not in ROUNDED]
HALVES = {  # where the float16 numbers of a block lie
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip
ONE = [0x00, 0x3C]  # as a float16

# Rows, blocks of a row, a seed for random bytes, and the bound of a block's float16 numbers.
matrices = given(
    st.integers(1, 40),
    st.integers(1, 3),
    st.integers(0, 2**32),
    st.sampled_from([1e-6, 1e-4, 0.1, 2000, 60000, np.inf]),
)


@pytest.fixture(scope="module")
def lib() -> ctypes.CDLL:
    loaded = library.load()
    if loaded is None:
        pytest.skip("the library of CPU kernels is not installed, or IRKIT_KERNELS does without it")
    return loaded


def random_raw(name: str, shape: Shape, seed: int = 0, bound: float = 0.1) -> np.ndarray:
    """Random bytes; the float16 numbers among them are within `bound`, or anything if it is infinite."""
    known, rng = BY_NAME[name], np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // known.block_size, known.block_bytes), np.uint8)
    for at in HALVES.get(name, []) if np.isfinite(bound) else []:
        blocks[:, at : at + 2] = rng.uniform(-bound, bound, len(blocks)).astype("<f2").view(np.uint8).reshape(-1, 2)
    return blocks.ravel()


def shape_of(name: str, rows: int, blocks: int) -> Shape:
    return rows, blocks * max(BY_NAME[name].block_size, 32)


def packs(lib: ctypes.CDLL, *arguments, **more) -> bool:
    return packing.pack_all(lib, [packing.task(lib, *arguments, **more)])[0]


def pack(lib: ctypes.CDLL, raw: np.ndarray, name: str, shape: Shape, **how) -> np.ndarray:
    out = np.full(packing.packed_bytes(FORM_OF[name], shape), 0xAA, np.uint8)
    assert packs(lib, raw, name, shape, out, **how)
    return out


def same_bits(left: np.ndarray, right: np.ndarray) -> None:
    # Which of two NaNs an operation returns is the processor's choice.
    assert np.array_equal(np.isnan(left), np.isnan(right))
    numbers = ~np.isnan(left)
    assert np.array_equal(left.view(np.uint32)[numbers], right.view(np.uint32)[numbers])


@pytest.mark.parametrize("name", EXACT)
@matrices
def test_exact_formats(lib: ctypes.CDLL, name: str, rows: int, blocks: int, seed: int, bound: float) -> None:
    shape = shape_of(name, rows, blocks)
    raw = random_raw(name, shape, seed, bound)
    same_bits(
        packing.unpack(lib, pack(lib, raw, name, shape), FORM_OF[name], shape),
        irkit.gguf.dequantize(raw, name, shape),
    )


@pytest.mark.parametrize("name", EXACT)
def test_every_float16_as_a_scale(lib: ctypes.CDLL, name: str) -> None:
    shape = shape_of(name, 2048, 32)
    blocks = random_raw(name, shape).reshape(1 << 16, -1)
    for at in HALVES.get(name, []):
        blocks[:, at : at + 2] = (
            np.random.default_rng(at).permutation(1 << 16).astype("<u2").view(np.uint8).reshape(-1, 2)
        )
    raw = np.arange(1 << 21, dtype="<u2").view(np.uint8) if name in ("F16", "BF16") else blocks.ravel()
    same_bits(
        packing.unpack(lib, pack(lib, raw, name, shape), FORM_OF[name], shape),
        irkit.gguf.dequantize(raw, name, shape),
    )


def scales_minima_codes(raw: np.ndarray, name: str, shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each weight of a K-quant's tensor is made of, from dequantizing it with some of its bytes changed."""

    def changed(*changes: tuple[int, int, int | list[int]]) -> np.ndarray:
        blocks = raw.reshape(-1, BY_NAME[name].block_bytes).copy()
        for start, stop, value in changes:
            blocks[:, start:stop] = value
        return irkit.gguf.dequantize(blocks.ravel(), name, shape)

    if name == "Q6_K":
        scales = changed((0, 128, 0x11), (128, 192, 0xAA))  # every code is 33, which means 1
        return scales, np.zeros_like(scales), changed((192, 208, 1), (208, 210, ONE))
    codes_at = BY_NAME[name].block_bytes - 128
    scales = changed((2, 4, 0), (16, codes_at, 0), (codes_at, codes_at + 128, 0x11))  # every code is 1
    minima = changed((0, 2, 0))
    return scales, minima, changed((0, 4, [*ONE, 0, 0]), (4, 8, 1), (8, 12, 0), (12, 16, 1))


@pytest.mark.parametrize("name", ROUNDED)
@matrices
def test_rounded_formats(lib: ctypes.CDLL, name: str, rows: int, blocks: int, seed: int, bound: float) -> None:
    """Scales and minima are rounded to float16, once, and nothing else is; what overflows is reported."""
    shape = shape_of(name, rows, blocks)
    raw = random_raw(name, shape, seed, bound)
    out = np.empty(packing.packed_bytes(FORM_OF[name], shape), np.uint8)
    fits = packs(lib, raw, name, shape, out)
    *factors, codes = scales_minima_codes(raw, name, shape)
    with np.errstate(all="ignore"):
        scales, minima = np.float16(factors[0]), np.float16(factors[1])
        expected = scales.astype(np.float32) * codes + minima.astype(np.float32)
    np.testing.assert_array_equal(packing.unpack(lib, out, FORM_OF[name], shape), expected)
    overflows = [np.isinf(half) & np.isfinite(whole) for half, whole in ((scales, factors[0]), (minima, factors[1]))]
    assert fits == (not np.any(overflows))


@pytest.mark.parametrize("name", ROUNDED)
def test_how_far_the_rounded_formats_are_off(lib: ctypes.CDLL, name: str) -> None:
    shape = (64, 1024)
    raw = random_raw(name, shape, bound=0.1)
    scales, minima, codes = map(np.abs, scales_minima_codes(raw, name, shape))
    ours = packing.unpack(lib, pack(lib, raw, name, shape), FORM_OF[name], shape)
    error = np.abs(ours.astype(np.float64) - irkit.gguf.dequantize(raw, name, shape))
    sums = scales * codes + minima
    # Half a unit in the last place of float16, of each factor, and of float32, of their sum.
    assert np.all(
        error <= np.maximum(scales * 2**-11, 2**-25) * codes + np.maximum(minima * 2**-11, 2**-25) + sums * 2**-23
    )
    assert error.any()


@pytest.mark.parametrize(
    ("name", "start", "values"),
    [
        ("Q4_K", 0, [0xFF, 0x7B, 0, 0, 2, 0, 0, 0]),  # scale 65504 * 2
        ("Q4_K", 2, [0xFF, 0xFB, 0, 0, 0, 0, 2, 0]),  # minimum -65504 * 2
        ("Q5_K", 0, [0xFF, 0x7B, 0, 0, 0, 0, 2, 0]),
        ("Q5_K", 2, [0xFF, 0x7B, 0, 0, 0, 0, 0, 2]),
        ("Q6_K", 192, [*[0] * 15, 0xFE, 0xFF, 0x7B]),  # scale 65504 * -2
    ],
)
def test_scales_too_large_for_float16(lib: ctypes.CDLL, name: str, start: int, values: list[int]) -> None:
    shape = (17, 512)
    out = np.empty(packing.packed_bytes(FORM_OF[name], shape), np.uint8)
    raw = np.zeros((34, BY_NAME[name].block_bytes), np.uint8)
    assert packs(lib, raw.ravel(), name, shape, out)
    raw[-1, start : start + len(values)] = values
    assert not packs(lib, raw.ravel(), name, shape, out)
    assert packs(lib, raw.ravel(), name, shape, out, panels=range(1))  # it is in the other panel
    for finite, infinite in [(0xFF, 0), (0x7B, 0x7C), (0xFB, 0xFC)]:
        raw[raw == finite] = infinite
    assert packs(lib, raw.ravel(), name, shape, out)  # as it was in the file


def laid_out(form: str, codes: np.ndarray, scales: np.ndarray, minima: np.ndarray | None) -> np.ndarray:
    """The packed matrix of codes [rows, cols], with scales [rows, blocks, groups] and minima [rows, blocks]."""
    rows, blocks = scales.shape[:2]
    panels = -(-rows // 16)

    def by_panel(array: np.ndarray, *shape: int) -> np.ndarray:
        padded = np.zeros((panels * 16, *array.shape[1:]), array.dtype)
        padded[:rows] = array
        return np.moveaxis(padded.reshape(panels, 16, *shape), 1, -1)  # rows last

    quads = np.swapaxes(by_panel(codes, blocks, 8, 4), -1, -2)  # [panels, blocks, 8, 16, 4]
    low, high = quads & 15, quads >> 4
    parts = [low[:, :, :4] | low[:, :, 4:] << 4] if form != "q8" else [quads]
    if form in ("q5", "q5m"):
        parts += [sum(high[:, :, j] << j for j in range(8))]
    if form == "q6":
        parts += [sum(high[:, :, j : j + 5 : 4] << 2 * j for j in range(4))]
    parts += [by_panel(part.astype("<f2"), *part.shape[1:]) for part in (scales, minima) if part is not None]
    rows_of_bytes = [np.ascontiguousarray(part).view(np.uint8).reshape(panels, -1) for part in parts]
    whole = np.concatenate(rows_of_bytes, axis=1)
    return np.pad(whole, ((0, 0), (0, -whole.shape[1] % 64))).ravel()


@pytest.mark.parametrize("name", HALVES)
def test_layout(lib: ctypes.CDLL, name: str) -> None:
    """As src/forms.h says, for a matrix of which nearly every block has a scale and a minimum of its own."""
    shape, form = (37, 768), FORM_OF[name]
    blocks = random_raw(name, shape).reshape(-1, BY_NAME[name].block_bytes)
    # Scales and minima are small integers, for which float arithmetic is exact; none of a K-quant's is zero.
    if name in ROUNDED:
        for start, stop, bits in [(192, 208, 1)] if name == "Q6_K" else [(4, 12, 1), (12, 16, 0x11)]:
            blocks[:, start:stop] |= bits
        for at in HALVES[name]:
            blocks[:, at : at + 2] = ONE
        scales, minima, codes = scales_minima_codes(blocks.ravel(), name, shape)
        scales, minima = scales.reshape(37, 24, 2, 16)[:, :, : 2 if form == "q6" else 1, 0], minima[:, ::32]
    else:
        integers = np.arange(len(blocks)) % 1000 + 1.0
        scales = integers.reshape(37, 24, 1)
        minima = 500 - scales[..., 0] if form.endswith("m") else np.zeros((37, 24))
        for at, values in zip(HALVES[name], (scales, minima), strict=False):
            blocks[:, at : at + 2] = values.astype("<f2").view(np.uint8).reshape(-1, 2)
        weights = irkit.gguf.dequantize(blocks.ravel(), name, shape).reshape(37, 24, 32)
        codes = ((weights - minima[..., None]) / scales).reshape(shape)
    codes = (codes + {"q4": 8, "q5": 16, "q6": 32, "q8": 128}.get(form, 0)).astype(np.uint8)
    expected = laid_out(form, codes, scales, minima if form.endswith("m") else None)
    assert np.array_equal(pack(lib, blocks.ravel(), name, shape), expected)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_layout_without_codes(lib: ctypes.CDLL, name: str) -> None:
    rows, cols = shape = (21, 5)
    raw = random_raw(name, shape)
    numbers = np.zeros((32, cols), f"<u{BY_NAME[name].block_bytes}")
    numbers[:rows] = raw.view(numbers.dtype).reshape(shape)
    panels = np.swapaxes(numbers.reshape(2, 16, cols), 1, 2).reshape(2, -1).view(np.uint8)
    expected = np.pad(panels, ((0, 0), (0, -panels.shape[1] % 64))).ravel()
    assert np.array_equal(pack(lib, raw, name, shape), expected)


@pytest.mark.parametrize("name", FORM_OF)
def test_rows_in_another_order(lib: ctypes.CDLL, name: str) -> None:
    shape = shape_of(name, 37, 2)
    raw = random_raw(name, shape)
    order = np.random.default_rng(1).permutation(37).astype(np.int32)
    rows_of_bytes = raw.reshape(37, -1)
    assert np.array_equal(
        pack(lib, raw, name, shape, order=order), pack(lib, rows_of_bytes[order].ravel(), name, shape)
    )


def test_several_at_once(lib: ctypes.CDLL) -> None:
    blocks = np.zeros((3, BY_NAME["Q4_K"].block_bytes), np.uint8)
    blocks[1, :5] = [0xFF, 0x7B, 0, 0, 2]  # scale 65504 * 2
    each = [("Q4_K", block, (1, 256)) for block in blocks] + [("F16", random_raw("F16", (20, 32)), (20, 32))]
    outs = [np.full(packing.packed_bytes(FORM_OF[name], shape), 0xAA, np.uint8) for name, _, shape in each]
    tasks = [packing.task(lib, raw, name, shape, out) for (name, raw, shape), out in zip(each, outs, strict=True)]
    assert packing.pack_all(lib, tasks) == [True, False, True, True]
    assert np.array_equal(outs[3], pack(lib, each[3][1], "F16", (20, 32)))
    assert packing.pack_all(lib, []) == []


@pytest.mark.parametrize("name", FORM_OF)
def test_panels_by_several_threads(lib: ctypes.CDLL, name: str) -> None:
    shape = shape_of(name, 16 * 7 + 3, 2)
    raw = random_raw(name, shape)
    order = np.random.default_rng(2).permutation(shape[0]).astype(np.int32)
    whole = pack(lib, raw, name, shape, order=order)
    parts = np.full(whole.size + 128, 0xAA, np.uint8)
    with ThreadPoolExecutor(2) as threads:
        ranges = [range(5, 8), range(1), range(3, 3), range(1, 5)]
        assert all(threads.map(lambda some: packs(lib, raw, name, shape, parts[64:-64], order, some), ranges))
    assert np.array_equal(parts[64:-64], whole)
    assert np.all(parts[:64] == 0xAA)
    assert np.all(parts[-64:] == 0xAA)


@pytest.mark.parametrize("name", FORM_OF)
def test_rows_past_the_last_are_zeros(lib: ctypes.CDLL, name: str) -> None:
    shape = shape_of(name, 19, 1)
    full = pack(lib, random_raw(name, shape), name, shape)
    same_bits(
        np.abs(packing.unpack(lib, full, FORM_OF[name], (32, shape[1]))[19:]), np.zeros((13, shape[1]), np.float32)
    )


@pytest.mark.parametrize("name", FORM_OF)
def test_ids_are_clipped(lib: ctypes.CDLL, name: str) -> None:
    shape = shape_of(name, 21, 2)
    full = pack(lib, random_raw(name, shape), name, shape)
    everything = packing.unpack(lib, full, FORM_OF[name], shape)
    ids = np.array([20, 0, 3, 3, -1, 21, -(2**31), 2**31 - 1], np.int32)
    same_bits(packing.unpack(lib, full, FORM_OF[name], shape, ids), everything[np.clip(ids, 0, 20)])
    assert packing.unpack(lib, full, FORM_OF[name], shape, ids[:0]).shape == (0, shape[1])


def test_the_real_file(lib: ctypes.CDLL, model_path: Path) -> None:
    with irkit.gguf.open(model_path) as file:
        for name in ("blk.0.attn_k.weight", "blk.29.ffn_down.weight", "token_embd.weight"):
            info = file.tensors[name]
            rows, cols = info.shape
            raw = np.fromfile(model_path, np.uint8, info.nbytes, offset=info.offset)
            full = pack(lib, raw, info.format, (rows, cols))
            same_bits(packing.unpack(lib, full, FORM_OF[info.format], (rows, cols)), file.dequantize(name))


def test_forms_are_those_of_the_library(lib: ctypes.CDLL) -> None:
    lib.irkit_form_name.restype = ctypes.c_char_p
    lib.irkit_packed_bytes.restype = ctypes.c_int64
    lib.irkit_packed_bytes.argtypes = [ctypes.c_int32, ctypes.c_int64, ctypes.c_int64]
    names = [lib.irkit_form_name(number) for number in range(len(packing.FORMS))]
    assert names == [form.encode() for form in packing.FORMS]
    assert lib.irkit_form_name(len(names)) is lib.irkit_form_name(-1) is None
    for number, form in enumerate(packing.FORMS):
        for shape in [(1, 32), (16, 64), (17, 96), (49152, 576), (300000, 16384)]:
            assert packing.packed_bytes(form, shape) == lib.irkit_packed_bytes(number, *shape)
    assert packing.packed_bytes("f16", (1, 1)) == lib.irkit_packed_bytes(packing.FORMS.index("f16"), 1, 1) == 64


def test_form_of_every_format(lib: ctypes.CDLL) -> None:
    for name in BY_NAME:
        assert packing.form_of(lib, name, (3, 512)) == FORM_OF.get(name)
    for name, shape in [("Q4_0", (32, 48)), ("Q4_K", (256, 128)), ("F32", (0, 32)), ("F32", (32, 0)), ("?", (32, 32))]:
        assert packing.form_of(lib, name, shape) is None


RAW, OUT = np.zeros(40 * 18, np.uint8), np.zeros(3 * 16 * 18 + 3 * 32, np.uint8)
READ_ONLY = np.frombuffer(OUT.tobytes(), np.uint8)


@pytest.mark.parametrize(
    ("named", "changed"),
    [
        ("format_name", {"format_name": "Q2_K"}),
        ("format_name", {"shape": (40, 33)}),
        ("raw", {"raw": RAW[1:]}),
        ("raw", {"raw": RAW.view(np.int8)}),
        ("raw", {"raw": np.zeros(80 * 18, np.uint8)[::2]}),
        ("raw", {"shape": (41, 32)}),
        ("out", {"out": OUT[1:]}),
        ("out", {"out": READ_ONLY}),
        ("order", {"order": np.arange(40)}),
        ("order", {"order": np.arange(39, dtype=np.int32)}),
        ("order", {"order": np.arange(1, 41, dtype=np.int32)}),
        ("order", {"order": np.arange(-1, 39, dtype=np.int32)}),
        ("panels", {"panels": range(4)}),
        ("panels", {"panels": range(-1, 2)}),
        ("panels", {"panels": range(0, 2, 2)}),
    ],
)
def test_arguments_that_do_not_fit(lib: ctypes.CDLL, named: str, changed: dict) -> None:
    fitting = {"raw": RAW, "format_name": "Q4_0", "shape": (40, 32), "out": OUT}
    assert packs(lib, **fitting)
    with pytest.raises(OptionError, match=f"^{named}: "):
        packs(lib, **(fitting | changed))


@pytest.mark.parametrize(
    ("named", "changed"),
    [
        ("form", {"form": "q7"}),
        ("shape", {"shape": (40, 48)}),
        ("shape", {"shape": (0, 32)}),
        ("packed", {"packed": OUT[:-1]}),
        ("packed", {"shape": (49, 32)}),
        ("ids", {"ids": np.arange(3)}),
        ("ids", {"ids": np.zeros((2, 2), np.int32)}),
    ],
)
def test_unpacking_what_does_not_fit(lib: ctypes.CDLL, named: str, changed: dict) -> None:
    fitting = {"packed": OUT, "form": "q4", "shape": (40, 32)}
    assert packing.unpack(lib, **fitting).shape == (40, 32)
    with pytest.raises(OptionError, match=f"^{named}: "):
        packing.unpack(lib, **(fitting | changed))
