"""Dequantizing: the bytes of a tensor to float32, one class a format.

Layouts and formulas are those of ggml's block structures (ggml-common.h) and `dequantize_row_*` functions
(ggml-quants.c); every product and sum is rounded to float32 in their order, so results agree to the bit.
"""
# ruff: noqa: N801 - the classes carry the formats' own names

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from irkit.errors import OptionError, UnsupportedModelError
from irkit.gguf.formats import BY_NAME, Format

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# Weights dequantized at a time. Few enough that scratch arrays stay in a cache; enough that the threads of a
# caller spend their time in numpy's loops and not in waiting for the interpreter lock.
_CHUNK = 1 << 18

# The float32 of every float16; looking one up takes half the time of numpy's own conversion.
_HALF = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


class Quant:
    """A format that can be dequantized; a subclass is registered under its own name."""

    format: ClassVar[Format]

    def __init_subclass__(cls) -> None:
        cls.format = BY_NAME[cls.__name__]
        QUANTS[cls.__name__] = cls

    @staticmethod
    def _unpack(blocks: Bytes, out: Floats) -> None:
        """Dequantizes `blocks` [n, block_bytes] into `out` [n, block_size]."""
        raise NotImplementedError


QUANTS: dict[str, type[Quant]] = {}


def dequantize(raw: Bytes, format_name: str, shape: Sequence[int], out: Floats | None = None) -> Floats:
    """The float32 values of a tensor.

    Args:
        raw: The tensor's bytes, as they lie in the file.
        format_name: The GGUF name of the format, such as "Q4_K".
        shape: The tensor's shape in numpy's order: the last axis is the one that blocks run along.
        out: Where to write: a C-contiguous float32 array of `shape`; if not given, a new one.

    Returns:
        `out`, of `shape`.

    Raises:
        UnsupportedModelError: If there is no code for the format.
        OptionError: If `raw` or `out` does not fit the format and the shape.
    """
    quant = QUANTS.get(format_name)
    if quant is None:
        raise UnsupportedModelError(
            f"tensor format {format_name} cannot be dequantized; supported are {', '.join(QUANTS)}"
        )
    block_size, block_bytes = quant.format.block_size, quant.format.block_bytes
    shape = tuple(shape)
    blocks, rest = divmod(math.prod(shape), block_size)
    if min(shape, default=0) < 0 or rest or (shape and shape[-1] % block_size):
        raise OptionError(f"shape: {shape} does not divide into {format_name} blocks of {block_size}")
    if raw.dtype != np.uint8 or raw.size != blocks * block_bytes:
        wanted = f"{blocks * block_bytes} uint8 bytes for {format_name} and shape {shape}"
        raise OptionError(f"raw: must be {wanted}, got {raw.size} items of {raw.dtype}")
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.dtype != np.float32 or out.shape != shape or not (out.flags.c_contiguous and out.flags.writeable):
        raise OptionError(f"out: must be a writeable, C-contiguous float32 array of shape {shape}")
    source = np.ascontiguousarray(raw).reshape(blocks, block_bytes)
    target = out.reshape(blocks, block_size)
    step = _CHUNK // block_size
    # A damaged scale may be infinite or NaN: what follows from it is the file's affair, not worth a warning.
    with np.errstate(invalid="ignore"):
        for start in range(0, blocks, step):
            quant._unpack(source[start : start + step], target[start : start + step])
    return out


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte `at` of each block, as float32 [n, 1]."""
    return _HALF[blocks[:, at : at + 2].view("<u2")]


def _fields(packed: Bytes, bits: int, run: int) -> Bytes:
    """Bit fields, one a byte: [n, width] -> [n, width * 8 / bits].

    Each run of `run` bytes gives first the lowest `bits` bits of its bytes, then the next, and so on.
    """
    count, width = packed.shape
    # Whole runs move as single items, and eight bytes are shifted at once: rows of 16 or 32 bytes are too
    # short for numpy's inner loops.
    item = np.dtype((np.void, run))
    words = np.ascontiguousarray(packed.view(item)).view(np.uint64)
    mask = np.uint64((2**64 - 1) // 255 * (2**bits - 1))
    fields = np.empty((count, width // run, 8 // bits), item)
    for index in range(8 // bits):
        fields[:, :, index] = (words >> np.uint64(index * bits) & mask).view(item)
    return fields.view(np.uint8).reshape(count, -1)


def _scale(q: npt.NDArray[np.integer], scale: Floats, out: Floats) -> Floats:
    """`q` [n, weights] times `scale` [n, groups], written to `out` and returned as [n, groups, -1]."""
    grouped = out.reshape(*scale.shape, -1)
    np.copyto(out, q)
    return np.multiply(scale[..., None], grouped, out=grouped)


class F32(Quant):
    """float32, little-endian."""

    @staticmethod
    def _unpack(blocks: Bytes, out: Floats) -> None:
        out[...] = blocks.view("<f4")


class F16(Quant):
    """float16, little-endian."""

    @staticmethod
    def _unpack(blocks: Bytes, out: Floats) -> None:
        np.take(_HALF, blocks.view("<u2"), out=out, mode="clip")


class BF16(Quant):
    """The upper half of a float32, little-endian."""

    @staticmethod
    def _unpack(blocks: Bytes, out: Floats) -> None:
        np.left_shift(blocks.view("<u2"), 16, out=out.view(np.uint32), dtype=np.uint32)


class Q4_0(Quant):
    """float16 d; 16 bytes of nibbles. w = d * (q - 8)."""

    @staticmethod
    def _unpack(blocks: Bytes, out: Floats) -> None:
        q = _fields(blocks[:, 2:], 4, 16)
        _scale(q.view(np.int8) - np.int8(8), _half(blocks, 0), out)


class Q4_1(Quant):
    """float16 d; float16 m; 16 bytes of nibbles. w = d * q + m."""

    @staticmethod
    def _unpack(blocks: Bytes, out: Floats) -> None:
        _scale(_fields(blocks[:, 4:], 4, 16), _half(blocks, 0), out)
        out += _half(blocks, 2)


def _five_bits(blocks: Bytes) -> Bytes:
    """4 bytes of fifth bits, one bit a weight in order, and 16 bytes of nibbles: [n, 20] -> [n, 32]."""
    fifth = np.unpackbits(blocks[:, :4].ravel(), bitorder="little").reshape(-1, 32)
    return _fields(blocks[:, 4:], 4, 16) | fifth * np.uint8(16)


class Q5_0(Quant):
    """float16 d; 4 bytes of fifth bits; 16 bytes of nibbles. w = d * (q - 16)."""

    @staticmethod
    def _unpack(blocks: Bytes, out: Floats) -> None:
        _scale(_five_bits(blocks[:, 2:]).view(np.int8) - np.int8(16), _half(blocks, 0), out)


class Q5_1(Quant):
    """float16 d; float16 m; 4 bytes of fifth bits; 16 bytes of nibbles. w = d * q + m."""

    @staticmethod
    def _unpack(blocks: Bytes, out: Floats) -> None:
        _scale(_five_bits(blocks[:, 4:]), _half(blocks, 0), out)
        out += _half(blocks, 2)


class Q8_0(Quant):
    """float16 d; 32 signed bytes. w = d * q."""

    @staticmethod
    def _unpack(blocks: Bytes, out: Floats) -> None:
        _scale(blocks[:, 2:].view(np.int8), _half(blocks, 0), out)


def _scales_and_minima(blocks: Bytes) -> tuple[Floats, Floats]:
    """The head that Q4_K and Q5_K share: d * scale and dmin * minimum of the 8 groups of 32, each [n, 8].

    float16 d; float16 dmin; 12 bytes of 6-bit numbers. The lower six bits of bytes 0-3 are scales 0-3, those
    of bytes 4-7 minima 0-3; above them lie the upper two bits of scales 4-7 and minima 4-7. Bytes 8-11 hold
    the lower four bits of these: of the scales in their lower nibbles, of the minima in their upper ones.
    """
    scale, minimum, last = blocks[:, 4:16].view("<u4").T
    scales = np.stack((scale & 0x3F3F3F3F, last & 0x0F0F0F0F | scale >> 2 & 0x30303030), axis=1)
    minima = np.stack((minimum & 0x3F3F3F3F, last >> 4 & 0x0F0F0F0F | minimum >> 2 & 0x30303030), axis=1)
    return _half(blocks, 0) * scales.view(np.uint8), _half(blocks, 2) * minima.view(np.uint8)


class Q4_K(Quant):
    """Scales and minima of 8 groups; 128 bytes of nibbles. w = d * scale * q - dmin * minimum."""

    @staticmethod
    def _unpack(blocks: Bytes, out: Floats) -> None:
        scale, minimum = _scales_and_minima(blocks)
        grouped = _scale(_fields(blocks[:, 16:], 4, 32), scale, out)
        grouped -= minimum[..., None]


class Q5_K(Quant):
    """Scales and minima of 8 groups; 32 bytes of fifth bits; 128 bytes of nibbles. w as in Q4_K."""

    @staticmethod
    def _unpack(blocks: Bytes, out: Floats) -> None:
        scale, minimum = _scales_and_minima(blocks)
        q = _fields(blocks[:, 48:], 4, 32) | _fields(blocks[:, 16:48], 1, 32) * np.uint8(16)
        grouped = _scale(q, scale, out)
        grouped -= minimum[..., None]


class Q6_K(Quant):
    """128 bytes of nibbles; 64 of upper bit pairs; 16 signed scales; float16 d. w = d * scale * (q - 32)."""

    @staticmethod
    def _unpack(blocks: Bytes, out: Floats) -> None:
        q = _fields(blocks[:, :128], 4, 64) | _fields(blocks[:, 128:192], 2, 32) * np.uint8(16)
        scale = _half(blocks, 208) * blocks[:, 192:208].view(np.int8)
        _scale(q.view(np.int8) - np.int8(32), scale, out)
