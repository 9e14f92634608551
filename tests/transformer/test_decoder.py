"""The forward pass against itself: chunks, batches, padding, hook points. Against others: tests/reference."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irkit.transformer import cache as kv
from irkit.transformer import decoder
from irkit.transformer.config import Config
from irkit.transformer.taps import HOOK_POINTS, hook_names

CONFIG = Config(
    n_layers=2,
    d_model=32,
    n_heads=6,
    n_kv_heads=2,
    d_head=8,
    d_mlp=48,
    d_vocab=97,
    n_ctx=64,
    eps=1e-5,
    rotary_dim=8,
    attention_scale=8**-0.5,
)


def parameters(config: Config = CONFIG, *, biases: bool = False) -> decoder.Params:
    """Random weights of a model of this shape."""
    rng = np.random.default_rng(0)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape, scale=shape[-1] ** -0.5), jnp.float32)

    d, mlp, q, kv_width = (
        config.d_model,
        config.d_mlp,
        config.n_heads * config.d_head,
        config.n_kv_heads * config.d_head,
    )
    widths = {
        "q": (q, d), "k": (kv_width, d), "v": (kv_width, d), "o": (d, q),
        "gate": (mlp, d), "up": (mlp, d), "down": (d, mlp),
    }  # fmt: skip

    def block() -> dict[str, jax.Array | None]:
        matrices = {name: array(*shape) for name, shape in widths.items()}
        bias = {f"{name}_bias": array(shape[0]) if biases else None for name, shape in widths.items()}
        return {**matrices, **bias, "ln1": 1 + array(config.d_model), "ln2": 1 + array(config.d_model)}

    return {
        "embed": array(config.d_vocab, config.d_model),
        "unembed": None,
        "ln_final": 1 + array(config.d_model),
        "inv_freq": jnp.asarray(10000.0 ** -(np.arange(0, config.rotary_dim, 2) / config.rotary_dim), jnp.float32),
        "blocks": [block() for _ in range(config.n_layers)],
    }


forward = jax.jit(decoder.forward, static_argnames=("config", "spec", "only_last"))
TOKENS = np.random.default_rng(1).integers(0, CONFIG.d_vocab, (4, 12), np.int32)


def run(params: Any, tokens: np.ndarray, start: Any = 0, cache: Any = None, **options: Any) -> Any:
    """Logits, cache and captures; `start` is one position or one for each row."""
    positions = np.broadcast_to(np.reshape(start, (-1, 1)), (len(tokens), 1)) + np.arange(tokens.shape[1])
    cache = kv.empty(CONFIG, len(tokens), 32, jnp.dtype(jnp.float32)) if cache is None else cache
    return forward(params, tokens, positions.astype(np.int32), cache, config=CONFIG, **options)


@pytest.mark.parametrize("biases", [False, True])
def test_any_division_into_calls_gives_the_same_logits(biases: bool) -> None:
    params = parameters(biases=biases)
    whole, _, _ = run(params, TOKENS)
    for sizes in ([1] * 12, [5, 1, 6], [11, 1]):
        cache, start, parts = None, 0, []
        for size in sizes:
            logits, cache, _ = run(params, TOKENS[:, start : start + size], start, cache)
            parts.append(logits)
            start += size
        np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5)
        assert cache is not None
        np.testing.assert_array_equal(cache.tokens[:, :12], TOKENS)


def test_rows_of_a_batch_do_not_touch_each_other() -> None:
    params = parameters()
    starts = [0, 3, 7, 2]
    rows = []
    for row, start in enumerate(starts):
        _, cache, _ = run(params, TOKENS[row : row + 1, :start]) if start else (None, None, None)
        rows.append(run(params, TOKENS[row : row + 1, start : start + 5], start, cache))
    begun = kv.KVCache(
        *jax.tree.map(
            lambda *layers: jnp.concatenate(layers),
            *[run(params, TOKENS[row : row + 1, : max(start, 1)])[1] for row, start in enumerate(starts)],
        )
    )
    tokens = np.stack([TOKENS[row, start : start + 5] for row, start in enumerate(starts)])
    together, cache, _ = run(params, tokens, starts, begun)
    np.testing.assert_allclose(together, np.concatenate([logits for logits, _, _ in rows]), atol=1e-5)
    for row, start in enumerate(starts):
        np.testing.assert_allclose(
            cache.keys[1][row, :, : start + 5], rows[row][1].keys[1][0, :, : start + 5], atol=1e-5
        )


def test_padding_changes_nothing() -> None:
    params = parameters()
    plain, cache, _ = run(params, TOKENS[:1, :5])
    padded, padded_cache, _ = run(params, np.concatenate([TOKENS[:1, :5], TOKENS[1:2, :3]], axis=1))
    np.testing.assert_allclose(padded[:, :5], plain, atol=1e-5)
    after, _, _ = run(params, TOKENS[:1, 5:9], 5, cache)
    after_padded, _, _ = run(params, TOKENS[:1, 5:9], 5, padded_cache)
    np.testing.assert_allclose(after_padded, after, atol=1e-5)


def test_logits_of_one_position_only() -> None:
    params = parameters()
    whole, _, _ = run(params, TOKENS)
    last = np.array([11, 0, 5, 7], np.int32)
    chosen, _, _ = run(params, TOKENS, count=last + 1, only_last=True)
    np.testing.assert_allclose(chosen[:, 0], np.asarray(whole)[np.arange(4), last], atol=1e-5)


def test_a_grown_cache_holds_what_it_held() -> None:
    params = parameters()
    _, cache, _ = run(params, TOKENS[:, :8])
    expected, _, _ = run(params, TOKENS[:, 8:], 8, cache)
    found, _, _ = run(params, TOKENS[:, 8:], 8, kv.grow(cache, 50))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def compiled(spec: tuple[str, ...]) -> str:
    """The machine-independent program, without the places in the source it came from."""

    def program(params: Any, tokens: Any, cache: Any) -> Any:
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        return decoder.forward(params, tokens, positions, cache, config=CONFIG, spec=spec)

    cache = kv.empty(CONFIG, 1, 32, jnp.dtype(jnp.float32))
    text = jax.jit(program).lower(parameters(), TOKENS[:1], cache).compile().as_text()
    assert text is not None
    return re.sub(r"(, metadata=\{[^}]*\})|(stack_frame_id=\d+)", "", text.split("\n\nFileNames")[0])


def test_an_empty_spec_compiles_to_the_program_without_taps(monkeypatch: pytest.MonkeyPatch) -> None:
    with_taps = compiled(())
    assert compiled(("blocks.1.attn.hook_pattern",)) != with_taps  # the comparison can tell

    class NoTaps:
        captures: dict[str, jax.Array] = {}  # noqa: RUF012

        def __init__(self, *arguments: object) -> None: ...

        def layer(self, index: int | None) -> None: ...

        def wants(self, name: str) -> bool:
            return False

        def captured_inside(self) -> set[str]:
            return set()

        def __call__(self, name: str, value: jax.Array) -> jax.Array:
            return value

    monkeypatch.setattr(decoder, "Taps", NoTaps)
    assert compiled(()) == with_taps


@pytest.fixture(scope="module")
def captured() -> dict[str, np.ndarray]:
    """Every hook point of a call of 5 tokens after 7."""
    params = parameters()
    _, cache, _ = run(params, TOKENS[:, :7])
    _, _, captures = run(params, TOKENS[:, 7:], 7, cache, spec=hook_names(2))
    return {name: np.asarray(value) for name, value in captures.items()}


def test_every_hook_point_is_there_in_the_shape_of_the_table(captured: dict[str, np.ndarray]) -> None:
    assert set(captured) == set(hook_names(2))
    sizes = {
        "b": 4, "pos": 5, "query": 5, "key": 32, "H": 6, "K": 2, "d_head": 8, "d_model": 32, "d_mlp": 48, "1": 1,
    }  # fmt: skip
    for point in HOOK_POINTS:
        shape = tuple(sizes[letter] for letter in point.shape.strip("[]").split(", "))
        for name in [f"blocks.{i}.{point.name}" for i in range(2)] if point.per_layer else [point.name]:
            assert captured[name].shape == shape, name


def test_identities_between_hook_points(captured: dict[str, np.ndarray]) -> None:
    params = parameters()
    for i in range(2):

        def at(name: str, block: int = i) -> np.ndarray:
            return captured[f"blocks.{block}.{name}"]

        np.testing.assert_allclose(at("attn.hook_pattern").sum(-1), 1, atol=1e-5)
        for query in range(5):
            assert not at("attn.hook_pattern")[:, :, query, 8 + query :].any()
            assert (at("attn.hook_pattern")[:, :, query, : 8 + query] > 0).all()
        np.testing.assert_allclose(at("hook_resid_mid"), at("hook_resid_pre") + at("hook_attn_out"), atol=1e-6)
        np.testing.assert_allclose(at("hook_resid_post"), at("hook_resid_mid") + at("hook_mlp_out"), atol=1e-6)
        np.testing.assert_allclose(at("attn.hook_result").sum(2), at("hook_attn_out"), atol=1e-5)
        np.testing.assert_allclose(at("ln1.hook_normalized") * at("ln1.hook_scale"), at("hook_resid_pre"), atol=1e-5)
        gate = at("mlp.hook_pre") / (1 + np.exp(-at("mlp.hook_pre")))
        np.testing.assert_allclose(at("mlp.hook_post"), gate * at("mlp.hook_pre_linear"), atol=1e-5)
    np.testing.assert_array_equal(captured["blocks.1.hook_resid_pre"], captured["blocks.0.hook_resid_post"])
    np.testing.assert_array_equal(captured["hook_embed"], np.asarray(params["embed"])[TOKENS[:, 7:]])


def test_the_final_norm_shows_every_position_where_the_last_logits_are_enough() -> None:
    params, count = parameters(), np.array([12, 3, 7, 1], np.int32)
    names = ("ln_final.hook_scale", "ln_final.hook_normalized")
    logits, _, whole = run(params, TOKENS, spec=names)
    last, _, seen = run(params, TOKENS, spec=names, count=count, only_last=True)
    np.testing.assert_allclose(last[:, 0], logits[np.arange(4), count - 1], atol=1e-5)
    for name in names:
        np.testing.assert_allclose(seen[name], whole[name], atol=1e-6)
