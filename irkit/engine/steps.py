"""The programs that the engine compiles: each reads some tokens into the cache and says something of them.

Letters: b batch, t tokens of the call, v vocabulary. In all of them `tokens` `[b, t]` stand at positions
`start` `[b]` and after; the first `count` `[b]` of them count, the rest is padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array, lax

from irkit import kernels
from irkit.transformer.decoder import Params, forward
from irkit.transformer.sampling import Sampled, Settings, sample

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from irkit.transformer.cache import KVCache
    from irkit.transformer.config import Config

TOP = 20
"""Likeliest tokens reported where any are asked for: one program for every number of them."""


def read(
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "b t"],
    start: Int[Array, " b"],
    count: Int[Array, " b"],
    *,
    config: Config,
) -> tuple[KVCache, Float[Array, "b v"]]:
    """The logits after the last token that counts."""
    where = positions(tokens, start)
    logits, cache, _ = forward(params, tokens, where, cache, config=config, count=count, only_last=True)
    return cache, logits[:, 0]


def read_and_sample(
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "b t"],
    start: Int[Array, " b"],
    count: Int[Array, " b"],
    settings: Settings,
    *,
    config: Config,
    top: int,
) -> tuple[KVCache, Sampled]:
    """The token drawn after the last one that counts."""
    cache, logits = read(params, cache, tokens, start, count, config=config)
    its = kernels.of(params["embed"])
    return cache, sample(logits, cache.tokens, start + count, settings, top=top, kernels=its)


def decode(
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "b 1"],
    start: Int[Array, " b"],
    settings: Settings,
    *,
    config: Config,
    top: int,
    steps: int,
) -> tuple[KVCache, Sampled]:
    """`steps` tokens, each drawn and then read in turn: they are the first axis of what was drawn."""

    def step(state: tuple[KVCache, Array, Array], _: None) -> tuple[tuple[KVCache, Array, Array], Sampled]:
        cache, tokens, start = state
        one = jnp.ones_like(start)
        cache, sampled = read_and_sample(params, cache, tokens, start, one, settings, config=config, top=top)
        return (cache, sampled.token[:, None], start + 1), sampled

    (cache, *_), drawn = lax.scan(step, (cache, tokens, start), None, length=steps)
    return cache, drawn


def score(
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "b t"],
    start: Int[Array, " b"],
    count: Int[Array, " b"],
    targets: Int[Array, "b t"],
    *,
    config: Config,
    top: int,
) -> tuple[KVCache, Float[Array, "b t"], tuple[Int[Array, "b t top"], Float[Array, "b t top"]]]:
    """The log-probability of each of `targets` after the token at its index, and the likeliest there."""
    logits, cache, _ = forward(params, tokens, positions(tokens, start), cache, config=config, count=count)
    normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    values, ids = lax.top_k(logits, min(top, logits.shape[-1]))
    logprob = jnp.take_along_axis(logits, targets[..., None], axis=-1) - normalizer
    return cache, logprob[..., 0], (ids, values - normalizer)


def pool(
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "b t"],
    start: Int[Array, " b"],
    count: Int[Array, " b"],
    *,
    config: Config,
) -> tuple[KVCache, Float[Array, "b d"], Float[Array, "b d"]]:
    """The sum over the tokens that count of their final normed hidden states, and the last of these."""
    name = "ln_final.hook_normalized"
    where = positions(tokens, start)
    _, cache, captures = forward(params, tokens, where, cache, config=config, spec=(name,), count=count)
    hidden = captures[name] * params["ln_final"]
    index = jnp.arange(tokens.shape[1])
    total = jnp.sum(jnp.where((index < count[:, None])[..., None], hidden, 0), axis=1)
    last = jnp.sum(jnp.where((index == count[:, None] - 1)[..., None], hidden, 0), axis=1)
    return cache, total, last


def positions(tokens: Int[Array, "b t"], start: Int[Array, " b"]) -> Int[Array, "b t"]:
    """Where each token stands."""
    return start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
