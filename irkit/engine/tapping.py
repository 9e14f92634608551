"""From what is asked, by name and number, to what the compiled programs take: a `Spec` and its `Operands`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from irkit.edits import Chosen, Edit
from irkit.errors import OptionError
from irkit.transformer import taps
from irkit.transformer.config import Config
from irkit.transformer.taps import POINTS, Capture, EditOperand, HookPoint, Operands, Reducer, Spec

Names = str | Sequence[str] | Callable[[str], bool] | None
_SHORT_OF_ITS_OWN = {"pre_linear": "mlp.hook_pre_linear", "scale": "ln_final.hook_scale"}
OPT_IN = ("attn.hook_result", "attn.hook_attn_scores")
"""Captured only where they are named: the one is large, the other is the pattern before its softmax."""


@dataclass(frozen=True)
class Tapping:
    """What one request captures and edits."""

    spec: Spec = field(default_factory=Spec)
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The layers captured of each hook point, in the order of their slots."""
    heads: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    positions: tuple[int, ...] | None = None
    """The positions of the text that are captured; None for all."""
    at_end: bool = False
    """Capture at the last position that a call reads, instead of `positions`."""
    lenses: Mapping[str, int] = field(default_factory=dict)
    """Hook points whose streams are captured as they are, for a lens of so many tokens when they are read."""
    edits: tuple[Edit, ...] = ()
    config: Config | None = None
    length: int = 0
    """Of the prompt, from whose end negative positions count."""
    rows: int = 1
    """How many texts there are."""
    _made: dict[tuple[int, ...], Operands] = field(default_factory=dict, repr=False, compare=False)
    _kinds: dict[int, Hashable] = field(default_factory=dict, repr=False, compare=False)

    def __bool__(self) -> bool:
        return bool(self.spec)

    @property
    def provenance(self) -> str | None:
        """Tells caches apart that different edits have gone into; None where there are no edits."""
        if not self.edits:
            return None
        known = hashlib.sha256()
        for edit in self.edits:
            known.update(f"{edit!r} {id(edit.function) if edit.function else ''} {self.length}".encode())
            known.update(b"" if edit.value is None else edit.value.tobytes())
        return known.hexdigest()

    def without_captures(self) -> Tapping:
        """Only the edits."""
        spec = Spec((), self.spec.edits)
        return Tapping(spec, edits=self.edits, config=self.config, length=self.length, rows=self.rows)

    def kind(self, capacity: int) -> Hashable:
        """Equal for those whose operands `joined` can take, for a call that reads one token."""
        if not self.spec:
            return None
        if capacity not in self._kinds:
            shapes = tuple((leaf.shape, leaf.dtype.char) for leaf in jax.tree.leaves(self.operands(capacity, 0, 1)))
            self._kinds[capacity] = self.spec, tuple(self.layers.items()), tuple(self.heads.items()), shapes
        return self._kinds[capacity]

    def operands(self, capacity: int, start: int = 0, size: int = 0) -> Operands:
        """The arrays for a cache of this capacity, and for a call that reads `size` tokens from `start` on."""
        if not self.spec:
            return Operands()
        # A step of decoding costs little more than making them.
        key = (capacity, 0, size) if self.at_end or self.positions is None else (capacity, start, size)
        if key not in self._made:
            self._made[key] = self._operands(*key)
        return self._made[key]

    def _operands(self, capacity: int, start: int, size: int) -> Operands:
        assert self.config is not None
        slots, heads, positions = {}, {}, {}
        for capture in self.spec.captures:
            if capture.slots:
                slots[capture.point] = row = np.full(self.config.n_layers, capture.slots, np.int32)
                row[list(self.layers[capture.point])] = np.arange(len(self.layers[capture.point]))
            if capture.heads:
                heads[capture.point] = np.array(self.heads[capture.point], np.int32)
            if capture.positions:
                inside = np.array([size - 1] if self.at_end else self.positions, np.int32) - (
                    0 if self.at_end else start
                )
                positions[capture.point] = np.clip(inside, 0, max(size - 1, 0)).astype(np.int32)
        edits = tuple(self._operand(edit, capacity) for edit in self.edits if edit.op != "call")
        return Operands(slots, heads, positions, edits)

    def _operand(self, edit: Edit, capacity: int) -> EditOperand:
        assert self.config is not None
        point, layer = resolve(edit.name, self.config)
        chosen = (layer,) if layer is not None else choose(edit.layers, self.config.n_layers, "layers")
        layers = np.zeros((1, self.config.n_layers), bool)
        layers[0, list(chosen)] = True
        heads = None
        if point.head_axis is not None:
            heads = np.zeros((1, n_heads(point, self.config)), bool)
            heads[0, list(choose(edit.heads, heads.shape[1], "heads"))] = True
        elif edit.heads is not None:
            raise OptionError(f"heads: {point.name} has no heads")
        if not abs(edit.strength) <= float(np.finfo(np.float32).max):
            raise OptionError(f"{edit.name}: the strength must be a finite number, got {edit.strength}")
        strength, value = np.array([edit.strength], np.float32), None
        if edit.op != "scale":
            value = _laid_out(edit, point, self.config, self.rows)
        elif edit.value is not None:
            strength = _factors(edit, point, self.config)
        positions = np.zeros((1, capacity), bool)
        if edit.positions is None:
            positions[:] = True
            if value is not None and value.shape[point.position_axis] > 1:
                positions[:, value.shape[point.position_axis] :] = False
        else:
            where = [p for p in choose(edit.positions, max(self.length, 1), "positions", beyond=True) if p < capacity]
            positions[0, where] = True
        if value is not None:
            value = _padded(value, point, capacity)
        return EditOperand(layers, positions, heads, strength, value)  # pyright: ignore[reportArgumentType]


def joined(operands: Sequence[Operands]) -> Operands:
    """The operands of one call for several texts, each of which has its own edits; what they capture is the same."""
    edits = zip(*(each.edits for each in operands), strict=True)
    return operands[0]._replace(edits=tuple(jax.tree.map(lambda *rows: np.concatenate(rows), *each) for each in edits))


def tapping(
    config: Config,
    length: int,
    *,
    names: Names = (),
    layers: Chosen = None,
    heads: Chosen = None,
    positions: Chosen = None,
    reduce: str | Mapping[str, str] = "none",
    k: int = 10,
    edits: Sequence[Edit] = (),
    at_end: bool = False,
    rows: int = 1,
) -> Tapping:
    """What these words ask for, of a text of `length` tokens; `at_end`, of the last one that each call reads.

    Raises:
        OptionError: there is no such hook point, layer, head or position; or a reducer does not fit a hook point.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    for point, layer in _named(names, config):
        chosen = choose(layers, config.n_layers, "layers") if layer is None else (layer,)
        chosen = chosen if point.per_layer else ()
        wanted[point.name] = tuple(sorted({*wanted.get(point.name, ()), *chosen}))
    at = None if positions is None else choose(positions, length, "positions")
    n_positions = 1 if at_end else len(at or ())
    captures, kept_heads, lenses = [], {}, {}
    for name, chosen in wanted.items():
        point = POINTS[name]
        reducer = _reducer(reduce, point)
        if reducer == "lens" and at_end:
            # The unembedding of every layer would take longer than the token: it waits until somebody looks.
            reducer, lenses[name] = "none", k
        few = point.per_layer and len(chosen) < config.n_layers
        slots = min(1 << (len(chosen) - 1).bit_length(), config.n_layers) if few else 0
        if heads is not None and point.head_axis is not None:
            kept_heads[name] = choose(heads, n_heads(point, config), "heads")
        of_k = k if reducer in ("top_k", "lens") else 0
        captures.append(Capture(name, None, slots, len(kept_heads.get(name, ())), n_positions, reducer, of_k))
    changes = [change for edit in edits for change in _changes(edit, config)]
    spec = Spec(tuple(captures), tuple(changes), stacked=at_end)
    made = Tapping(spec, wanted, kept_heads, at, at_end, lenses, tuple(edits), config, length, rows)
    made.operands(max(length, 1))  # what does not fit is told now, not on the device's thread
    return made


def resolve(name: str, config: Config) -> tuple[HookPoint, int | None]:
    """The hook point that a name means, with the layer if the name holds it.

    Known are full names (`blocks.5.attn.hook_pattern`), those of the table (`attn.hook_pattern`), and short ones
    (`pattern`), with the norm before those that each norm has (`ln1.scale`).
    """
    point, layer = name, None
    if name.startswith("blocks."):
        try:
            point, layer = taps.split(name)
        except ValueError:
            point = name
        if layer is not None and not 0 <= layer < config.n_layers:
            raise OptionError(f"names: there is no layer {layer} in {name!r}; the model has {config.n_layers}")
    found = POINTS.get(point) or _short().get(point)
    if found is None:
        raise OptionError(f"names: there is no hook point {name!r}; known are {', '.join(sorted(_short()))}")
    return found, layer


def _short() -> dict[str, HookPoint]:
    known = {}
    for point in taps.HOOK_POINTS:
        module, _, last = point.name.rpartition("hook_")
        known[last if module[:2] != "ln" else f"{module}{last}"] = point
    return known


def _named(names: Names, config: Config) -> Iterable[tuple[HookPoint, int | None]]:
    if names is None:
        return [(point, None) for point in taps.HOOK_POINTS if point.name not in OPT_IN]
    if callable(names):
        return [resolve(name, config) for name in taps.hook_names(config.n_layers) if names(name)]
    return [resolve(name, config) for name in ([names] if isinstance(names, str) else names)]


def choose(chosen: Chosen, size: int, what: str, *, beyond: bool = False) -> tuple[int, ...]:
    """The numbers that `chosen` means of `size`, in its order; with `beyond`, larger ones too.

    Raises:
        OptionError: a number is not below `size`, or nothing is chosen.
    """
    if chosen is None:
        return tuple(range(size))
    if isinstance(chosen, slice):
        if beyond and chosen.stop is None:
            raise OptionError(f"{what}: a slice of them needs an end; give None for all")
        found = range(size)[chosen]
        if beyond and chosen.stop > size:
            start = chosen.start or 0
            found = range(start + size if start < 0 else start, chosen.stop, chosen.step or 1)
    else:
        found = [chosen] if isinstance(chosen, int | np.integer) else list(chosen)
    numbers = tuple(int(number) + size * (number < 0) for number in found)
    for number, given in zip(numbers, found, strict=True):
        if number < 0 or (number >= size and not beyond):
            raise OptionError(f"{what}: there is no {given}; there are {size}")
    if not numbers:
        raise OptionError(f"{what}: none is chosen of {size}")
    return numbers


def n_heads(point: HookPoint, config: Config) -> int:
    """How many heads a hook point shows."""
    return config.n_heads if "H" in point.axes else config.n_kv_heads


def _reducer(reduce: str | Mapping[str, str], point: HookPoint) -> Reducer:
    if isinstance(reduce, Mapping):
        short = next(name for name, known in _short().items() if known is point)
        reduce = reduce.get(short, reduce.get(point.name, "none"))
    known = Reducer.__args__
    if reduce not in known:
        raise OptionError(f"reduce: {reduce!r} is not one of {', '.join(known)}")
    if reduce == "entropy" and point.name != "attn.hook_pattern":
        raise OptionError(f"reduce: entropy is of probabilities; {point.name} has none, the pattern has")
    if reduce == "lens" and point.axes != ("b", "pos", "d_model"):
        raise OptionError(f"reduce: a lens looks at the residual stream, not at {point.name} {point.shape}")
    return reduce  # pyright: ignore[reportReturnType]


def _changes(edit: Edit, config: Config) -> list[taps.Edit]:
    point, layer = resolve(edit.name, config)
    if edit.op != "call":
        return [taps.Edit(point.name, edit.op)]
    if not point.per_layer:
        return [taps.Edit(point.name, "call", edit.function)]
    chosen = (layer,) if layer is not None else choose(edit.layers, config.n_layers, "layers")
    return [taps.Edit(point.name, "call", edit.function, each) for each in chosen]


def _laid_out(edit: Edit, point: HookPoint, config: Config, rows: int) -> np.ndarray:
    """The value in the hook point's own layout; each of its axes is 1 or as wide as there."""
    assert edit.value is not None
    value, ndim = edit.value, len(point.axes)
    if not np.isfinite(value).all():
        raise OptionError(f"{edit.name}: the value holds numbers that are not finite")
    inner = ndim - 2  # without b and pos
    if "key" not in point.axes and value.ndim <= inner:
        value = value.reshape(1, 1, *(1 for _ in range(inner - value.ndim)), *value.shape)
    widths = {"b": rows, "1": 1, "H": config.n_heads, "K": config.n_kv_heads}
    widths |= {name: getattr(config, name) for name in ("d_model", "d_head", "d_mlp")}
    if value.ndim != ndim or not all(
        size > 0 and size in (1, widths.get(name, size)) for name, size in zip(point.axes, value.shape, strict=True)
    ):
        shown = ", ".join(str(widths[name]) if name in widths and name != "b" else name for name in point.axes)
        raise OptionError(
            f"{edit.name}: a value of shape {list(edit.value.shape)} does not fit {point.name}, which is [{shown}]"
        )
    return value


def _factors(edit: Edit, point: HookPoint, config: Config) -> np.ndarray:
    """A factor for each layer and head, `[1, layer, head]`; one head where the hook point has none."""
    assert edit.value is not None
    heads = 1 if point.head_axis is None else n_heads(point, config)
    factors = edit.strength * (edit.value[:, None] if edit.value.ndim == 1 else edit.value)
    wanted = (config.n_layers, heads)
    if not point.per_layer or factors.shape not in (wanted, (config.n_layers, 1)):
        shown = f"[{config.n_layers}] or [{config.n_layers}, {heads}]" if point.per_layer else "a number"
        raise OptionError(f"{edit.name}: factors of shape {list(edit.value.shape)} do not fit; {shown} would")
    if not np.isfinite(factors).all():
        raise OptionError(f"{edit.name}: the factors hold numbers that are not finite")
    return np.broadcast_to(factors, wanted)[None].astype(np.float32)


def _padded(value: np.ndarray, point: HookPoint, capacity: int) -> np.ndarray:
    """The value with room for the whole cache along its position and key axes, unless it holds for every position."""
    for axis, name in enumerate(point.axes):
        size = value.shape[axis]
        if name == "key" or (axis == point.position_axis and size > 1):
            value = np.take(value, range(min(size, capacity)), axis)
            value = np.pad(value, [(0, capacity - value.shape[axis] if a == axis else 0) for a in range(value.ndim)])
    return value
