"""Gradients of what a model says, through its dequantized weights, on the device's thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from irkit.engine import sweep
from irkit.transformer import cache as kv
from irkit.transformer.decoder import forward
from irkit.transformer.taps import Edit, Hook, Spec

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int

    from irkit.engine.runtime import Runtime
    from irkit.transformer.config import Config


def gradients(
    runtime: Runtime, tokens: Sequence[int], points: Sequence[str], token: int, other: int | None
) -> tuple[float, dict[str, np.ndarray]]:
    """The logit of `token` after the text, less that of `other` if given, and its gradients.

    Returns:
        The logit, and for each hook point the gradient with regard to what stands there, of all layers:
        `[layer, pos, ...]`, without the layer for a point that has none.
    """
    weights = np.array([1, 0 if other is None else -1], np.float32)
    ids = np.array([token, token if other is None else other], np.int32)
    static = {"config": runtime.config, "points": tuple(points)}
    arguments = runtime.arrays, np.array([tokens], np.int32), ids, weights
    value, found = sweep.run(runtime, logit_gradients, *arguments, **static)
    return float(value), {
        point: np.stack([np.asarray(layer) for layer in layers]) if isinstance(layers, list) else np.asarray(layers)
        for point, layers in found.items()
    }


def logit_gradients(
    params: Any,
    tokens: Int[Array, "1 t"],
    ids: Int[Array, " n"],
    weights: Float[Array, " n"],
    *,
    config: Config,
    points: tuple[str, ...],
) -> tuple[Array, dict[str, Any]]:
    """The weighted sum of the last token's logits of `ids`, and its gradients at hook points.

    Zeros are added at every point; the derivative with regard to them is that with regard to the value.
    """
    t = tokens.shape[1]
    shapes = {"attn.hook_z": (t, config.n_heads, config.d_head)}
    layers = range(config.n_layers)
    zeros: dict[str, Any] = {}
    for point in points:
        zero = jnp.zeros(shapes.get(point, (t, config.d_model)), jnp.float32)
        zeros[point] = zero if point == "hook_embed" else [zero for _ in layers]

    def measure(added: dict[str, Any]) -> Array:
        def add(value: Array, hook: Hook) -> Array:
            more = added[hook.point.name]
            return value + (more if hook.layer is None else more[hook.layer])[None]

        edits = [
            Edit(point, "call", add, layer)
            for point in points
            for layer in ([None] if point == "hook_embed" else layers)
        ]
        cache = kv.empty(config, 1, t, jnp.dtype(jnp.float32))
        where = jnp.arange(t, dtype=jnp.int32)[None]
        spec = Spec((), tuple(edits))
        logits, _, _ = forward(params, tokens, where, cache, config=config, spec=spec, only_last=True)
        return jnp.sum(logits[0, 0][ids] * weights)

    return jax.value_and_grad(measure)(zeros)
