"""`Trace`: what a forward pass showed at its hook points, by name, with all that says where it came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from irkit.errors import BudgetError, OptionError

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from irkit.widgets.attention import AttentionView


class Largest(NamedTuple):
    """What the reducers `top_k` and `lens` keep, largest first."""

    values: np.ndarray
    """`[..., k]`; of a lens, log-probabilities."""
    indices: np.ndarray
    """`[..., k]`; of a lens, token ids."""


Value = np.ndarray | Largest


@dataclass(frozen=True)
class Provenance:
    """Where a trace came from."""

    model: str
    path: str
    precision: str
    names: tuple[str, ...] = ()
    """The hook points, as the table names them."""
    reduce: Mapping[str, str] = field(default_factory=dict)
    """The reducer of each hook point that has one."""
    heads: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The heads that were kept, where not all were."""
    positions: tuple[int, ...] | None = None
    """The positions that were kept; None for all."""
    edits: tuple[str, ...] = ()
    """What was changed in the pass, in words."""
    sha256: str = ""
    """Of the model's file; known once the trace was saved."""


class Trace(Mapping[str, Value]):
    """What one forward pass showed; a mapping from full hook names to float32 arrays.

    `t["blocks.5.attn.hook_pattern"]`, `t["attn.hook_pattern", 5]`, `t["pattern", 5]` and `t["pattern", -25]` are the
    same array, and `t["pattern"]` is those of every layer held, `[layer, b, head, query, key]`. A norm's own values
    take its name: `t["ln1.scale", 5]`. The arrays stay on the device until they are asked for. In a batch, texts
    shorter than the longest are padded at their end, and the values there mean nothing; `row` leaves them out.
    """

    def __init__(
        self,
        ids: Sequence[Sequence[int]],
        strings: Sequence[Sequence[str]],
        values: Mapping[str, Callable[[], Value]],
        logits: Callable[[], np.ndarray | None],
        provenance: Provenance,
        n_layers: int,
        nbytes: int,
    ) -> None:
        self.ids = tuple(tuple(row) for row in ids)
        """The token ids of each text."""
        self.strings = tuple(tuple(row) for row in strings)
        """The tokens' own texts."""
        self.provenance = provenance
        self.n_layers = n_layers
        self.nbytes = nbytes
        """What the trace holds in memory, in bytes."""
        self._values = dict(values)
        self._logits = logits
        self._read: dict[str, Value] = {}

    @cached_property
    def logits(self) -> np.ndarray:
        """`[b, pos, d_vocab]`, or of the last position alone, as was asked.

        Raises:
            KeyError: the trace was made without.
        """
        found = self._logits()
        if found is None:
            raise KeyError("the trace holds no logits; ask with logits='all'")
        return found

    @property
    def has_logits(self) -> bool:
        """Whether `logits` can be read."""
        return self._logits() is not None

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens' texts, of the first text."""
        return self.strings[0]

    def layers(self, name: str) -> tuple[int, ...]:
        """The layers of which the hook point is held."""
        ending = self._points(name)
        found = {
            int(full.split(".", 2)[1]) for full in self._values if full[:7] == "blocks." and _point(full) == ending
        }
        return tuple(sorted(found))

    def __getitem__(self, key: str | tuple[Any, ...]) -> Any:
        name, *rest = key if isinstance(key, tuple) else (key,)
        if len(rest) > 1:  # TransformerLens writes ("scale", 5, "ln1")
            name, rest = f"{rest[1]}.{name}" if rest[1] else name, rest[:1]
        if name in self._values:
            return self._value(name)
        point = self._points(name)
        if rest and rest[0] is not None:
            layer = int(rest[0]) + self.n_layers * (rest[0] < 0)
            return self._value(f"blocks.{layer}.{point}")
        if point in self._values:
            return self._value(point)
        parts: list[Any] = [self._value(f"blocks.{layer}.{point}") for layer in self.layers(point)]
        if isinstance(parts[0], Largest):
            return Largest(*(np.stack(each) for each in zip(*parts, strict=True)))
        return np.stack(parts)

    def _value(self, full: str) -> Value:
        if full not in self._values:
            raise KeyError(f"{full} was not captured; held are {', '.join(sorted({_point(n) for n in self._values}))}")
        if full not in self._read:
            self._read[full] = self._values[full]()
        return self._read[full]

    def _points(self, name: str) -> str:
        """The hook point that `name` means, of those that are held."""
        held = {_point(full) for full in self._values}
        found = [point for point in held if point == name or _short(point) == name]
        found = found or [point for point in held if point.rpartition("hook_")[2] == name]
        if len(found) != 1:
            known = ", ".join(sorted(map(_short, found or held)))
            raise KeyError(f"{name!r} is {'ambiguous' if found else 'not held'}: {known}")
        return found[0]

    def _let_go(self, why: str) -> None:
        """Free the arrays; whoever reads them from now on is told why they are gone."""

        def gone() -> Value:
            raise BudgetError(why)

        self._values = dict.fromkeys(self._values, gone)
        self._read.clear()

    def __contains__(self, key: object) -> bool:
        try:
            name, *rest = key if isinstance(key, tuple) else (key,)
            if name in self._values:
                return True
            layers = self.layers(name)  # pyright: ignore[reportArgumentType]
            return not rest or rest[0] + self.n_layers * (rest[0] < 0) in layers
        except (KeyError, TypeError):
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def row(self, index: int) -> Trace:
        """One text of a batch, without the padding after it; its arrays keep a batch axis of 1."""
        count = len(self.ids[index])

        def cut(full: str) -> Callable[[], Value]:
            def value() -> Value:
                whole = self._value(full)
                axes = kept_axes(_point(full), self.provenance.reduce.get(_point(full), "none"))
                fixed = self.provenance.positions is not None
                return _each(whole, lambda part: _trimmed(part[index : index + 1 or None], axes, count, fixed))

            return value

        def logits() -> np.ndarray | None:
            found = self._logits()
            return None if found is None else found[index : index + 1 or None, :count]

        values = {full: cut(full) for full in self._values}
        nbytes = self.nbytes // len(self.ids)
        return Trace([self.ids[index]], [self.strings[index]], values, logits, self.provenance, self.n_layers, nbytes)

    def save(self, path: str | Path) -> None:
        """Write it into a safetensors file, which `irkit.load_trace` opens without the model.

        Raises:
            OptionError: the file cannot be written.
        """
        from irkit import tracefile

        tracefile.save(self, path)

    def plot(self, layer: int | None = None, head: int | None = None) -> Figure:
        """A matplotlib Figure of a layer's attention patterns: of one head, or of all that are held.

        `layer` is by default the last one that is held.

        Raises:
            KeyError, OptionError: the trace does not hold them.
        """
        from irkit import plots

        return plots.attention(self, layer, head)

    def view(self, text: int = 0, **chosen: Any) -> AttentionView:
        """A notebook's view of the attention patterns; `text` and `chosen` as in `irkit.view.attention`.

        Raises:
            OptionError: the trace does not hold them.
        """
        from irkit import view

        return view.attention(self, text, **chosen)

    def to_frame(self, name: str) -> pandas.DataFrame:
        """What is held of a hook point as a table: its last axis across, the others down, token texts beside positions.

        Of a reducer that keeps values and indices, both are across, one after the other.

        Raises:
            KeyError: the trace does not hold it.
        """
        import pandas

        full = name if name in self._values else None
        point = _point(full) if full else self._points(name)
        value = self[full or point]
        axes = kept_axes(point, self.provenance.reduce.get(point, "none"))
        layers = () if full or point in self._values else self.layers(point)
        parts = value if isinstance(value, Largest) else (value,)
        labels = [
            self._labels(axis, size, point) for axis, size in zip(axes, parts[0].shape[-len(axes) :], strict=True)
        ]
        down = {"layer": layers} if layers else {}
        down |= dict(zip(axes[:-1], labels[:-1], strict=True))
        index = pandas.MultiIndex.from_product(list(down.values()), names=list(down))
        frames = [pandas.DataFrame(part.reshape(len(index), -1), index, list(labels[-1])) for part in parts]
        frame = frames[0] if len(frames) == 1 else pandas.concat(frames, axis=1, keys=Largest._fields)
        place = next((axis for axis in ("pos", "query") if axis in down), None)
        if place:
            rows = zip(index.get_level_values("b"), index.get_level_values(place), strict=True)
            tokens = pandas.Index([self._token(row, at) for row, at in rows], name="token")
            frame = frame.set_index(tokens, append=True)
        return frame

    def _token(self, row: int, position: int) -> str:
        """The token's text; a token of an answer knows itself alone, wherever it stands; padding has none."""
        texts = self.strings[row]
        alone = len(texts) == 1 and self.provenance.positions == (position,)
        return texts[0] if alone else texts[position] if position < len(texts) else ""

    def _labels(self, axis: str, size: int, point: str) -> Sequence[int]:
        """The numbers of heads and positions along an axis, as the model counts them."""
        if axis == "head":
            return self.provenance.heads.get(point, range(size))
        kept = self.provenance.positions
        return kept if axis in ("pos", "query") and kept is not None else range(size)

    def _repr_html_(self) -> str:
        from irkit import reprs

        return reprs.trace(self)

    def _summary(self) -> tuple[list[str], list[tuple[str, ...]]]:
        """Facts in words, and of each hook point its name, how many layers, the axes, and the reducer."""
        rows = []
        for point, full in {_point(full): full for full in self._values}.items():
            reducer = self.provenance.reduce.get(point, "")
            layers = str(len(self.layers(point))) if point != full else ""
            rows.append((_short(point), layers, f"[{', '.join(kept_axes(point, reducer or 'none'))}]", reducer))
        texts = [f"{len(self.ids)} texts"] if len(self.ids) > 1 else []
        edits = [f"{len(self.provenance.edits)} edits"] if self.provenance.edits else []
        counts = [f"{max(map(len, self.ids))} tokens", f"{len(self._values)} arrays", size(self.nbytes)]
        return [*texts, *counts, *edits], rows

    def __repr__(self) -> str:
        names = sorted({_short(_point(full)) for full in self._values})
        texts = f"{len(self.ids)} texts, " if len(self.ids) > 1 else ""
        count = max(map(len, self.ids))
        edits = f", {len(self.provenance.edits)} edits" if self.provenance.edits else ""
        return (
            f"<Trace of {self.provenance.model}: {texts}{count} tokens, {len(self._values)} arrays "
            f"({', '.join(names)}), {size(self.nbytes)}{edits}>"
        )


def size(nbytes: float) -> str:
    """A number of bytes, as people write it."""
    power = min(int(math.log(max(nbytes, 1), 1000)), 4)
    return f"{nbytes / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def _point(full: str) -> str:
    return full.split(".", 2)[2] if full.startswith("blocks.") else full


def _short(point: str) -> str:
    module, _, last = point.rpartition("hook_")
    return f"{module}{last}" if module.startswith("ln") else last


def kept_axes(point: str, reduce: str) -> tuple[str, ...]:
    """What the axes of a captured value are after its reducer: `b`, `pos` or `query`, `key`, `head` or others."""
    if point in ("attn.hook_pattern", "attn.hook_attn_scores"):
        axes: tuple[str, ...] = ("b", "head", "query", "key")
    elif point.startswith("attn."):
        axes = ("b", "pos", "head", "width")
    else:
        axes = ("b", "pos", "width")
    if reduce in ("norm", "entropy"):
        axes = axes[:-1]
    elif reduce in ("top_k", "lens"):
        axes = (*axes[:-1], "k")
    elif reduce in ("last", "mean"):
        axes = tuple("one" if axis in ("pos", "query") else axis for axis in axes)
    return axes


def _trimmed(part: np.ndarray, axes: tuple[str, ...], count: int, fixed: bool) -> np.ndarray:
    for index, axis in enumerate(axes):
        if axis == "key" or (axis in ("pos", "query") and not fixed):
            part = part[(slice(None),) * index + (slice(count),)]
    return part


def _each(value: Value, function: Callable[[np.ndarray], np.ndarray]) -> Value:
    return Largest(*map(function, value)) if isinstance(value, Largest) else function(value)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a trace would take, before it is made."""

    nbytes: int
    """Of the arrays that the trace would hold."""
    cache: int
    """Of the KV cache that is needed meanwhile."""
    by_name: Mapping[str, int]
    """Of each hook point, and of the logits."""
    budget: int
    """What may be taken."""

    @property
    def fits(self) -> bool:
        """Whether both together are within the budget."""
        return self.nbytes + self.cache <= self.budget

    def __str__(self) -> str:
        found = {**self.by_name, "KV cache, meanwhile": self.cache}
        rows = [f"{size(count):>9}  {name}" for name, count in sorted(found.items(), key=lambda item: -item[1])]
        verdict, both = "within" if self.fits else "more than", size(self.nbytes + self.cache)
        return "\n".join([*rows, f"{both:>9}  in all, {verdict} the budget of {size(self.budget)}"])


def check_layers(trace: Trace, name: str) -> None:
    """Raises OptionError where not every layer of a hook point is held."""
    held = trace.layers(name) if name in trace else ()
    if len(held) != trace.n_layers:
        raise OptionError(f"this needs {name} of every layer; the trace holds {len(held)} of {trace.n_layers}")
