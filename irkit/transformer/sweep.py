"""Many patched runs at once: the parts of the forward pass of runs that differ from a common one in a single value.

A run that is patched in one layer computes nothing before that layer, and nothing at positions before the patched one:
there it is the common run, whose keys and values it sees. What is left of many such runs is packed into one list of
tokens, for which the matrices are multiplied once.

Letters as in `irkit.transformer.decoder`, and n packed tokens, r runs, t positions of the common run, a alternatives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from irkit import kernels
from irkit.kernels import cpu
from irkit.transformer.config import Config
from irkit.transformer.decoder import Params, affine, heads, layer, mlp, rms_norm, rotary, rotate
from irkit.transformer.taps import Taps, named

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

SEEN = ("attn.hook_rot_k", "attn.hook_v")
KEPT = ("attn.hook_z", "hook_attn_out", "hook_mlp_out")
"""What `common_layer` shows of all texts, and `SEEN` of the common run."""


class Packing(NamedTuple):
    """Where the tokens of the runs stand: indices, so that other runs need no other program."""

    position: Int[Array, " n"]
    entry: Int[Array, " n"]
    """The layer at which the token's run begins to differ."""
    source: Int[Array, " n"]
    """Where `table` holds what the token's stream then is."""
    seen: Int[Array, "r t"]
    """For each position of each run where its key is: among those of the common run, or behind them the packed."""
    query: Int[Array, "r t"]
    """The packed token at that position; any, where the run has none."""
    place: Int[Array, " n"]
    """The token's place among those of all runs, r times t."""
    first: Int[Array, " r"]
    """The packed token that is the run's first; behind `last` for a run that has none."""
    last: Int[Array, " r"]
    """The packed token that is the run's last."""


def embed(matrix: Any, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """The stream that enters the first layer."""
    return kernels.of(matrix).take(matrix, tokens)


def common_layer(
    block: Params, resid: Float[Array, "b t d"], inv_freq: Float[Array, " f"], *, config: Config
) -> tuple[Float[Array, "b t d"], list[Array], dict[str, Array]]:
    """The layer's output for texts read from their start, of which the last is the common run.

    Returns:
        The stream that leaves the layer; the common run's rotated keys, and values, `[t, k, h]`; and what stands at the
        hook points `KEPT`.
    """
    b, t, _ = resid.shape
    positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))
    tap = Taps(named([f"blocks.0.{point}" for point in SEEN + KEPT]))
    tap.layer(0)
    empty = jnp.zeros((b, config.n_kv_heads, t, config.d_head), jnp.float32)
    resid, _ = layer(block, resid, (empty, empty), positions, rotary(positions, inv_freq), config, tap)
    shown = {name.removeprefix("blocks.0."): value for name, value in tap.captures.items()}
    return resid, [shown.pop(name)[-1] for name in SEEN], shown


def with_heads(
    weight: Any, bias: Array | None, resid: Float[Array, "t d"], z: Float[Array, "t H h"], other: Float[Array, "t H h"]
) -> Float[Array, "H t d"]:
    """The stream between attention and MLP where one head's `z` is the `other`, for each head."""
    chosen = jnp.eye(z.shape[1], dtype=bool)[:, None, :, None]
    mixed = jnp.where(chosen, other, z).reshape(z.shape[1], z.shape[0], -1)
    return resid + affine(mixed, {"o": weight, "o_bias": bias}, "o")


def patched_layer(
    block: Params,
    resid: Float[Array, "1 n d"],
    common: tuple[Float[Array, "t k h"], Float[Array, "t k h"]],
    table: Float[Array, "a*t d"],
    index: Int[Array, ""],
    packing: Packing,
    inv_freq: Float[Array, " f"],
    *,
    config: Config,
    enter: Literal["pre", "mid"],
    last: bool,
) -> Float[Array, "1 n d"]:
    """The layer's output for the packed tokens, of which `last` keeps only the last of each run, `[1, r, d]`.

    Args:
        block: The layer's parameters.
        resid: What enters it, of the runs that differ already.
        common: The layer's rotated keys, and values, of the common run.
        table: The streams with which runs begin: `t` of the common run, and as many for each of the alternatives.
        index: The layer's number: runs with this `entry` begin here.
        packing: Where the tokens stand.
        inv_freq: The rotation's frequencies.
        config: The model's shape.
        enter: Whether runs begin at the layer's start or between attention and MLP.
        last: Nothing but the last token's stream is wanted after the model's last layer; keys and values of all are.
    """

    entry, source, its, tap = packing.entry, packing.source, kernels.of(block["o"]), Taps()
    if enter == "pre":
        resid = _begun(resid, table, entry == index, source)
    rotation = rotary(packing.position[None], inv_freq)
    constants = {"eps": config.eps, "scale": config.attention_scale}
    if not last and cpu.can_fuse(block, config.d_head):
        beginning = table, jnp.where((entry == index) & (enter == "mid"), source, -1)
        # Runs that begin in a later layer are still the common one, and are not computed.
        until = jnp.where(entry[packing.last] <= index, packing.last, packing.first - 1)
        where = packing.first, until, packing.position
        return cpu.layer_of_runs(block, resid, common, beginning, *where, rotation, **constants)
    normed = rms_norm(resid, block["ln1"], config.eps, tap, "ln1")
    k = rotate(heads(affine(normed, block, "k"), config.n_kv_heads), *rotation)
    v = heads(affine(normed, block, "v"), config.n_kv_heads)
    r, t = packing.seen.shape
    query, place = packing.query, packing.place
    positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (r, t))
    if last:
        # From here on, a run is its last token.
        chosen = packing.last
        resid, normed, entry, source = resid[:, chosen], normed[:, chosen], entry[chosen], source[chosen]
        rotation = rotation[0][:, chosen], rotation[1][:, chosen]
        query, place, positions = jnp.arange(r)[:, None], jnp.arange(r), packing.position[chosen][:, None]
    q = rotate(heads(affine(normed, block, "q"), config.n_heads), *rotation)
    seen = [
        jnp.swapaxes(jnp.concatenate([held, new[0]])[packing.seen], 1, 2)
        for held, new in zip(common, (k, v), strict=True)
    ]
    z = its.attention(q[0][query], *seen, positions, config.attention_scale)
    z = z.reshape(-1, *z.shape[2:])[place]
    resid = resid + affine(z.reshape(1, z.shape[0], -1), block, "o")
    if enter == "mid":
        resid = _begun(resid, table, entry == index, source)
    return mlp(block, resid, config, tap)


def _begun(
    resid: Float[Array, "1 n d"], table: Float[Array, "a d"], begins: Bool[Array, " n"], source: Int[Array, " n"]
) -> Float[Array, "1 n d"]:
    """The stream, of tokens whose run begins here from the table."""
    # No run begins in most of the layers that a packing goes through.
    return lax.cond(jnp.any(begins), lambda: jnp.where(begins[:, None], table[source], resid), lambda: resid)


def difference(
    ln_final: Float[Array, " d"],
    unembed: Any,
    resid: Float[Array, "1 r d"],
    tokens: Int[Array, "1 2"],
    *,
    config: Config,
) -> Float[Array, " r"]:
    """How much larger the first token's logit is than the second's: two rows of the unembedding are enough."""
    normed = rms_norm(resid, ln_final, config.eps, Taps(), "ln_final")
    rows = kernels.of(unembed).take(unembed, tokens)[0]
    return jnp.sum(normed[0] * (rows[0] - rows[1]), axis=-1)


def logits(
    ln_final: Float[Array, " d"], unembed: Any, resid: Float[Array, "1 r d"], *, config: Config
) -> Float[Array, "r v"]:
    """The logits of every run."""
    normed = rms_norm(resid, ln_final, config.eps, Taps(), "ln_final")
    return kernels.of(unembed).linear(normed, unembed)[0]
