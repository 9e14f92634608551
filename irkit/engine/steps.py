"""The programs that the engine compiles: each reads some tokens into the cache and says something of them.

Letters: b batch, t tokens of the call, v vocabulary, w its words of 32 bits. In all of them `tokens` `[b, t]` stand
at positions `start` `[b]` and after; the first `count` `[b]` of them count, the rest is padding. `spec` and `operands`
say what is captured and edited (`irkit.transformer.taps`), `allowed` `[b, w]` which tokens may be drawn
(`irkit.transformer.sampling`).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from irkit import kernels
from irkit.transformer.decoder import Params, forward, rotary, rotate
from irkit.transformer.sampling import Sampled, Settings, sample
from irkit.transformer.taps import Capture, Operands, Spec

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt32

    from irkit.transformer.cache import KVCache
    from irkit.transformer.config import Config

Logits = Literal["all", "last", "none"]
TOP = 20
"""Likeliest tokens reported where any are asked for: one program for every number of them."""


def read(
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "b t"],
    start: Int[Array, " b"],
    count: Int[Array, " b"],
    operands: Operands,
    *,
    config: Config,
    spec: Spec,
) -> tuple[KVCache, Float[Array, "b v"], dict[str, Any]]:
    """The logits after the last token that counts, and what was captured."""
    where = positions(tokens, start)
    taps = {"spec": spec, "operands": operands}
    logits, cache, captures = forward(params, tokens, where, cache, config=config, count=count, only_last=True, **taps)
    return cache, logits[:, 0], captures


def read_and_sample(
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "b t"],
    start: Int[Array, " b"],
    count: Int[Array, " b"],
    settings: Settings,
    allowed: UInt32[Array, "b w"],
    operands: Operands,
    *,
    config: Config,
    spec: Spec,
    top: int,
) -> tuple[KVCache, Sampled, dict[str, Any]]:
    """The token drawn after the last one that counts, and what was captured."""
    cache, logits, captures = read(params, cache, tokens, start, count, operands, config=config, spec=spec)
    its = kernels.of(params["embed"])
    return cache, sample(logits, cache.tokens, start + count, settings, allowed, top=top, kernels=its), captures


def decode(
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "b 1"],
    start: Int[Array, " b"],
    count: Int[Array, ""],
    settings: Settings,
    allowed: UInt32[Array, "b w"],
    operands: Operands,
    *,
    config: Config,
    spec: Spec,
    top: int,
    steps: int,
) -> tuple[KVCache, Sampled, dict[str, Any]]:
    """`count` tokens, at most `steps`, each drawn and then read in turn: they are the first of the first axis of what
    was drawn and captured, whose rest has no meaning."""

    @partial(jax.jit, inline=True)  # traced once, although its results' shapes are asked for before it is used
    def step(cache: KVCache, tokens: Array, start: Array) -> tuple[KVCache, Sampled, dict[str, Any]]:
        one = jnp.ones_like(start)
        rest = {"config": config, "spec": spec, "top": top}
        return read_and_sample(params, cache, tokens, start, one, settings, allowed, operands, **rest)

    if steps == 1:
        cache, *new = step(cache, tokens, start)
        return cache, *jax.tree.map(lambda one: one[None], new)

    def go_on(index: Array, state: tuple[KVCache, Array, Array, Any]) -> tuple[KVCache, Array, Array, Any]:
        cache, tokens, start, made = state
        cache, *new = step(cache, tokens, start)
        made = jax.tree.map(lambda all, one: lax.dynamic_update_index_in_dim(all, one, index, 0), made, new)
        return cache, new[0].token[:, None], start + 1, made

    _, *shapes = jax.eval_shape(step, cache, tokens, start)
    made = jax.tree.map(lambda shape: jnp.zeros((steps, *shape.shape), shape.dtype), shapes)
    cache, _, _, (drawn, captures) = lax.fori_loop(0, count, go_on, (cache, tokens, start, made))
    return cache, drawn, captures


def trace(
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "b t"],
    start: Int[Array, " b"],
    count: Int[Array, " b"],
    operands: Operands,
    *,
    config: Config,
    spec: Spec,
    logits: Logits,
) -> tuple[KVCache, Float[Array, "b t v"] | None, dict[str, Any]]:
    """What was captured, and the logits after every token, after the last one that counts, or none."""
    where, last = positions(tokens, start), logits != "all"
    taps = {"spec": spec, "operands": operands}
    found, cache, captures = forward(params, tokens, where, cache, config=config, count=count, only_last=last, **taps)
    return cache, None if logits == "none" else found, captures


def score(
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "b t"],
    start: Int[Array, " b"],
    count: Int[Array, " b"],
    targets: Int[Array, "b t"],
    operands: Operands,
    *,
    config: Config,
    spec: Spec,
    top: int,
) -> tuple[KVCache, Float[Array, "b t"], tuple[Int[Array, "b t top"], Float[Array, "b t top"]]]:
    """The log-probability of each of `targets` after the token at its index, and the likeliest there."""
    where, taps = positions(tokens, start), {"spec": spec, "operands": operands}
    logits, cache, _ = forward(params, tokens, where, cache, config=config, count=count, **taps)
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
    operands: Operands,
    *,
    config: Config,
    spec: Spec,
) -> tuple[KVCache, Float[Array, "b d"], Float[Array, "b d"]]:
    """The sum over the tokens that count of their final normed hidden states, and the last of these."""
    name = "ln_final.hook_normalized"
    where, taps = positions(tokens, start), {"spec": Spec((Capture(name),), spec.edits), "operands": operands}
    _, cache, captures = forward(params, tokens, where, cache, config=config, count=count, **taps)
    hidden = captures[name] * params["ln_final"]
    index = jnp.arange(tokens.shape[1])
    total = jnp.sum(jnp.where((index < count[:, None])[..., None], hidden, 0), axis=1)
    last = jnp.sum(jnp.where((index == count[:, None] - 1)[..., None], hidden, 0), axis=1)
    return cache, total, last


def moved(
    keys: Float[Array, "b k c h"],
    values: Float[Array, "b k c h"],
    inv_freq: Float[Array, " r"],
    origin: Int[Array, " c"],
) -> tuple[Float[Array, "b k c h"], Float[Array, "b k c h"]]:
    """A layer's keys and values with those of position `origin[i]` at `i`; keys are turned as if they had been read
    there.

    Rotations add up (RoPE, arXiv:2104.09864): a key moved by n positions is rotated by n times each frequency.
    """
    taken = jnp.take(keys, origin, axis=2, mode="clip").astype(jnp.float32)
    by = jnp.arange(len(origin), dtype=jnp.int32) - origin
    turned = rotate(jnp.swapaxes(taken, 1, 2), *rotary(by[None], inv_freq))
    return jnp.swapaxes(turned, 1, 2).astype(keys.dtype), jnp.take(values, origin, axis=2, mode="clip")


def positions(tokens: Int[Array, "b t"], start: Int[Array, " b"]) -> Int[Array, "b t"]:
    """Where each token stands."""
    return start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
