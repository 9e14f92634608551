"""What analysis reads off the model on the device, so that only small numbers leave it.

Letters: n positions, l layers, d d_model, k tokens; b batch, t tokens of the call, c cache positions, H heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from irkit import kernels
from irkit.transformer.decoder import Params, forward, to_logits
from irkit.transformer.taps import Operands, Spec, Taps

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from irkit.transformer.cache import KVCache
    from irkit.transformer.config import Config


class Reading(NamedTuple):
    """What `lens` says of each stream."""

    ids: Int[Array, "n l k"]
    """The likeliest next tokens, likeliest first."""
    logprobs: Float[Array, "n l k"]
    kl: Float[Array, "n l"]
    """From the distribution of the position's last stream, in nats."""
    ranks: Int[Array, "n l"]
    """How many tokens are likelier than the one asked for."""
    of_token: Float[Array, "n l"]
    """Its log-probability."""
    entropy: Float[Array, "n l"]
    """Of the whole distribution, in nats."""


def lens(
    params: Params, streams: Float[Array, "n l d"], tokens: Int[Array, " n"], *, config: Config, k: int
) -> Reading:
    """Read residual streams as if each were the last layer's: the logit lens (nostalgebraist 2020).

    The last stream of a position must be the one that leaves the last layer. `tokens` are those to rank; -1 stands
    for the likeliest at the end.
    """
    n, layers, _ = streams.shape
    logits = to_logits(params, streams.reshape(1, n * layers, -1), config, Taps())[0]
    its = kernels.of(params["embed"])
    k = min(k, logits.shape[-1])
    normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    values, likeliest = its.top_k(logits, k)
    ids = likeliest.reshape(n, layers, k)
    logprobs = (logits - normalizer).reshape(n, layers, -1)
    final = logprobs[:, -1:]
    kl = jnp.sum(jnp.exp(final) * (final - logprobs), axis=-1)
    tokens = jnp.where(tokens < 0, ids[:, -1, 0], tokens)
    is_it = jnp.arange(logprobs.shape[-1]) == tokens[:, None, None]
    of_token = jnp.sum(jnp.where(is_it, logprobs, 0), axis=-1)
    ranks = jnp.sum(logprobs > of_token[..., None], axis=-1, dtype=jnp.int32)
    entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
    return Reading(ids, (values - normalizer).reshape(n, layers, k), jnp.maximum(kl, 0), ranks, of_token, entropy)


def pattern_sums(
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "b t"],
    start: Int[Array, " b"],
    count: Int[Array, " b"],
    weighing: tuple[Float[Array, "w t c"], Operands],
    *,
    config: Config,
    spec: Spec,
) -> tuple[KVCache, Float[Array, "w l H"]]:
    """Each head's pattern times each weight of `weighing`, summed over texts, queries and keys.

    `spec` captures the pattern of every layer; each is gone as soon as it is summed.
    """
    weights, operands = weighing
    where = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    taps: dict[str, Any] = {"spec": spec, "operands": operands, "count": count, "only_last": True}
    _, cache, captures = forward(params, tokens, where, cache, config=config, **taps)
    patterns = [captures[f"blocks.{layer}.attn.hook_pattern"] for layer in range(config.n_layers)]
    sums = [jnp.einsum("bhtc,wtc->wh", pattern, weights, precision=lax.Precision.HIGHEST) for pattern in patterns]
    return cache, jnp.stack(sums, axis=1)


class Divergence(NamedTuple):
    """How far the distributions of one model are from those of another, row by row."""

    kl: Float[Array, " n"]
    """From the first to the second, in nats."""
    ids: Int[Array, "n 2"]
    """The likeliest token of each of the two."""
    logprobs: Float[Array, "n 2"]
    """Its log-probability there."""


def lens_logprobs(params: Params, streams: Float[Array, "n d"], *, config: Config) -> Float[Array, "n v"]:
    """The log-probability of every next token, if each stream were the one that leaves the last layer."""
    logits = to_logits(params, streams[None], config, Taps())[0]
    return logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def divergence(first: Float[Array, "n v"], second: Float[Array, "n v"]) -> Divergence:
    """Compare log-probabilities: the sum of p ln(p/q), and the likeliest tokens."""
    kl = jnp.sum(jnp.exp(first) * (first - second), axis=-1)
    both = jnp.stack([first, second], axis=1)
    return Divergence(jnp.maximum(kl, 0), jnp.argmax(both, axis=-1), jnp.max(both, axis=-1))
