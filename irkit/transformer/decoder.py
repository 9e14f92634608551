"""The forward pass of the Llama family, from token ids to logits: read it downward.

Letters in shapes: b batch, t positions of this call, v vocabulary, d d_model, H query heads, K key/value
heads, h d_head, m d_mlp.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from irkit import kernels
from irkit.kernels import cpu
from irkit.transformer.cache import KVCache, write, write_tokens
from irkit.transformer.config import Config
from irkit.transformer.taps import Operands, Spec, Taps, named, split

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Params = dict[str, Any]
"""`embed` [v, d], `unembed` [v, d] or None where tied to `embed`, `ln_final` [d], `inv_freq` [rotary_dim/2],
and `blocks`, a dict for each layer. Matrices are [out, in], arrays or `irkit.kernels.cpu.Packed`; biases are None
where the model has none."""

_PATTERN = "attn.hook_pattern"
_SHOWN = frozenset(cpu.POINTS) | {_PATTERN}
"""What can be captured of a layer that one kernel computes."""
_OF_MLP = cpu.POINTS[cpu.POINTS.index("ln2.hook_scale") :]
"""What a layer's second half shows on its way."""


def forward(
    params: Params,
    tokens: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    cache: KVCache,
    *,
    config: Config,
    spec: Spec | Collection[str] = (),
    operands: Operands = Operands(),  # noqa: B008
    count: Int[Array, " b"] | None = None,
    only_last: bool = False,
) -> tuple[Float[Array, "b t v"], KVCache, dict[str, Any]]:
    """Read `tokens` at consecutive `positions`, after what `cache` holds before them.

    Args:
        params: The weights.
        tokens: Token ids. Padding at the end of a row does no harm: nothing before it sees it, and what
            it leaves in the cache is overwritten by the tokens that come to its positions.
        positions: Where the tokens stand, consecutive in each row; `positions[:, 0] + t` must not pass
            the cache's capacity.
        cache: Donate it when jitting: the result holds its successor.
        config: The model's shape.
        spec: What to capture and to edit, or just the full names of the hook points to capture whole
            (`irkit.transformer.taps`).
        operands: The arrays that belong to `spec`.
        count: How many tokens of each row count, the rest being padding; all, if not given. What is returned for
            the padding has no meaning.
        only_last: Compute the logits after the last token that counts only; t is 1 in them.

    Returns:
        Float32 logits, the cache with these tokens in it, and the captured values (`Taps.captures`).
    """
    spec = spec if isinstance(spec, Spec) else named(spec)
    start = positions[:, 0]
    rotation = rotary(positions, params["inv_freq"])
    if count is None:
        count = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
    tap = Taps(spec, operands, start, count)
    resid = tap("hook_embed", kernels.of(params["embed"]).take(params["embed"], tokens))
    keys, values = [], []
    for index, block in enumerate(params["blocks"]):
        tap.layer(index)
        old = cache.keys[index], cache.values[index]
        resid = tap("hook_resid_pre", resid)
        if cpu.can_fuse(block, config.d_head) and not tap.edits_inside() and tap.captured_inside() <= _SHOWN:
            resid, new = fused_layer(block, resid, old, positions, count, rotation, config, tap)
        else:
            resid, new = layer(block, resid, old, positions, rotation, config, tap)
        resid = tap("hook_resid_post", resid)
        keys.append(new[0])
        values.append(new[1])
    tap.layer(None)
    normed_at = None
    if only_last:
        normed_at = count - 1
        if not (tap.wants("ln_final.hook_scale") or tap.wants("ln_final.hook_normalized")):
            resid, normed_at = at(resid, normed_at), None  # nobody looks at the norm of the others
    logits = to_logits(params, resid, config, tap, normed_at)
    captures = lenses(params, config, spec, tap.captures)
    if spec.stacked:
        captures = stacked(captures)
    return logits, KVCache(keys, values, write_tokens(cache.tokens, tokens, start)), captures


def to_logits(
    params: Params, resid: Float[Array, "b t d"], config: Config, tap: Taps, index: Int[Array, " b"] | None = None
) -> Float[Array, "b t v"]:
    """The final norm, and the unembedding: of every position, or of one in each row."""
    normed = rms_norm(resid, params["ln_final"], config.eps, tap, "ln_final")
    normed = normed if index is None else at(normed, index)
    unembed = params["unembed"] if params["unembed"] is not None else params["embed"]
    return kernels.of(unembed).linear(normed, unembed)


def at(x: Float[Array, "b t d"], index: Int[Array, " b"]) -> Float[Array, "b 1 d"]:
    """One position of each row; row by row, because a batched slice would be a gather."""
    rows = [lax.dynamic_slice_in_dim(x[row : row + 1], index[row], 1, axis=1) for row in range(x.shape[0])]
    return jnp.concatenate(rows)


def lenses(params: Params, config: Config, spec: Spec, captures: dict[str, Any]) -> dict[str, Any]:
    """The captures, those with a lens seen through it: log-probabilities and ids of the likeliest next tokens.

    The logit lens (nostalgebraist 2020) reads a stream as if it were the last layer's. All streams are read in one
    product, since it takes the whole unembedding.
    """
    for capture in spec.captures:
        mine = [name for name in captures if split(name)[0] == capture.point]
        if capture.reduce != "lens" or not mine:
            continue
        streams = [captures[name] for name in mine]
        rows = jnp.concatenate([stream.reshape(-1, 1, config.d_model) for stream in streams])
        logits = to_logits(params, rows.reshape(1, -1, config.d_model), config, Taps())[0]
        values, ids = kernels.of(params["embed"]).top_k(logits, min(capture.k, logits.shape[-1]))
        values = values - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        done = 0
        for name, stream in zip(mine, streams, strict=True):
            shape, size = (*stream.shape[:-1], values.shape[-1]), stream.size // config.d_model
            captures[name] = tuple(part[done : done + size].reshape(shape) for part in (values, ids))
            done += size
    return captures


def stacked(captures: dict[str, Any]) -> dict[str, Any]:
    """Captures by full name as captures by hook point, with a first axis of the layers."""
    by_point: dict[str, list[Any]] = {}
    for name in list(captures):
        point, index = split(name)
        if index is not None:
            by_point.setdefault(point, []).append(captures.pop(name))
    return captures | {point: jax.tree.map(lambda *each: jnp.stack(each), *rows) for point, rows in by_point.items()}


def layer(
    block: Params,
    resid: Float[Array, "b t d"],
    cached: tuple[Array, Array],
    positions: Int[Array, "b t"],
    rotation: tuple[Array, Array],
    config: Config,
    tap: Taps,
) -> tuple[Float[Array, "b t d"], tuple[Array, Array]]:
    """One block: attention and MLP, each behind a norm, each added to the residual stream."""
    normed = rms_norm(resid, block["ln1"], config.eps, tap, "ln1")
    q = tap("attn.hook_q", heads(affine(normed, block, "q"), config.n_heads))
    k = tap("attn.hook_k", heads(affine(normed, block, "k"), config.n_kv_heads))
    v = tap("attn.hook_v", heads(affine(normed, block, "v"), config.n_kv_heads))
    q = tap("attn.hook_rot_q", rotate(q, *rotation))
    k = tap("attn.hook_rot_k", rotate(k, *rotation))
    cached = write(cached[0], k, positions[:, 0]), write(cached[1], v, positions[:, 0])
    its = kernels.of(block["o"])
    looked_at = tap.wants("attn.hook_attn_scores") or tap.wants(_PATTERN)
    z = its.attention(q, *cached, positions, config.attention_scale, tap if looked_at else None)
    z = tap("attn.hook_z", z)
    result = tap("attn.hook_result", its.by_head(z, block["o"])) if tap.wants("attn.hook_result") else None
    if result is not None and tap.edited("attn.hook_result"):
        bias = block["o_bias"]
        out = jnp.sum(result, axis=2) + (0 if bias is None else bias)
    else:
        out = affine(z.reshape(*z.shape[:2], -1), block, "o")
    attn_out = tap("hook_attn_out", out)
    resid = tap("hook_resid_mid", resid + attn_out)
    return mlp(block, resid, config, tap), cached


def mlp(block: Params, resid: Float[Array, "b t d"], config: Config, tap: Taps) -> Float[Array, "b t d"]:
    """The stream, and what the block's MLP adds to it, behind its norm."""
    if not any(tap.wants(point) for point in _OF_MLP) and cpu.can_fuse(block, config.d_head):
        return cpu.mlp(block, resid, eps=config.eps)
    normed = rms_norm(resid, block["ln2"], config.eps, tap, "ln2")
    gate = tap("mlp.hook_pre", affine(normed, block, "gate"))
    up = tap("mlp.hook_pre_linear", affine(normed, block, "up"))
    return resid + tap("hook_mlp_out", affine(tap("mlp.hook_post", silu(gate) * up), block, "down"))


def fused_layer(
    block: Params,
    resid: Float[Array, "b t d"],
    cached: tuple[Array, Array],
    positions: Int[Array, "b t"],
    count: Int[Array, " b"],
    rotation: tuple[Array, Array],
    config: Config,
    tap: Taps,
) -> tuple[Float[Array, "b t d"], tuple[Array, Array]]:
    """`layer` in one call of a kernel, which shows what is captured of it as far as it is in `_SHOWN`."""
    wanted = tap.captured_inside()
    if _PATTERN in wanted:  # it follows from the queries
        wanted = wanted - {_PATTERN} | {"attn.hook_rot_q"}
    shown = [point for point in cpu.POINTS if point in wanted]
    constants = {"eps": config.eps, "scale": config.attention_scale}
    start = positions[:, 0]
    resid, cached, values = cpu.layer(block, resid, cached, start, count, rotation, **constants, shown=shown)
    for point, value in values.items():
        tap(point, value)
    if tap.wants(_PATTERN):
        tap.beside(_PATTERN, partial(pattern, values["attn.hook_rot_q"], cached[0], positions, config.attention_scale))
    return resid, cached


def pattern(
    q: Float[Array, "b t H h"],
    keys: Float[Array, "b K c h"],
    positions: Int[Array, "b t"],
    scale: float,
    chosen: Int[Array, " n"] | None,
) -> Float[Array, "b H t c"]:
    """A layer's attention pattern; `chosen` are the queries to compute it of, counted from the call's first, or all."""
    if chosen is not None:
        q, positions = (jnp.take(x, chosen, axis=1, mode="clip") for x in (q, positions))
    return cpu.pattern(q, keys, positions, scale)


def affine(x: Float[Array, "b t i"], block: Params, name: str) -> Float[Array, "b t o"]:
    """A matrix of the block, with its bias where the model has one."""
    y = kernels.of(block[name]).linear(x, block[name])
    bias = block[f"{name}_bias"]
    return y if bias is None else y + bias


def heads(x: Float[Array, "b t n*h"], count: int) -> Float[Array, "b t n h"]:
    """The last axis split into heads."""
    return x.reshape(*x.shape[:2], count, -1)


def rms_norm(
    x: Float[Array, "b t d"], weight: Float[Array, " d"], eps: float, tap: Taps, name: str
) -> Float[Array, "b t d"]:
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467): x / sqrt(mean(x^2) + eps) * weight."""
    scale = tap(f"{name}.hook_scale", jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps))
    return tap(f"{name}.hook_normalized", x / scale) * weight


def silu(x: Array) -> Array:
    """x * sigmoid(x), written out because Apple's older backend has no logistic."""
    return x / (1.0 + jnp.exp(-x))


def rotary(positions: Int[Array, "b t"], inv_freq: Float[Array, " r"]) -> tuple[Array, Array]:
    """Cosine and sine, `[b, t, 1, r]`, of each position times each frequency (RoPE, arXiv:2104.09864)."""
    angle = positions[..., None, None].astype(jnp.float32) * inv_freq
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "b t n h"], cos: Array, sin: Array) -> Float[Array, "b t n h"]:
    """`x` with its first 2r dimensions rotated, dimension i paired with i + r: Hugging Face's convention."""
    r = cos.shape[-1]
    first, second, rest = x[..., :r], x[..., r : 2 * r], x[..., 2 * r :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
