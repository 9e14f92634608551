"""Portable kernels: plain jax.numpy, one contraction an einsum, nothing that Apple's backends lack.

Letters: b batch, t query positions, c cache positions, k key/value heads, g query heads of each, h d_head,
i and o the input and output width of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array, lax

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# float32 weights are there for exactness: no backend may round them to its fast format on the way.
_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def take(matrix: Float[Array, "o i"], ids: Int[Array, "b t"]) -> Float[Array, "b t i"]:
    """The rows `ids` of `matrix`, in float32; ids outside it are clipped to it."""
    return jnp.take(matrix, ids, axis=0, mode="clip").astype(jnp.float32)


def linear(x: Float[Array, "b t i"], weight: Float[Array, "o i"]) -> Float[Array, "b t o"]:
    """`x` times the transposed `weight`: multiplied in the weight's dtype, accumulated in float32."""
    return _einsum("bti,oi->bto", x.astype(weight.dtype), weight)


def by_head(z: Float[Array, "b t n h"], weight: Float[Array, "o n*h"]) -> Float[Array, "b t n o"]:
    """`linear` of one head's values at a time: what each of n heads adds to the stream."""
    return _einsum("btnh,onh->btno", z, weight.reshape(-1, *z.shape[2:]).astype(z.dtype))


def attention(
    q: Float[Array, "b t k*g h"],
    keys: Float[Array, "b k c h"],
    values: Float[Array, "b k c h"],
    positions: Int[Array, "b t"],
    scale: float,
    tap: Callable[[str, Array], Array] | None = None,
) -> Float[Array, "b t k*g h"]:
    """Causal attention of the queries over the cache; neighbouring query heads share a key/value head.

    `positions` are the queries' own: each sees the cache up to and including its position. `tap` is shown
    the scores and the probabilities, `[b, head, query, key]`, if given, and what it returns is used.
    """
    b, t, heads, h = q.shape
    k, c = keys.shape[1:3]
    mixing = pattern(q, keys, positions, scale, tap)
    grouped_pattern = mixing.reshape(b, k, heads // k, t, c).astype(values.dtype)
    z = _einsum("bkgtc,bkch->btkgh", grouped_pattern, values)
    return z.reshape(b, t, heads, h)


def pattern(
    q: Float[Array, "b t k*g h"],
    keys: Float[Array, "b k c h"],
    positions: Int[Array, "b t"],
    scale: float,
    tap: Callable[[str, Array], Array] | None = None,
) -> Float[Array, "b k*g t c"]:
    """The probabilities by which `attention` mixes the values; its arguments."""
    tap = tap or (lambda name, value: value)
    b, t, heads, h = q.shape
    k, c = keys.shape[1:3]
    grouped = q.reshape(b, t, k, heads // k, h).astype(keys.dtype)
    scores = _einsum("btkgh,bkch->bkgtc", grouped, keys)
    visible = positions[:, None, :, None] >= jnp.arange(c)
    scores = jnp.where(visible, scores.reshape(b, heads, t, c) * scale, -jnp.inf)
    scores = tap("attn.hook_attn_scores", scores)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    return tap("attn.hook_pattern", weights / jnp.sum(weights, axis=-1, keepdims=True))


def top_k(x: Float[Array, "b v"], k: int) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """The `k` largest of each row and their places, largest first, equal ones in the order of their places."""
    values, ids = lax.top_k(x, k)
    return values, ids
