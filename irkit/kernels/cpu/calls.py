"""The CPU kernels as jax functions: custom calls into the library, inside the one compiled program.

Activations are quantized to int8 in blocks of 16 on the way into a product with a coded form (`FORMS`); the sums
are float32. Letters as in `irkit.kernels.xla`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from irkit.kernels import xla
from irkit.kernels.cpu import library
from irkit.kernels.cpu.packing import FORMS, packed_bytes

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt32

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
"""A block's matrices, in the order in which the layer's kernel takes them."""
POINTS = (
    *("ln1.hook_scale", "ln1.hook_normalized", "attn.hook_q", "attn.hook_k", "attn.hook_v"),
    *("attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_z", "hook_attn_out", "hook_resid_mid"),
    *("ln2.hook_scale", "ln2.hook_normalized", "mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post", "hook_mlp_out"),
)
"""The hook points that `layer` can show, in the order of their numbers in src/layer.h."""


@partial(jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["form", "shape", "start"])
@dataclass(frozen=True)
class Packed:
    """A matrix `[out, in]` in one of the forms that the kernels read."""

    data: Any
    """uint8 `[bytes]`, laid out as src/forms.h says; None in a tree that `Joined` holds."""
    form: str
    shape: tuple[int, int]
    start: int = 0
    """Where in `data` it begins: a multiple of 64."""

    @property
    def stop(self) -> int:
        """Where it ends."""
        return self.start + packed_bytes(self.form, self.shape)

    @property
    def attributes(self) -> dict[str, Any]:
        """What a kernel must be told of it."""
        numbers = {"start": self.start, "form": FORMS.index(self.form), "rows": self.shape[0]}
        return {name: np.int64(number) for name, number in numbers.items()}


@jax.tree_util.register_pytree_node_class
class Joined(dict[str, Any]):
    """Parameters whose packed matrices all lie in one array.

    To jax that is one array, where it would be hundreds: what a call of a compiled program costs is a matter of how
    many it takes.
    """

    def __init__(self, data: Any, apart: dict[str, Any]) -> None:
        """`apart` are the parameters, the `data` of every `Packed` among them left out."""
        leaves, self._tree = jax.tree.flatten(apart)
        self._leaves = data, *leaves

        def whole(leaf: Any) -> Any:
            return replace(leaf, data=data) if isinstance(leaf, Packed) else leaf

        super().__init__(jax.tree.map(whole, apart, is_leaf=lambda leaf: isinstance(leaf, Packed)))

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        """What jax asks for: the arrays, and how they are arranged."""
        return self._leaves, self._tree

    @classmethod
    def tree_unflatten(cls, tree: Any, leaves: Sequence[Any]) -> Joined:
        """And how to put it together again."""
        return cls(leaves[0], jax.tree.unflatten(tree, leaves[1:]))


def take(matrix: Packed, ids: Int[Array, "b t"]) -> Float[Array, "b t i"]:
    """The rows `ids` of a packed matrix, in float32; ids outside it are clipped to it."""
    result = jax.ShapeDtypeStruct((*ids.shape, matrix.shape[1]), jnp.float32)
    return jax.ffi.ffi_call("irkit_take", result)(matrix.data, ids, **matrix.attributes)


def unpacked(params: Any) -> Any:
    """The parameters with float32 arrays in the place of packed matrices."""

    def array(leaf: Any) -> Any:
        return take(leaf, jnp.arange(leaf.shape[0])[None])[0] if isinstance(leaf, Packed) else leaf

    return jax.tree.map(array, dict(params), is_leaf=lambda leaf: isinstance(leaf, Packed))


def linear(x: Float[Array, "b t i"], matrix: Packed) -> Float[Array, "b t o"]:
    """`x` times the transposed packed matrix."""
    rows = int(np.prod(x.shape[:-1]))
    results = (
        jax.ShapeDtypeStruct((*x.shape[:-1], matrix.shape[0]), jnp.float32),
        _scratch("irkit_linear_scratch", rows, matrix.shape[1]),
    )
    return jax.ffi.ffi_call("irkit_linear", results)(x, matrix.data, **matrix.attributes)[0]


def by_head(z: Float[Array, "b t n h"], matrix: Packed) -> Float[Array, "b t n o"]:
    """`linear` of one head's values at a time: what each of n heads adds to the stream."""
    alone = z[..., :, None, :] * jnp.eye(z.shape[2])[:, :, None]  # [b, t, n, n, h], zero but for the head's own
    return linear(alone.reshape(*z.shape[:3], -1), matrix)


def attention(
    q: Float[Array, "b t k*g h"],
    keys: Float[Array, "b k c h"],
    values: Float[Array, "b k c h"],
    positions: Int[Array, "b t"],
    scale: float,
    tap: Callable[[str, Array], Array] | None = None,
) -> Float[Array, "b t k*g h"]:
    """As `irkit.kernels.xla.attention`, which it hands over to where `tap` is to see scores and probabilities."""
    if tap is not None or q.shape[-1] % 16:
        wide = keys.astype(jnp.float32), values.astype(jnp.float32)
        return xla.attention(q, *wide, positions, scale, tap)
    b, t, heads, h = q.shape
    results = (
        jax.ShapeDtypeStruct(q.shape, jnp.float32),
        _scratch("irkit_attention_scratch", b, t, heads, keys.shape[1], h, keys.shape[2]),
    )
    count = jnp.full(b, t, jnp.int32)
    call = jax.ffi.ffi_call("irkit_attention", results)
    return call(q, keys, values, positions[:, 0], count, scale=np.float32(scale))[0]


def pattern(
    q: Float[Array, "b t k*g h"], keys: Float[Array, "b k c h"], positions: Int[Array, "b t"], scale: float
) -> Float[Array, "b k*g t c"]:
    """As `irkit.kernels.xla.pattern`, with no key read that no query sees."""
    if q.shape[-1] % 16:
        return xla.pattern(q, keys.astype(jnp.float32), positions, scale)
    b, t, heads, _ = q.shape
    result = jax.ShapeDtypeStruct((b, heads, t, keys.shape[2]), jnp.float32)
    return jax.ffi.ffi_call("irkit_pattern", result)(q, keys, positions, scale=np.float32(scale))


def top_k(x: Float[Array, "b v"], k: int) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """As `jax.lax.top_k`."""
    shape = (*x.shape[:-1], k)
    results = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)
    values, ids = jax.ffi.ffi_call("irkit_top_k", results)(x)
    return values, ids


def sample(
    logits: Float[Array, "b v"],
    history: Int[Array, "b c"],
    length: Int[Array, " b"],
    allowed: UInt32[Array, "b w"],
    settings: Sequence[Array],
) -> tuple[Int[Array, " b"], Float[Array, " b"], Float[Array, " b"]]:
    """The token drawn after each row, its log-probability, and the logarithm of the sum of the row's exponentials.

    Draws as `irkit.transformer.sampling.draw` does, with the same random numbers, from probabilities that differ by
    rounding only; `allowed` are its bits, `settings` its `Settings`.
    """
    rows = logits.shape[:1]
    results = [jax.ShapeDtypeStruct(rows, dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32)]
    token, logprob, normalizer = jax.ffi.ffi_call("irkit_sample", results)(logits, history, length, allowed, *settings)
    return token, logprob, normalizer


def can_fuse(block: dict[str, Any], d_head: int) -> bool:
    """Whether `layer` can compute this block."""
    return d_head % 16 == 0 and all(isinstance(block[name], Packed) for name in MATRICES)


def layer(
    block: dict[str, Any],
    resid: Float[Array, "b t d"],
    cached: tuple[Array, Array],
    start: Int[Array, " b"],
    count: Int[Array, " b"],
    rotation: tuple[Array, Array],
    *,
    eps: float,
    scale: float,
    shown: Sequence[str] = (),
) -> tuple[Float[Array, "b t d"], tuple[Array, Array], dict[str, Array]]:
    """A whole block in one call: what `irkit.transformer.decoder.layer` computes, with the cache written in place.

    What is shown on the way changes no bit of the result; it is returned by hook point.

    Args:
        block: The block's parameters, its matrices packed.
        resid: The residual stream.
        cached: Keys and values, `[b, k, c, h]`, float32 or float16.
        start: Where the tokens stand.
        count: How many tokens of each row count; what is returned for the others has no meaning.
        rotation: Cosine and sine, `[b, t, 1, r]`.
        eps: Of both norms.
        scale: Multiplies the attention scores.
        shown: What to show on the way: some of `POINTS`.
    """
    b, t, d_model = resid.shape
    _, n_kv_heads, capacity, d_head = cached[0].shape
    n_heads, d_mlp = block["q"].shape[0] // d_head, block["gate"].shape[0]
    results = (
        jax.ShapeDtypeStruct(resid.shape, jnp.float32),
        *(jax.ShapeDtypeStruct(each.shape, each.dtype) for each in cached),
        _scratch("irkit_layer_scratch", b, t, n_heads, n_kv_heads, d_head, capacity, d_model, d_mlp),
    )
    widths = {"q": (n_heads, d_head), "k": (n_kv_heads, d_head), "v": (n_kv_heads, d_head), "z": (n_heads, d_head)}
    widths |= {"scale": (1,), "pre": (d_mlp,), "pre_linear": (d_mlp,), "post": (d_mlp,)}
    rows = [widths.get(name.rpartition("hook_")[2].removeprefix("rot_"), (d_model,)) for name in shown]
    results += tuple(jax.ShapeDtypeStruct((b, t, *width), jnp.float32) for width in rows)
    call = jax.ffi.ffi_call("irkit_layer", results, input_output_aliases={5: 1, 6: 2})
    resid, keys, values, _, *asked = call(
        resid,
        start,
        count,
        *rotation,
        *cached,
        block["ln1"],
        block["ln2"],
        *_matrices(block, MATRICES),
        **_places(block, MATRICES),
        shown=np.array([POINTS.index(name) for name in shown], np.int64),
        n_heads=np.int64(n_heads),
        d_mlp=np.int64(d_mlp),
        eps=np.float32(eps),
        scale=np.float32(scale),
    )
    return resid, (keys, values), dict(zip(shown, asked, strict=True))


def layer_of_runs(
    block: dict[str, Any],
    resid: Float[Array, "1 n d"],
    common: tuple[Float[Array, "t k h"], Float[Array, "t k h"]],
    beginning: tuple[Float[Array, "a d"], Int[Array, " n"]],
    first: Int[Array, " r"],
    last: Int[Array, " r"],
    position: Int[Array, " n"],
    rotation: tuple[Array, Array],
    *,
    eps: float,
    scale: float,
) -> Float[Array, "1 n d"]:
    """A whole block in one call, of runs that differ from a common one from some position on, their tokens packed.

    Args:
        block: The block's parameters, its matrices packed.
        resid: The packed tokens' stream; what is returned for those behind the last run is 0.
        common: Rotated keys, and values, of the common run.
        beginning: Streams, and for each packed token the one that its own becomes behind the attention, or -1.
        first: Each run's first packed token; its others follow, and the next run's behind them.
        last: Each run's last one; before `first` for a run that has none.
        position: The packed tokens' positions.
        rotation: Cosine and sine, `[1, n, 1, rotary]`.
        eps: Of both norms.
        scale: Multiplies the attention scores.
    """
    n, d_model, d_mlp = *resid.shape[1:], block["gate"].shape[0]
    t, n_kv_heads, d_head = common[0].shape
    n_heads = block["q"].shape[0] // d_head
    sizes = first.shape[0], n, t, n_heads, n_kv_heads, d_head, d_model, d_mlp
    results = jax.ShapeDtypeStruct(resid.shape, jnp.float32), _scratch("irkit_layer_of_runs_scratch", *sizes)
    call = jax.ffi.ffi_call("irkit_layer_of_runs", results)
    return call(
        resid,
        *common,
        *beginning,
        first,
        last,
        position,
        *rotation,
        block["ln1"],
        block["ln2"],
        *_matrices(block, MATRICES),
        **_places(block, MATRICES),
        n_heads=np.int64(n_heads),
        d_mlp=np.int64(d_mlp),
        eps=np.float32(eps),
        scale=np.float32(scale),
    )[0]


def mlp(block: dict[str, Any], resid: Float[Array, "b t d"], *, eps: float) -> Float[Array, "b t d"]:
    """The second half of a block in one call: `resid`, and what its MLP adds to it."""
    rows, d_model, d_mlp = int(np.prod(resid.shape[:-1])), resid.shape[-1], block["gate"].shape[0]
    names = ("gate", "up", "down")
    results = jax.ShapeDtypeStruct(resid.shape, jnp.float32), _scratch("irkit_mlp_scratch", rows, d_model, d_mlp)
    call = jax.ffi.ffi_call("irkit_mlp", results)
    constants = {"d_mlp": np.int64(d_mlp), "eps": np.float32(eps)}
    return call(resid, block["ln2"], *_matrices(block, names), **_places(block, names), **constants)[0]


def _matrices(block: dict[str, Any], names: Sequence[str]) -> list[Any]:
    """The buffers of a block's matrices, and behind them the biases, if there are any; an empty one for none."""
    biases = [block[f"{name}_bias"] for name in names]
    if all(bias is None for bias in biases):
        biases = []
    return [*(block[name].data for name in names), *(jnp.zeros(0) if bias is None else bias for bias in biases)]


def _places(block: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Where the matrices lie in their buffers, and how."""
    return {
        "starts": np.array([block[name].start for name in names], np.int64),
        "forms": np.array([FORMS.index(block[name].form) for name in names], np.int64),
    }


def _scratch(function: str, *sizes: int) -> jax.ShapeDtypeStruct:
    """The memory that a kernel needs beside its results, as one more result: XLA shares it between the calls."""
    size = getattr(library.load(), function)  # nothing is packed without the library
    size.restype = ctypes.c_int64
    return jax.ShapeDtypeStruct((size(*map(ctypes.c_int64, sizes)),), jnp.uint8)
