"""The KV cache: for each layer the rotated keys and the values of the tokens read so far, and those tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from irkit.transformer.config import Config

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class KVCache(NamedTuple):
    """What attention looks back on; positions past the tokens read hold nothing of meaning.

    It has no length of its own: a query sees the positions up to its own, so whoever calls the forward
    pass says by `positions` how much of the cache counts.
    """

    keys: list[Float[Array, "b kv_head position d_head"]]
    values: list[Float[Array, "b kv_head position d_head"]]
    tokens: Int[Array, "b position"]

    @property
    def capacity(self) -> int:
        """The most tokens it can hold."""
        return self.tokens.shape[1]


def empty(config: Config, batch: int, capacity: int, dtype: jnp.dtype) -> KVCache:
    """A cache with room for `capacity` tokens in each of `batch` rows."""
    shape = (batch, config.n_kv_heads, capacity, config.d_head)
    layers = range(config.n_layers)
    return KVCache(
        [jnp.zeros(shape, dtype) for _ in layers],
        [jnp.zeros(shape, dtype) for _ in layers],
        jnp.zeros((batch, capacity), jnp.int32),
    )


def grow(cache: KVCache, capacity: int) -> KVCache:
    """The same content with room for `capacity` tokens."""
    more = capacity - cache.capacity

    def pad(layers: list[Array]) -> list[Array]:
        return [jnp.pad(layer, ((0, 0), (0, 0), (0, more), (0, 0))) for layer in layers]

    return KVCache(pad(cache.keys), pad(cache.values), jnp.pad(cache.tokens, ((0, 0), (0, more))))


def put_row(cache: KVCache, row: Int[Array, ""], one: KVCache) -> KVCache:
    """`cache` with the only row of `one` in the place of its own."""
    return jax.tree.map(lambda all, new: lax.dynamic_update_slice_in_dim(all, new, row, axis=0), cache, one)


def take_row(cache: KVCache, row: Int[Array, ""]) -> KVCache:
    """One row of `cache`."""
    return jax.tree.map(lambda all: lax.dynamic_slice_in_dim(all, row, 1, axis=0), cache)


def write(
    cache: Float[Array, "b k c h"], new: Float[Array, "b t k h"], start: Int[Array, " b"]
) -> Float[Array, "b k c h"]:
    """`cache` with `new` at positions `start` on, each row at its own.

    Row by row, because a batched update would be a scatter, which Apple's backends do badly.
    """
    update = jnp.transpose(new, (0, 2, 1, 3)).astype(cache.dtype)
    for row in range(cache.shape[0]):
        cache = lax.dynamic_update_slice(cache, update[row : row + 1], (row, 0, start[row], 0))
    return cache


def write_tokens(history: Int[Array, "b c"], tokens: Int[Array, "b t"], start: Int[Array, " b"]) -> Int[Array, "b c"]:
    """`history` with `tokens` at positions `start` on, each row at its own."""
    for row in range(history.shape[0]):
        history = lax.dynamic_update_slice(history, tokens[row : row + 1], (row, start[row]))
    return history
