"""The CPU kernels, called by jax, against the portable ones on what was packed."""

from __future__ import annotations

from functools import partial
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from irkit.kernels import cpu, xla
from irkit.kernels.cpu import calls, library, packing
from irkit.transformer import decoder
from irkit.transformer.config import Config
from irkit.transformer.taps import Taps, named

pytestmark = pytest.mark.skipif(library.load() is None, reason="the extension is not installed")
FORMATS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32", "Q4_K", "Q5_K", "Q6_K")
CODED = frozenset(FORMATS) - {"F16", "BF16", "F32"}
# The gguf package cannot make K-quants: random bytes with scales of a sane size serve as well.
SCALES_OF_K_QUANTS = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    assert library.register()


def packed(format_name: str, rows: int, cols: int, seed: int = 0) -> tuple[cpu.Packed, np.ndarray]:
    """A random matrix as the kernels read it, and in float32."""
    rng = np.random.default_rng(seed)
    if format_name in SCALES_OF_K_QUANTS:
        size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[format_name]][1]
        blocks = rng.integers(0, 256, (rows * cols // 256, size), np.uint8)
        for at in SCALES_OF_K_QUANTS[format_name]:
            blocks[:, at : at + 2] = rng.uniform(1e-4, 1e-3, (len(blocks), 1)).astype(np.float16).view(np.uint8)
        raw = blocks.reshape(-1)
    else:
        values = rng.normal(0, 0.05, (rows, cols)).astype(np.float32)
        raw = gguf.quantize(values, gguf.GGMLQuantizationType[format_name]).view(np.uint8).reshape(-1)
    loaded = library.load()
    assert loaded is not None
    form = packing.form_of(loaded, format_name, (rows, cols))
    assert form is not None
    out = np.empty(packing.packed_bytes(form, (rows, cols)), np.uint8)
    assert packing.pack_all(loaded, [packing.task(loaded, raw, format_name, (rows, cols), out)]) == [True]
    return cpu.Packed(jnp.asarray(out), form, (rows, cols)), packing.unpack(loaded, out, form, (rows, cols))


def rounded(x: np.ndarray, format_name: str) -> np.ndarray:
    """`x` as the kernels multiply it: in blocks of 16 int8 where the weights are codes."""
    if format_name not in CODED:
        return x
    blocks = x.reshape(-1, 16)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    codes = np.rint(blocks / np.where(scale == 0, 1, scale))
    return (codes * scale).reshape(x.shape).astype(np.float32)


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 12, 13, 40])
def test_products_are_those_of_the_rounded_activations(format_name: str, rows: int) -> None:
    matrix, weights = packed(format_name, 72, 256)
    x = np.random.default_rng(rows).normal(size=(1, rows, 256)).astype(np.float32)
    found = jax.jit(cpu.linear)(x, matrix)
    expected = rounded(x, format_name).astype(np.float64) @ weights.T.astype(np.float64)
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize("format_name", ["Q4_1", "Q8_0", "F16"])
@pytest.mark.parametrize("cols", [32, 64, 576, 1536])
@pytest.mark.parametrize("rows", [1, 16, 17, 49])
def test_products_of_any_size(format_name: str, rows: int, cols: int) -> None:
    matrix, weights = packed(format_name, rows, cols)
    x = np.random.default_rng(1).normal(size=(2, 3, cols)).astype(np.float32)
    expected = rounded(x, format_name) @ weights.T
    np.testing.assert_allclose(jax.jit(cpu.linear)(x, matrix), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("format_name", ["F16", "F32"])
def test_products_of_a_width_that_is_no_multiple_of_anything(format_name: str) -> None:
    matrix, weights = packed(format_name, 33, 37)
    x = np.random.default_rng(1).normal(size=(1, 5, 37)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(cpu.linear)(x, matrix), x @ weights.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    matrix, _ = packed("Q4_1", 576, 576)
    x = np.random.default_rng(1).normal(size=(1, 65, 576)).astype(np.float32)
    call = jax.jit(cpu.linear)
    library.set_threads(1)
    alone = np.asarray(call(x, matrix))
    library.set_threads(threads)
    try:
        for _ in range(20):
            np.testing.assert_array_equal(call(x, matrix), alone)
    finally:
        library.set_threads(2)


@pytest.mark.parametrize("format_name", FORMATS)
def test_rows_taken(format_name: str) -> None:
    matrix, weights = packed(format_name, 40, 256)
    ids = np.array([[0, 39, 17, -1, 99]], np.int32)
    np.testing.assert_array_equal(jax.jit(cpu.take)(matrix, ids)[0], weights[[0, 39, 17, 0, 39]])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 4, 32), (8, 1, 128), (6, 2, 80)], ids=str)
@pytest.mark.parametrize(("t", "start"), [(1, 0), (1, 300), (3, 100), (16, 0), (20, 0), (33, 77), (70, 0)])
def test_attention(heads: tuple[int, int, int], t: int, start: int, dtype: Any) -> None:
    n_heads, n_kv_heads, d_head = heads
    rng = np.random.default_rng(t)
    q = rng.normal(0, 2, (2, t, n_heads, d_head)).astype(np.float32)
    # What lies past the queries' own positions must not be looked at, whatever it is.
    keys, values = np.full((2, 2, n_kv_heads, 400, d_head), np.nan, dtype)
    positions = (np.array([[start], [start + 5]]) + np.arange(t)).astype(np.int32)
    for row in range(2):
        end = positions[row, -1] + 1
        keys[row, :, :end] = rng.normal(0, 2, (n_kv_heads, end, d_head))
        values[row, :, :end] = rng.normal(size=(n_kv_heads, end, d_head))
    found = jax.jit(cpu.attention, static_argnums=4)(q, keys, values, positions, d_head**-0.5)
    wide_keys, wide_values = (jnp.asarray(np.nan_to_num(each.astype(np.float32))) for each in (keys, values))
    expected = xla.attention(jnp.asarray(q), wide_keys, wide_values, jnp.asarray(positions), d_head**-0.5)
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5)
    mixing = jax.jit(cpu.pattern, static_argnums=3)(q, keys, positions, d_head**-0.5)
    wanted = xla.pattern(jnp.asarray(q), wide_keys, jnp.asarray(positions), d_head**-0.5)
    np.testing.assert_allclose(mixing, wanted, rtol=0, atol=5e-6)


def test_attention_shows_its_pattern() -> None:
    rng = np.random.default_rng(0)
    shapes = [(1, 4, 2, 16), (1, 1, 32, 16), (1, 1, 32, 16)]
    q, keys, values = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    seen = {}
    cpu.attention(q, keys, values, jnp.arange(4)[None], 0.25, lambda name, value: seen.setdefault(name, value))
    assert seen["attn.hook_pattern"].shape == (1, 2, 4, 32)
    np.testing.assert_allclose(np.asarray(seen["attn.hook_pattern"]).sum(-1), 1, atol=1e-6)


def test_the_largest_logits() -> None:
    rng = np.random.default_rng(0)
    for size, k in [(1, 1), (63, 63), (64, 5), (1000, 128), (49152, 128), (200, 150)]:
        x = rng.normal(0, 5, (2, size)).astype(np.float32)
        x[1] = np.round(x[1]) + 0  # ties; XLA puts -0 below 0
        for found, expected in zip(jax.jit(cpu.top_k, static_argnums=1)(x, k), lax.top_k(x, k), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_the_largest_of_logits_that_are_no_numbers() -> None:
    x = np.full((1, 300), np.nan, np.float32)
    x[0, [7, 200]] = [1, np.inf]
    _, ids = cpu.top_k(jnp.asarray(x), 4)
    np.testing.assert_array_equal(ids[0, :2], [200, 7])
    assert len(set(np.asarray(ids[0]).tolist())) == 4


CONFIG = Config(
    n_layers=1,
    d_model=256,
    n_heads=6,
    n_kv_heads=2,
    d_head=64,
    d_mlp=512,
    d_vocab=40,
    n_ctx=64,
    eps=1e-5,
    rotary_dim=64,
    attention_scale=0.125,
)
CONSTANTS: dict[str, Any] = {"eps": CONFIG.eps, "scale": CONFIG.attention_scale}
SHAPES = {"q": (384, 256), "k": (128, 256), "v": (128, 256), "o": (256, 384)} | {
    "gate": (512, 256),
    "up": (512, 256),
    "down": (256, 512),
}


def block(formats: dict[str, str], biases: bool = False) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    made: dict[str, Any] = {name: rng.uniform(0.5, 1.5, 256).astype(np.float32) for name in ("ln1", "ln2")}
    for number, name in enumerate(calls.MATRICES):
        made[name] = packed(formats.get(name, "Q4_1"), *SHAPES[name], seed=number)[0]
        bias = rng.normal(size=SHAPES[name][0]).astype(np.float32)
        made[f"{name}_bias"] = bias if biases and name != "up" else None
    return made


@pytest.mark.parametrize(
    ("formats", "biases"),
    [({}, False), ({}, True), ({"v": "Q8_0", "down": "F16", "o": "Q5_0", "up": "Q8_0"}, False)],
    ids=["plain", "biases", "mixed"],
)
@pytest.mark.parametrize(("b", "t", "start"), [(1, 1, 0), (1, 1, 40), (2, 1, 9), (1, 5, 0), (1, 24, 8), (2, 20, 3)])
def test_a_layer_is_the_sum_of_its_parts(formats: dict, biases: bool, b: int, t: int, start: int) -> None:
    rng = np.random.default_rng(t)
    parameters = block(formats, biases)
    resid = rng.normal(size=(b, t, 256)).astype(np.float32)
    cache = [rng.normal(size=(b, 2, 64, 64)).astype(np.float16) for _ in range(2)]
    starts = start + jnp.arange(b)
    positions = starts[:, None] + jnp.arange(t)
    rotation = decoder.rotary(positions, jnp.asarray(10000 ** -np.linspace(0, 1, 32, dtype=np.float32)))

    def parts(resid: Any, keys: Any, values: Any) -> Any:
        return decoder.layer(parameters, resid, (keys, values), positions, rotation, CONFIG, Taps())

    def fused(resid: Any, keys: Any, values: Any) -> Any:
        return cpu.layer(parameters, resid, (keys, values), starts, jnp.full(b, t), rotation, **CONSTANTS)

    assert cpu.can_fuse(parameters, CONFIG.d_head)
    expected, expected_cache = jax.jit(parts)(resid, *cache)
    found, found_cache, _ = jax.jit(fused)(resid, *cache)
    # A value next to a rounding border may fall on the other side of it: one step of int8 in one of 256 terms.
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.02 * np.abs(expected).max())
    assert np.mean(np.abs(found - expected)) < 1e-3 * np.mean(np.abs(expected))
    for mine, theirs in zip(found_cache, expected_cache, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize(("t", "start"), [(1, 9), (20, 3)])
def test_a_layer_shows_what_its_parts_compute(t: int, start: int) -> None:
    rng = np.random.default_rng(t)
    parameters = block(dict.fromkeys(calls.MATRICES, "F32"), biases=True)
    resid = rng.normal(size=(1, t, 256)).astype(np.float32)
    cache = [rng.normal(size=(1, 2, 64, 64)).astype(np.float32) for _ in range(2)]
    starts, positions = jnp.array([start]), start + jnp.arange(t)[None]
    rotation = decoder.rotary(positions, jnp.asarray(10000 ** -np.linspace(0, 1, 32, dtype=np.float32)))

    def parts(resid: Any, keys: Any, values: Any) -> Any:
        taps = Taps(named([f"blocks.0.{point}" for point in cpu.POINTS]))
        decoder.layer(parameters, resid, (keys, values), positions, rotation, CONFIG, taps.layer(0))
        return {name.removeprefix("blocks.0."): value for name, value in taps.captures.items()}

    def fused(resid: Any, keys: Any, values: Any, shown: Any) -> Any:
        return cpu.layer(parameters, resid, (keys, values), starts, jnp.full(1, t), rotation, **CONSTANTS, shown=shown)

    wanted = jax.jit(parts)(resid, *cache)
    assert set(wanted) == set(cpu.POINTS)
    run = jax.jit(fused, static_argnums=3)
    plain, _, _ = run(resid, *cache, ())
    out, _, values = run(resid, *cache, cpu.POINTS)
    np.testing.assert_array_equal(out, plain)
    for point, value in wanted.items():
        assert values[point].shape == value.shape, point
        np.testing.assert_allclose(values[point], value, rtol=0, atol=2e-5 * np.abs(value).max(), err_msg=point)


@pytest.mark.parametrize("format_name", ["F32", "Q8_0"])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_the_second_half_of_a_layer(format_name: str, rows: int) -> None:
    parameters = block(dict.fromkeys(calls.MATRICES, format_name), biases=True)
    resid = np.random.default_rng(rows).normal(size=(1, rows, 256)).astype(np.float32)
    apart = Taps(named(["blocks.0.hook_mlp_out"])).layer(0)
    expected = decoder.mlp(parameters, jnp.asarray(resid), CONFIG, apart)
    found = jax.jit(partial(cpu.mlp, parameters, eps=CONFIG.eps))(resid)
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=(2e-5 if format_name == "F32" else 0.02) * np.abs(expected).max()
    )
    np.testing.assert_allclose(
        found - resid, apart.captures["blocks.0.hook_mlp_out"], rtol=0, atol=0.02 * np.abs(expected).max()
    )


def test_padding_is_left_alone() -> None:
    parameters = block({})
    rng = np.random.default_rng(0)
    resid = rng.normal(size=(1, 24, 256)).astype(np.float32)
    cache = [np.zeros((1, 2, 64, 64), np.float16) for _ in range(2)]
    rotation = decoder.rotary(jnp.arange(24)[None], jnp.ones(32))

    def run(count: int) -> Any:
        start, counts = jnp.array([0]), jnp.array([count])
        return jax.jit(lambda r, k, v: cpu.layer(parameters, r, (k, v), start, counts, rotation, **CONSTANTS))(
            resid, *cache
        )

    whole, (keys, _), _ = run(24)
    part, (few_keys, _), _ = run(7)
    np.testing.assert_allclose(part[:, :7], whole[:, :7], atol=1e-5)
    np.testing.assert_array_equal(few_keys[:, :, :7], keys[:, :, :7])
    assert not np.asarray(few_keys[:, :, 7:]).any()


def test_positions_outside_the_cache_are_refused() -> None:
    rng = np.random.default_rng(0)
    q, keys = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(1, 1, 2, 16), (1, 1, 32, 16)])
    for position in (-1, 32):
        with pytest.raises(Exception, match="positions do not fit"):
            jax.block_until_ready(cpu.attention(q, keys, keys, jnp.full((1, 1), position, jnp.int32), 0.25))


def test_what_each_head_adds() -> None:
    matrix, weights = packed("F32", 256, 384)
    z = np.random.default_rng(0).normal(size=(1, 3, 6, 64)).astype(np.float32)
    found = jax.jit(cpu.by_head)(z, matrix)
    np.testing.assert_allclose(found, xla.by_head(jnp.asarray(z), jnp.asarray(weights)), atol=1e-5)
    np.testing.assert_allclose(found.sum(2), cpu.linear(jnp.asarray(z.reshape(1, 3, -1)), matrix), atol=1e-4)
