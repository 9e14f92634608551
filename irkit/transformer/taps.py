"""The table of hook points, and the taps by which the forward pass shows a value there and takes another.

What is captured and edited is told in two parts. The `Spec` is fixed when compiling: which kinds of hook points, how
much is kept of each, which operations. The `Operands` are arrays: which layers, heads and positions, how strong, with
what values; changing them compiles nothing.

Names and shapes follow TransformerLens. Letters: b batch, pos and query token positions of the call, key
positions of the cache, H query heads, K key/value heads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from irkit.errors import OptionError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class HookPoint:
    """A place in the forward pass: its name (in every layer behind `blocks.{i}.`), shape and meaning."""

    name: str
    shape: str
    doc: str
    per_layer: bool = True

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """The names in `shape`."""
        return tuple(self.shape.strip("[]").split(", "))

    @cached_property
    def position_axis(self) -> int:
        """The axis of the tokens that the call reads."""
        return next(i for i, name in enumerate(self.axes) if name in ("pos", "query"))

    @cached_property
    def head_axis(self) -> int | None:
        """The axis of the heads, if it has one."""
        return next((i for i, name in enumerate(self.axes) if name in ("H", "K")), None)


HOOK_POINTS = (
    HookPoint("hook_embed", "[b, pos, d_model]", "The token embeddings.", per_layer=False),
    HookPoint("hook_resid_pre", "[b, pos, d_model]", "The residual stream as the layer finds it."),
    HookPoint("ln1.hook_scale", "[b, pos, 1]", "What the norm before attention divides by."),
    HookPoint("ln1.hook_normalized", "[b, pos, d_model]", "The normed stream, before the norm's weight."),
    HookPoint("attn.hook_q", "[b, pos, H, d_head]", "Queries, before rotation."),
    HookPoint("attn.hook_k", "[b, pos, K, d_head]", "Keys, before rotation."),
    HookPoint("attn.hook_v", "[b, pos, K, d_head]", "Values."),
    HookPoint("attn.hook_rot_q", "[b, pos, H, d_head]", "Queries, rotated by their position."),
    HookPoint("attn.hook_rot_k", "[b, pos, K, d_head]", "Keys, rotated by their position: what the cache holds."),
    HookPoint("attn.hook_attn_scores", "[b, H, query, key]", "Attention scores, scaled; -inf where masked."),
    HookPoint("attn.hook_pattern", "[b, H, query, key]", "Attention probabilities; each row sums to 1."),
    HookPoint("attn.hook_z", "[b, pos, H, d_head]", "Values mixed by the pattern, head by head."),
    HookPoint("attn.hook_result", "[b, pos, H, d_model]", "What each head adds to the stream (without bias)."),
    HookPoint("hook_attn_out", "[b, pos, d_model]", "What attention adds to the stream."),
    HookPoint("hook_resid_mid", "[b, pos, d_model]", "The stream between attention and MLP."),
    HookPoint("ln2.hook_scale", "[b, pos, 1]", "What the norm before the MLP divides by."),
    HookPoint("ln2.hook_normalized", "[b, pos, d_model]", "The normed stream, before the norm's weight."),
    HookPoint("mlp.hook_pre", "[b, pos, d_mlp]", "The gate, before its activation function."),
    HookPoint("mlp.hook_pre_linear", "[b, pos, d_mlp]", "The up projection, which the gate multiplies."),
    HookPoint("mlp.hook_post", "[b, pos, d_mlp]", "Activated gate times up projection."),
    HookPoint("hook_mlp_out", "[b, pos, d_model]", "What the MLP adds to the stream."),
    HookPoint("hook_resid_post", "[b, pos, d_model]", "The residual stream as the layer leaves it."),
    HookPoint("ln_final.hook_scale", "[b, pos, 1]", "What the final norm divides by.", per_layer=False),
    HookPoint(
        "ln_final.hook_normalized",
        "[b, pos, d_model]",
        "The normed stream before its weight.",
        per_layer=False,
    ),
)


def hook_names(n_layers: int) -> tuple[str, ...]:
    """The full name of every hook point of a model, `blocks.{i}.` included."""
    return tuple(
        name
        for point in HOOK_POINTS
        for name in ([f"blocks.{i}.{point.name}" for i in range(n_layers)] if point.per_layer else [point.name])
    )


POINTS = MappingProxyType({point.name: point for point in HOOK_POINTS})
"""The hook points by name."""

_INSIDE = tuple(
    point.name for point in HOOK_POINTS if point.per_layer and point.name not in ("hook_resid_pre", "hook_resid_post")
)

Reducer = Literal["none", "last", "mean", "norm", "entropy", "top_k", "lens"]
"""What is kept of a value: all of it; its last position; the mean over its positions; the length of each vector; the
entropy of each row of probabilities, in nats; the k largest numbers of each vector and their indices; the k likeliest
next tokens, were it the last layer's."""


@dataclass(frozen=True)
class Capture:
    """What to keep of one kind of hook point."""

    point: str
    """Its name in `HOOK_POINTS`."""
    layers: tuple[int, ...] | None = None
    """Of these layers; of every layer if None."""
    slots: int = 0
    """Instead of `layers`, room for so many, which `Operands.slots` chooses."""
    heads: int = 0
    """How many heads `Operands.heads` chooses; 0 keeps all."""
    positions: int = 0
    """How many positions `Operands.positions` chooses; 0 keeps all."""
    reduce: Reducer = "none"
    k: int = 0
    """Of `top_k` and `lens`."""


@dataclass(frozen=True)
class Edit:
    """How to change what stands at one kind of hook point."""

    point: str
    """Its name in `HOOK_POINTS`."""
    op: Literal["add", "scale", "set", "call"]
    """`value + strength * operand`; `value * strength`; `operand`; or what `function` makes of the value."""
    function: Callable[[Array, Hook], Array | None] | None = None
    layer: int | None = None
    """Of `call`: the one layer; the other operations take theirs from the operands."""


@dataclass(frozen=True)
class Spec:
    """What a program captures and edits; an empty one leaves no trace in it."""

    captures: tuple[Capture, ...] = ()
    edits: tuple[Edit, ...] = ()
    stacked: bool = False
    """Captures of all layers come as one array, since an array costs a small program more than its numbers."""

    def __bool__(self) -> bool:
        return bool(self.captures or self.edits)

    @property
    def calls(self) -> bool:
        """Whether there are functions in it, which another process would not know again."""
        return any(edit.function for edit in self.edits)


class EditOperand(NamedTuple):
    """The arrays of one edit. Row axes are b or 1."""

    layers: Bool[Array, "b n_layers"]
    positions: Bool[Array, "b position"]
    """Over the positions of the cache."""
    heads: Bool[Array, "b n"] | None
    strength: Float[Array, " b"] | Float[Array, "b n_layers n"]
    """One factor, or one for each layer and each head, of which there is one where the hook point has none."""
    operand: Array | None
    """In the hook point's own layout; its position axis is 1 or that of the cache."""


class Operands(NamedTuple):
    """The arrays that belong to a `Spec`. The mappings are by hook point."""

    slots: dict[str, Int[Array, " n_layers"]] = {}  # noqa: RUF012
    """Each layer's slot; one past the last where it is not wanted."""
    heads: dict[str, Int[Array, " n"]] = {}  # noqa: RUF012
    positions: dict[str, Int[Array, " n"]] = {}  # noqa: RUF012
    """Counted from the first position of the call."""
    edits: tuple[EditOperand, ...] = ()


class Hook(NamedTuple):
    """Where a function stands, as it is told."""

    name: str
    """The full name."""
    point: HookPoint
    layer: int | None


def named(names: Collection[str]) -> Spec:
    """The whole values of these hook points, by their full names."""
    layers: dict[str, list[int]] = {}
    for name in names:
        point, layer = split(name)
        layers.setdefault(point, []).extend([] if layer is None else [layer])
    return Spec(tuple(Capture(point, tuple(sorted(set(chosen)))) for point, chosen in layers.items()))


def split(name: str) -> tuple[str, int | None]:
    """A full name as the hook point's and the layer."""
    if name.startswith("blocks."):
        _, layer, point = name.split(".", 2)
        return point, int(layer)
    return name, None


class Taps:
    """Collects and changes values at the hook points that `spec` names, while one forward pass is traced.

    A hook point that is not named costs nothing: its value passes through and the compiled program is the
    one without it.
    """

    def __init__(
        self,
        spec: Spec = Spec(),
        operands: Operands = Operands(),  # noqa: B008
        start: Int[Array, " b"] | None = None,
        count: Int[Array, " b"] | None = None,
    ) -> None:
        self._spec, self._operands, self._start, self._count = spec, operands, start, count
        self._captures = {capture.point: capture for capture in spec.captures}
        self._edits: dict[str, list[tuple[Edit, EditOperand | None]]] = {}
        # Calls have no operands.
        rest = iter(operands.edits)
        for edit in spec.edits:
            self._edits.setdefault(edit.point, []).append((edit, None if edit.op == "call" else next(rest)))
        self.layer_index: int | None = None
        self.captures: dict[str, Any] = {}
        """Values by full name; buffers `[slots + 1, ...]` by hook point, where the layers are operands."""

    def layer(self, index: int | None) -> Taps:
        """The same, for the hook points of one layer."""
        self.layer_index = index
        return self

    def _name(self, point: str) -> str:
        return f"blocks.{self.layer_index}.{point}" if POINTS[point].per_layer else point

    def captured(self, point: str) -> Capture | None:
        """What is kept of a value here, if anything."""
        capture = self._captures.get(point)
        here = capture and (capture.slots or capture.layers is None or not POINTS[point].per_layer)
        return capture if here or (capture and self.layer_index in (capture.layers or ())) else None

    def edited(self, point: str) -> list[tuple[Edit, EditOperand | None]]:
        """What changes a value here."""
        found = self._edits.get(point, ())
        return [each for each in found if each[0].layer in (None, self.layer_index) or each[0].op != "call"]

    def wants(self, point: str) -> bool:
        """Whether a value is asked for or changed; for values that would not be computed otherwise."""
        return bool(self.captured(point) or self.edited(point))

    def edits_inside(self) -> bool:
        """Whether anything within the layer is changed, between the stream as it enters and as it leaves."""
        return any(self.edited(point) for point in _INSIDE)

    def captured_inside(self) -> set[str]:
        """The hook points within the layer of which something is kept."""
        return {point for point in _INSIDE if self.captured(point)}

    def __call__(self, point: str, value: Array) -> Array:
        """What is to stand at the hook point `point` instead of `value`."""
        if self.wants(point):
            for edit, operand in self.edited(point):
                value = self._edit(edit, operand, value)
            capture = self.captured(point)
            if capture:
                self._keep(capture, reduced(capture, value, self._operands, self._count))
        return value

    def beside(self, point: str, make: Callable[[Int[Array, " n"] | None], Array]) -> None:
        """Captures a value that nothing else needs, computed only in the layers and at the positions it is wanted of.

        `make` computes it, at the positions of the call that it is given, or at all.
        """
        capture = self.captured(point)
        if capture is None:
            return
        chosen = self._operands.positions.get(point)

        def kept() -> Any:
            return reduced(capture, make(chosen), self._operands, self._count, chosen=chosen is not None)

        if not capture.slots:
            self._keep(capture, kept())
            return
        buffer = self._buffer(capture, jax.eval_shape(kept))
        slot = self._operands.slots[point][self.layer_index or 0]
        wanted = slot < capture.slots
        self.captures[point] = lax.cond(wanted, lambda held: _put(held, kept(), slot), lambda held: held, buffer)

    def _keep(self, capture: Capture, value: Any) -> None:
        point = capture.point
        if not capture.slots or not POINTS[point].per_layer:
            self.captures[self._name(point)] = value
            return
        slot = self._operands.slots[point][self.layer_index or 0]
        self.captures[point] = _put(self._buffer(capture, value), value, slot)

    def _buffer(self, capture: Capture, like: Any) -> Any:
        held = self.captures.get(capture.point)
        if held is None:
            held = jax.tree.map(lambda part: jnp.zeros((capture.slots + 1, *part.shape), part.dtype), like)
        return held

    def _edit(self, edit: Edit, operand: EditOperand | None, value: Array) -> Array:
        point = POINTS[edit.point]
        if operand is None:
            assert edit.function is not None
            layer = self.layer_index if point.per_layer else None
            hook = Hook(self._name(edit.point), point, layer)
            try:
                new = edit.function(value, hook)
                if new is None:
                    return value
                new = jnp.asarray(new)
            except Exception as error:
                raise OptionError(f"the hook on {hook.name} failed: {type(error).__name__}: {error}") from error
            if new.shape != value.shape:
                raise OptionError(f"the hook on {hook.name} returned shape {list(new.shape)}, not {list(value.shape)}")
            return new.astype(value.dtype)
        assert self._start is not None
        axis, t = point.position_axis, value.shape[point.position_axis]
        if operand.strength.ndim == 1:
            strength = _at_axes(operand.strength, value.ndim, 0)
        elif point.head_axis is None:
            strength = _at_axes(operand.strength[:, self.layer_index or 0, 0], value.ndim, 0)
        else:
            strength = _at_axes(operand.strength[:, self.layer_index or 0], value.ndim, 0, point.head_axis)
        new = value * strength
        if operand.operand is not None:
            other = operand.operand
            if other.shape[axis] != 1:
                other = _window(other, self._start, t, axis)
            new = other if edit.op == "set" else value + strength * other
        mask = _at_axes(_window(operand.positions, self._start, t, 1), value.ndim, 0, axis)
        if point.per_layer:
            mask &= _at_axes(operand.layers[:, self.layer_index or 0], value.ndim, 0)
        if operand.heads is not None and point.head_axis is not None:
            mask &= _at_axes(operand.heads, value.ndim, 0, point.head_axis)
        return jnp.where(mask, new, value)


def reduced(
    capture: Capture, value: Array, operands: Operands, count: Int[Array, " b"] | None, *, chosen: bool = False
) -> Any:
    """What `capture` keeps of `value`, whose positions may be the chosen ones already."""
    point = POINTS[capture.point]
    axis = point.position_axis
    if capture.heads and point.head_axis is not None:
        value = jnp.take(value, operands.heads[capture.point], axis=point.head_axis, mode="clip")
    if capture.positions and not chosen:
        value = jnp.take(value, operands.positions[capture.point], axis=axis, mode="clip")
    if capture.positions and capture.reduce in ("last", "mean"):
        if capture.reduce == "mean":
            return jnp.mean(value, axis=axis, keepdims=True)
        return lax.slice_in_dim(value, capture.positions - 1, capture.positions, axis=axis)
    if capture.reduce == "last":
        assert count is not None
        return _window(value, count - 1, 1, axis)
    if capture.reduce == "mean":
        assert count is not None
        counts = jnp.arange(value.shape[axis]) < count[:, None]
        weights = _at_axes(counts / count[:, None], value.ndim, 0, axis)
        return jnp.sum(jnp.where(weights > 0, value * weights, 0), axis=axis, keepdims=True)
    if capture.reduce == "norm":
        return jnp.sqrt(jnp.sum(value * value, axis=-1))
    if capture.reduce == "entropy":
        return -jnp.sum(jnp.where(value > 0, value * jnp.log(jnp.where(value > 0, value, 1)), 0), axis=-1)
    if capture.reduce == "top_k":
        return lax.top_k(value, min(capture.k, value.shape[-1]))
    return value  # a lens is looked through once for all layers, when they have been read


def _put(buffer: Any, value: Any, slot: Array) -> Any:
    return jax.tree.map(lambda held, part: lax.dynamic_update_slice_in_dim(held, part[None], slot, 0), buffer, value)


def _at_axes(x: Array, ndim: int, *axes: int) -> Array:
    """`x` with its axes at these of `ndim`, and 1 at the others."""
    return jnp.expand_dims(x, [axis for axis in range(ndim) if axis not in axes])


def _window(x: Array, start: Int[Array, " b"], size: int, axis: int) -> Array:
    """`size` of `x` along `axis` from `start` on, each row from its own.

    Row by row, because a batched slice would be a gather.
    """
    rows = [x[min(row, x.shape[0] - 1) :][:1] for row in range(start.shape[0])]
    return jnp.concatenate(
        [lax.dynamic_slice_in_dim(row, first, size, axis) for row, first in zip(rows, start, strict=True)]
    )
