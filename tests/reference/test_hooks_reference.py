"""Exact precision inside the model against Hugging Face transformers: `make_hooks_reference.py` froze the arrays."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_hooks_reference import CACHED_LAYERS, GRADIENT_LAYERS, MLP_STRIDE, POSITIONS, STREAM_STRIDE, head_scores

import irkit
from irkit.kernels.cpu import unpacked
from irkit.transformer import cache as kv
from irkit.transformer import decoder
from irkit.transformer.taps import Edit, EditOperand, Operands, Spec

FROZEN = Path(__file__).parent / "smollm2_hooks.npz"
TOLERANCE = 5e-5
STRIDES = {"pre": MLP_STRIDE, "pre_linear": MLP_STRIDE, "post": MLP_STRIDE}
STRIDES |= dict.fromkeys(("attn_out", "resid_mid", "mlp_out"), STREAM_STRIDE)


@pytest.fixture(scope="module")
def frozen() -> dict[str, np.ndarray]:
    with np.load(FROZEN) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def batch(exact_session: irkit.Session, frozen: dict[str, np.ndarray]) -> irkit.Trace:
    """The text and the repeated tokens, of different lengths, in one pass."""
    names = ["pattern", "rot_k", "q", "k", "v", "z", "resid_pre", "resid_post", *STRIDES]
    repeated = frozen["repeated"].tolist() * 2
    return exact_session.trace([frozen["ids"].tolist(), repeated], names=names, logits="none")


@pytest.fixture(scope="module")
def trace(batch: irkit.Trace) -> irkit.Trace:
    return batch.row(0)


def check(found: np.ndarray, expected: np.ndarray) -> None:
    """`[pos, ...]`: position 0, where the model keeps a massive activation, on its own scale."""
    assert found.shape == expected.shape
    for one, other in ((found[:1], expected[:1]), (found[1:], expected[1:])):
        assert np.abs(one - other).max() <= TOLERANCE * np.abs(other).max()


def test_the_text_is_the_one_that_was_frozen(exact_session: irkit.Session, trace: irkit.Trace) -> None:
    assert exact_session.tokenize("When Mary and John went to the store, John gave a drink to") == list(trace.ids[0])


def test_patterns(trace: irkit.Trace, frozen: dict[str, np.ndarray]) -> None:
    assert trace["pattern"].shape == (30, 1, 9, *[len(frozen["ids"])] * 2)
    np.testing.assert_allclose(trace["pattern"][:, 0], frozen["pattern"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["q", "k", "v", "z", "resid_pre", *STRIDES])
def test_values_of_every_layer(trace: irkit.Trace, frozen: dict[str, np.ndarray], name: str) -> None:
    assert len(frozen[name]) == 30
    for layer, expected in enumerate(frozen[name]):
        check(trace[name, layer][0, list(POSITIONS)][..., :: STRIDES.get(name, 1)], expected)


def test_the_stream_before_the_final_norm(trace: irkit.Trace, frozen: dict[str, np.ndarray]) -> None:
    check(trace["resid_post", -1][0, list(POSITIONS)], frozen["resid_post"][0])


def test_the_kv_cache(trace: irkit.Trace, frozen: dict[str, np.ndarray]) -> None:
    for index, layer in enumerate(CACHED_LAYERS):
        for name, cached in (("rot_k", "cached_keys"), ("v", "cached_values")):
            check(trace[name, layer][0], frozen[cached][index].swapaxes(0, 1))


def test_the_induction_table(batch: irkit.Trace, frozen: dict[str, np.ndarray]) -> None:
    found = head_scores(batch.row(1)["pattern"][:, 0], len(frozen["repeated"]))
    assert found["induction"].max() > 0.5  # there are such heads to find
    for name, table in found.items():
        np.testing.assert_allclose(table, frozen[name], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def gradients(exact_session: irkit.Session, frozen: dict[str, np.ndarray]) -> dict[int, np.ndarray]:
    """Of the logit difference, through vectors of zeros that are added to the stream: `[pos, d_model]` by layer."""
    params = unpacked(exact_session.model.load().result().params)
    config, size = exact_session.model.config, len(frozen["ids"])
    layers = (0, *GRADIENT_LAYERS)
    spec = Spec(edits=(Edit("hook_resid_pre", "add"),) * len(layers))
    right, wrong = frozen["answers"]

    def difference(added: jax.Array, params: Any) -> jax.Array:
        edits = tuple(
            EditOperand(
                jnp.arange(config.n_layers)[None] == layer, jnp.ones((1, size), bool), None, jnp.ones(1), vectors[None]
            )
            for layer, vectors in zip(layers, added, strict=True)
        )
        cache = kv.empty(config, 1, size, jnp.dtype(jnp.float32))
        tokens, positions = jnp.asarray(frozen["ids"][None]), jnp.arange(size)[None]
        logits, _, _ = decoder.forward(
            params, tokens, positions, cache, config=config, spec=spec, operands=Operands(edits=edits), only_last=True
        )
        return logits[0, 0, right] - logits[0, 0, wrong]

    zeros = jnp.zeros((len(layers), size, config.d_model))
    value, found = jax.jit(jax.value_and_grad(difference))(zeros, params)
    np.testing.assert_allclose(value, frozen["difference"], rtol=0, atol=4e-4)
    return dict(zip(layers, np.asarray(found), strict=True))


@pytest.mark.parametrize("layer", [0, *GRADIENT_LAYERS])
def test_gradients(gradients: dict[int, np.ndarray], frozen: dict[str, np.ndarray], layer: int) -> None:
    found, expected = gradients[layer], frozen[f"gradient.{layer}"]
    found = found[list(POSITIONS)] if layer else found
    for one, other in zip(found, expected, strict=True):
        assert np.linalg.norm(one - other) <= 1e-3 * np.linalg.norm(other)
