"""From logits to the next token: llama.cpp's chain of samplers, inside the compiled step.

The chain runs on the candidates in falling order of their logits. Every setting is a traced value, so
changing one compiles nothing. Letters: b batch, v vocabulary, w its words of 32 bits, n candidates, c positions of
the history.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from irkit.kernels import cpu, xla

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt32

    from irkit.options import SamplingOptions

CANDIDATES = 128
"""Up to this `top_k`, only so many candidates are sorted; beyond it, or without `top_k`, the vocabulary."""


class Settings(NamedTuple):
    """`SamplingOptions` as arrays, one row a sequence."""

    repeat_last_n: Int[Array, " b"]
    repeat_penalty: Float[Array, " b"]
    presence_penalty: Float[Array, " b"]
    frequency_penalty: Float[Array, " b"]
    top_n_sigma: Float[Array, " b"]
    top_k: Int[Array, " b"]
    typical_p: Float[Array, " b"]
    top_p: Float[Array, " b"]
    min_p: Float[Array, " b"]
    xtc_probability: Float[Array, " b"]
    xtc_threshold: Float[Array, " b"]
    temperature: Float[Array, " b"]
    bias: Float[Array, "b v"]
    """`logit_bias`, dense."""
    key: UInt32[Array, "b 2"]
    """The seed; the draw at each position folds the position in, so it does not matter how tokens are
    divided into calls."""


def settings(options: Sequence[SamplingOptions], seeds: Sequence[int], d_vocab: int) -> Settings:
    """The settings of a batch, as numpy arrays; token ids in `logit_bias` must be below `d_vocab`."""
    bias = np.zeros((len(options), d_vocab), np.float32)
    for row, option in enumerate(options):
        for token, value in option.logit_bias.items():
            bias[row, token] = value
    whole = {"repeat_last_n", "top_k"}
    columns = {
        name: np.array([getattr(option, name) for option in options], np.int32 if name in whole else np.float32)
        for name in Settings._fields
        if name not in ("bias", "key")
    }
    key = np.array([[seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF] for seed in seeds], np.uint32)
    return Settings(**columns, bias=bias, key=key)  # pyright: ignore[reportArgumentType]


def everything(rows: int, d_vocab: int) -> np.ndarray:
    """The bits `allowed` of rows in which any token may be drawn: uint32 `[rows, w]`."""
    return np.full((rows, -(-d_vocab // 32)), 0xFFFFFFFF, np.uint32)


def words(ids: Sequence[int], d_vocab: int) -> np.ndarray:
    """The bits `allowed` of one row in which these may be drawn: uint32 `[1, w]`."""
    listed = np.zeros(-(-d_vocab // 32) * 32, np.uint8)
    listed[list(ids)] = 1
    return np.packbits(listed, bitorder="little").view("<u4").astype(np.uint32)[None]


class Sampled(NamedTuple):
    """What one step drew."""

    token: Int[Array, " b"]
    logprob: Float[Array, " b"]
    """Of the token, in the model's own distribution: of all tokens, also those that were not allowed."""
    top: tuple[Int[Array, "b top"], Float[Array, "b top"]]
    """The likeliest tokens and their log-probabilities, likeliest first."""


def sample(
    logits: Float[Array, "b v"],
    history: Int[Array, "b c"],
    length: Int[Array, " b"],
    s: Settings,
    allowed: UInt32[Array, "b w"],
    *,
    top: int,
    kernels: ModuleType = xla,
) -> Sampled:
    """Draw one token a row; `length` says how much of `history` counts, `top` how many likeliest to report.

    Only tokens are drawn whose bit is set in `allowed`, where the first token has the lowest bit of the first word.
    `kernels` is who computes: those for the CPU draw in one call, since a program that holds the chain of samplers
    takes several times as long to load.
    """
    if kernels is cpu:
        token, logprob, normalizer = cpu.sample(logits, history, length, allowed, s)
    else:
        token = draw(logits, history, length, s, allowed)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        logprob = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - normalizer
    if not top:
        none = (*logits.shape[:1], 0)
        return Sampled(token, logprob, (jnp.zeros(none, jnp.int32), jnp.zeros(none)))
    values, ids = kernels.top_k(logits, top)
    return Sampled(token, logprob, (ids, values - normalizer[:, None]))


def draw(
    logits: Float[Array, "b v"],
    history: Int[Array, "b c"],
    length: Int[Array, " b"],
    s: Settings,
    allowed: UInt32[Array, "b w"],
) -> Int[Array, " b"]:
    """The token drawn in each row."""
    processed = penalize(rule_out(logits + s.bias, allowed), history, length, s)
    keys = jax.vmap(jax.random.fold_in)(s.key, length)
    random = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)

    def choose(values: Array, ids: Array) -> Array:
        odds = chain(values, xtc=random[:, 0] < s.xtc_probability, sigma=deviation(processed, s), s=s)
        cumulative = jnp.cumsum(odds, axis=-1)
        passed = cumulative <= random[:, 1:] * cumulative[:, -1:]
        # Rounding may carry the sum past the last token with any odds: stay on it.
        last = jnp.max(jnp.where(odds > 0, jnp.arange(odds.shape[-1]), 0), axis=-1, keepdims=True)
        index = jnp.minimum(jnp.sum(passed, axis=-1, keepdims=True), last)
        return jnp.take_along_axis(ids, index, axis=-1)[:, 0]

    return on_sorted(choose, processed, s)


def rule_out(logits: Float[Array, "b v"], allowed: UInt32[Array, "b w"]) -> Float[Array, "b v"]:
    """The logits, minus infinity where a token is not allowed."""

    def apply(logits: Array) -> Array:
        bits = allowed[..., None] >> jnp.arange(32, dtype=jnp.uint32) & 1
        return jnp.where(bits.reshape(len(logits), -1)[:, : logits.shape[-1]] > 0, logits, -jnp.inf)

    return lax.cond(jnp.all(~allowed == 0), lambda logits: logits, apply, logits)


def deviation(logits: Float[Array, "b v"], s: Settings) -> Float[Array, " b"]:
    """The standard deviation of each row's logits that are not ruled out, where `top_n_sigma` asks for it."""

    def computed(logits: Array) -> Array:
        return jnp.std(logits, axis=-1, where=logits > -jnp.inf)

    return lax.cond(jnp.any(s.top_n_sigma > 0), computed, lambda logits: jnp.zeros(logits.shape[0]), logits)


def on_sorted(function: Callable[[Array, Array], Array], logits: Float[Array, "b v"], s: Settings) -> Array:
    """`function(values, ids)` of the candidates in falling order; equal logits in rising order of their ids."""
    few = min(CANDIDATES, logits.shape[-1])
    # Outside the branch that needs it: within one, XLA on the CPU knows no other way than to sort the whole row.
    top = lax.top_k(logits, few)

    def of_few(logits: Array) -> Array:
        return function(*top)

    def of_all(logits: Array) -> Array:
        ids = jnp.broadcast_to(jnp.arange(logits.shape[-1]), logits.shape)
        negated, ids = lax.sort((-logits, ids), num_keys=1)
        return function(-negated, ids)

    greedy = (s.temperature <= 0) & (s.typical_p >= 1) & (s.xtc_probability <= 0)
    return lax.cond(jnp.all(greedy | ((s.top_k > 0) & (s.top_k <= few))), of_few, of_all, logits)


def penalize(
    logits: Float[Array, "b v"], history: Int[Array, "b c"], length: Int[Array, " b"], s: Settings
) -> Float[Array, "b v"]:
    """The repeat, presence and frequency penalties, over the last `repeat_last_n` tokens."""
    window = jnp.where(s.repeat_last_n < 0, length, s.repeat_last_n)[:, None]
    index = jnp.arange(history.shape[1])
    counted = (index < length[:, None]) & (index >= length[:, None] - window)

    def apply(logits: Array) -> Array:
        rows = jnp.arange(logits.shape[0])[:, None]
        count = jnp.zeros_like(logits).at[rows, history].add(counted.astype(logits.dtype))
        repeat = s.repeat_penalty[:, None]
        lowered = jnp.where(logits <= 0, logits * repeat, logits / repeat)
        lowered = lowered - count * s.frequency_penalty[:, None] - s.presence_penalty[:, None]
        return jnp.where(count > 0, lowered, logits)

    off = (s.repeat_penalty == 1) & (s.presence_penalty == 0) & (s.frequency_penalty == 0)
    return lax.cond(jnp.all(off), lambda logits: logits, apply, logits)


def chain(x: Float[Array, "b n"], *, xtc: Array, sigma: Float[Array, " b"], s: Settings) -> Float[Array, "b n"]:
    """The odds of each candidate after every truncation and the temperature; `x` falls along its rows.

    `xtc` says for each row whether XTC acts this time; `sigma` is the standard deviation of all logits.
    """
    rank = jnp.arange(x.shape[-1])
    s = s._replace(**{f: getattr(s, f)[:, None] for f in Settings._fields if f not in ("bias", "key")})
    keep = x > -jnp.inf
    keep &= (s.top_n_sigma <= 0) | (x >= x[:, :1] - s.top_n_sigma * sigma[:, None])
    keep &= (s.top_k <= 0) | (rank < s.top_k)
    keep = lax.cond(jnp.all(s.typical_p >= 1), lambda keep: keep, lambda keep: typical(x, keep, s.typical_p), keep)

    p = softmax(x, keep)
    before = jnp.cumsum(p, axis=-1) - p
    keep &= (s.top_p >= 1) | (before < s.top_p) | (rank == first(keep))

    largest = jnp.max(jnp.where(keep, x, -jnp.inf), axis=-1, keepdims=True)
    keep &= x >= largest + jnp.log(s.min_p)

    # XTC: of the tokens at or above the threshold, only the least likely stays.
    above = keep & (softmax(x, keep) >= s.xtc_threshold)
    least = jnp.max(jnp.where(above, rank, -1), axis=-1, keepdims=True)
    keep &= ~(xtc[:, None] & (s.xtc_threshold <= 0.5) & above & (rank < least))

    greedy = s.temperature <= 0
    return jnp.where(greedy, rank == first(keep), softmax(x / jnp.where(greedy, 1.0, s.temperature), keep))


def first(keep: Array) -> Array:
    """The index of the first candidate kept, `[b, 1]`."""
    return jnp.argmax(keep, axis=-1, keepdims=True)


def softmax(x: Float[Array, "b n"], keep: Array) -> Float[Array, "b n"]:
    """Probabilities among the candidates kept."""
    return jax.nn.softmax(jnp.where(keep, x, -jnp.inf), axis=-1)


def typical(x: Float[Array, "b n"], keep: Array, mass: Float[Array, "b 1"]) -> Array:
    """Locally typical sampling (Meister et al., arXiv:2202.00666): those whose surprise is nearest the entropy."""
    logprobs = jax.nn.log_softmax(jnp.where(keep, x, -jnp.inf), axis=-1)
    p, surprise = jnp.exp(logprobs), jnp.where(keep, -logprobs, 0)
    entropy = jnp.sum(p * surprise, axis=-1, keepdims=True)
    order = jnp.argsort(jnp.where(keep, jnp.abs(surprise - entropy), jnp.inf), axis=-1, stable=True)
    sorted_p = jnp.take_along_axis(p, order, axis=-1)
    within = jnp.cumsum(sorted_p, axis=-1) - sorted_p <= mass
    return keep & ((mass >= 1) | jnp.take_along_axis(within, jnp.argsort(order, axis=-1), axis=-1))


@cache
def _distribution() -> Callable[..., Array]:
    @jax.jit
    def distribution(logits: Array, history: Array, length: Array, s: Settings, allowed: Array) -> Array:
        processed = penalize(rule_out(logits + s.bias, allowed), history, length, s)
        sigma = deviation(processed, s)
        often = s.xtc_probability[:, None]

        def odds(values: Array, ids: Array) -> Array:
            without, with_xtc = (chain(values, xtc=jnp.full(1, on), sigma=sigma, s=s) for on in (False, True))
            mixed = (1 - often) * without + often * with_xtc
            return jnp.zeros_like(processed).at[jnp.arange(ids.shape[0])[:, None], ids].set(mixed)

        return on_sorted(odds, processed, s)

    return distribution


def sampling_distribution(
    logits: Any, tokens: Sequence[int] = (), allowed: Sequence[int] | None = None, **options: Any
) -> np.ndarray:
    """The probabilities from which the next token would be drawn, exactly.

    Args:
        logits: `[vocab]`, the model's.
        tokens: The ids of the text so far, for the penalties.
        allowed: The ids that may be drawn; any, if it is None.
        options: Any of `irkit.options.SamplingOptions`.

    Returns:
        Float32 probabilities, `[vocab]`. XTC, which acts at random, enters with its probability.

    Raises:
        OptionError: an option is unknown or out of bounds, a token id is not below the number of logits,
            none is allowed, or the logits are not one finite row.
    """
    from irkit.errors import OptionError
    from irkit.options import SamplingOptions, check_logit_bias, parse

    row = np.asarray(logits, np.float32)
    if row.ndim != 1 or not row.size or not np.isfinite(row).all():
        raise OptionError(f"logits: one row of finite numbers is needed, got shape {list(row.shape)}")
    parsed = parse(SamplingOptions, options)
    check_logit_bias(parsed, row.size)
    for name, ids in (("tokens", tokens), ("allowed", () if allowed is None else allowed)):
        if any(not 0 <= token < row.size for token in ids):
            raise OptionError(f"{name}: every id must be from 0 to {row.size - 1}")
    if allowed is not None and not len(allowed):
        raise OptionError("allowed: there is no token to draw")
    bits = everything(1, row.size) if allowed is None else words(allowed, row.size)
    size = 1 << max(len(tokens) - 1, 0).bit_length()  # few sizes, few compilations
    history = np.zeros((1, size), np.int32)
    history[0, : len(tokens)] = tokens
    length = np.array([len(tokens)], np.int32)
    return np.asarray(_distribution()(row[None], history, length, settings([parsed], [0], row.size), bits)[0])
