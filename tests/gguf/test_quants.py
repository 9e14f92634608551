"""Dequantizing, held to the `gguf` package bit by bit."""

import gguf
import numpy as np
import pytest

import irkit.gguf
from irkit.errors import OptionError, UnsupportedModelError
from irkit.gguf.formats import BY_NAME

# Where the float16 numbers of a block lie.
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "F16": [0],
}  # fmt: skip


def same_bits(left: np.ndarray, right: np.ndarray) -> None:
    # Which of two NaNs an operation returns is the processor's choice.
    assert np.array_equal(np.isnan(left), np.isnan(right))
    numbers = ~np.isnan(left)
    assert np.array_equal(left.view(np.uint32)[numbers], right.view(np.uint32)[numbers])


def random_blocks(format_name: str, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, BY_NAME[format_name].block_bytes), np.uint8)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", irkit.gguf.QUANTS)
def test_every_pattern_of_bits(name: str) -> None:
    """Random weights under every float16 there is, NaN, infinite and subnormal ones too, in every scale."""
    blocks = random_blocks(name, 1 << 16, seed=0)
    for order, at in enumerate(HALVES.get(name, [])):
        scales = np.random.default_rng(order).permutation(1 << 16).astype("<u2")
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    ours = irkit.gguf.dequantize(blocks.ravel(), name, (1 << 16, BY_NAME[name].block_size))
    with np.errstate(invalid="ignore"):
        theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    same_bits(ours, theirs)


@pytest.mark.parametrize("name", irkit.gguf.QUANTS)
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_sizes_around_the_chunk(name: str, extra: int) -> None:
    count = (1 << 18) // BY_NAME[name].block_size + extra
    blocks = random_blocks(name, count, seed=1)
    ours = irkit.gguf.dequantize(blocks.ravel(), name, (count * BY_NAME[name].block_size,))
    with np.errstate(invalid="ignore"):
        theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    same_bits(ours, theirs.ravel())


def test_a_block_worked_out_by_hand() -> None:
    """Q4_1: d = 0.5, m = -2, byte i of the nibbles holds i in its lower half and 15 - i in its upper."""
    nibbles = [i | (15 - i) << 4 for i in range(16)]
    raw = np.array([0x00, 0x38, 0x00, 0xC0, *nibbles], np.uint8)
    expected = [0.5 * i - 2 for i in range(16)] + [0.5 * (15 - i) - 2 for i in range(16)]
    assert irkit.gguf.dequantize(raw, "Q4_1", (32,)).tolist() == expected


@pytest.mark.parametrize("name", irkit.gguf.QUANTS)
def test_bytes_may_lie_anywhere(name: str) -> None:
    """At an odd address, and with gaps: neither changes the values."""
    blocks = random_blocks(name, 16, seed=2)
    shape = (2, 2, 4 * BY_NAME[name].block_size)
    expected = irkit.gguf.dequantize(blocks.ravel(), name, shape)
    room = np.zeros(blocks.size + 1, np.uint8)
    room[1:] = blocks.ravel()
    same_bits(irkit.gguf.dequantize(room[1:], name, shape), expected)
    gaps = np.repeat(blocks.ravel(), 2)
    same_bits(irkit.gguf.dequantize(gaps[::2], name, shape), expected)


@pytest.mark.parametrize("shape", [(), (1,), (0, 32), (2, 3, 4)])
def test_plain_formats_take_any_shape(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    raw = np.frombuffer(values.tobytes(), np.uint8)
    result = irkit.gguf.dequantize(raw, "F32", shape)
    assert result.shape == shape
    assert np.array_equal(result, values)


def test_out_is_written_to_and_returned() -> None:
    raw = random_blocks("Q8_0", 8, seed=4).ravel()
    out = np.full((4, 64), 7, np.float32)
    assert irkit.gguf.dequantize(raw, "Q8_0", (4, 64), out=out) is out
    same_bits(out, irkit.gguf.dequantize(raw, "Q8_0", (4, 64)))


def read_only() -> np.ndarray:
    out = np.empty((4, 64), np.float32)
    out.flags.writeable = False
    return out


@pytest.mark.parametrize(
    "out",
    [
        np.empty((4, 64), np.float64),
        np.empty((64, 4), np.float32),
        np.empty((64, 4), np.float32).T,
        np.empty((4, 128), np.float32)[:, ::2],
        read_only(),
    ],
    ids=["float64", "another shape", "transposed", "with gaps", "read-only"],
)
def test_out_that_does_not_fit(out: np.ndarray) -> None:
    raw = random_blocks("Q8_0", 8, seed=4).ravel()
    with pytest.raises(OptionError, match=r"out: must be .* of shape \(4, 64\)"):
        irkit.gguf.dequantize(raw, "Q8_0", (4, 64), out=out)


@pytest.mark.parametrize("shape", [(31,), (2, 16), (32, 2), (), (-32,), (-1, -32)])
def test_shapes_that_do_not_divide_into_blocks(shape: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match=r"shape: .* does not divide into Q4_0 blocks of 32"):
        irkit.gguf.dequantize(np.zeros(18, np.uint8), "Q4_0", shape)


@pytest.mark.parametrize("raw", [np.zeros(17, np.uint8), np.zeros(36, np.uint8), np.zeros(18, np.int8)])
def test_bytes_that_do_not_fit_the_shape(raw: np.ndarray) -> None:
    with pytest.raises(OptionError, match=r"raw: must be 18 uint8 bytes for Q4_0 and shape \(32,\)"):
        irkit.gguf.dequantize(raw, "Q4_0", (32,))


@pytest.mark.parametrize("name", ["IQ2_XS", "MXFP4", "I32", "q4_0", ""])
def test_formats_without_code(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"format {name} cannot .* supported are F32, F16, .* Q6_K"):
        irkit.gguf.dequantize(np.zeros(256, np.uint8), name, (256,))


def test_sizes_agree_with_the_gguf_package() -> None:
    theirs = {kind.name: (kind.value, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    ours = {known.name: (known.number, known.block_size, known.block_bytes) for known in BY_NAME.values()}
    # The package still has the Q8_1 of 2023, with float32 scales; ggml's has had float16 ones since.
    assert ours.pop("Q8_1") == (9, 32, 36)
    for name in theirs.keys() & ours.keys():
        assert ours[name] == theirs[name], name
    assert irkit.gguf.QUANTS.keys() <= theirs.keys() & ours.keys()
