"""Edits: what to change in a forward pass, as plain values. `Session.trace`, `generate` and the others take them.

What an edit is made of reaches the compiled program as arrays: another strength, layer, head or position compiles
nothing; only another kind of edit, or a function, does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from irkit.errors import OptionError

if TYPE_CHECKING:
    from irkit.trace import Trace

Chosen = int | slice | Sequence[int] | None
"""Layers, heads or positions: one, a slice, several, or (None) all; negative ones count from the end."""


@dataclass(frozen=True, eq=False)
class Edit:
    """One change at one kind of hook point; made by `steer`, `scale`, `ablate`, `patch` and `call`."""

    name: str
    """Of the hook point: `resid_post`, `attn.hook_z`, or a full name with its layer."""
    op: Literal["add", "scale", "set", "call"]
    value: np.ndarray | None = None
    """What is added or set: `[width]`, `[head, width]`, or the hook point's own `[b, pos, ...]`; or factors, `[layer]`
    or `[layer, head]`."""
    strength: float = 1.0
    layers: Chosen = None
    heads: Chosen = None
    positions: Chosen = None
    """Of the whole text, the made tokens included; negative ones count from the end of the prompt."""
    function: Callable[..., Any] | None = None

    def __repr__(self) -> str:
        given = {"strength": self.strength, "layers": self.layers, "heads": self.heads, "positions": self.positions}
        if self.op == "scale" and self.value is not None:
            given["changed"] = int(np.sum(self.value != 1))
        shown = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
        return f"{self.op}({self.name!r}, {shown})"


def steer(
    vector: Any, layers: Chosen, strength: float = 1.0, positions: Chosen = None, name: str = "resid_post"
) -> Edit:
    """Add `strength` times a vector `[d_model]` to the stream that leaves `layers` (arXiv:2308.10248)."""
    return Edit(name, "add", np.asarray(vector, np.float32), float(strength), layers, None, positions)


def scale(name: str, factor: Any, layers: Chosen = None, heads: Chosen = None, positions: Chosen = None) -> Edit:
    """Multiply what stands at the hook point by `factor`: a number, or one for each layer of the model, `[layer]`, or
    each of its heads, `[layer, head]`."""
    if np.ndim(factor) == 0:
        return Edit(name, "scale", None, float(factor), layers, heads, positions)
    return Edit(name, "scale", np.asarray(factor, np.float32), 1.0, layers, heads, positions)


def ablate(name: str, layers: Chosen = None, heads: Chosen = None, positions: Chosen = None, mean: Any = None) -> Edit:
    """Set what stands at the hook point to zero, or to `mean`.

    `ablate("z", layers=5, heads=1)` takes a head out, `ablate("mlp_out", layers=5)` an MLP; `mean` is `[width]`,
    `[head, width]` or the hook point's own shape.
    """
    if mean is None:
        return Edit(name, "scale", None, 0.0, layers, heads, positions)
    return Edit(name, "set", np.asarray(mean, np.float32), 1.0, layers, heads, positions)


def patch(trace: Trace, name: str, layer: int, heads: Chosen = None, positions: Chosen = None) -> Edit:
    """Put in what `trace` captured at the hook point of `layer`: activation patching (Meng et al., arXiv:2202.05262).

    Raises:
        KeyError: the trace does not hold it.
    """
    return Edit(name, "set", np.asarray(trace[name, layer], np.float32), 1.0, layer, heads, positions)


def call(name: str, function: Callable[..., Any], layers: Chosen = None) -> Edit:
    """Put in what `function(value, hook)` returns, a jax function that is traced; None leaves the value."""
    return Edit(name, "call", layers=layers, function=function)


def parse(edits: Sequence[Any] | None) -> tuple[Edit, ...]:
    """Edits as given from a program, or as JSON: `{"op": "steer", "vector": [...], "layers": 12, "strength": 2}`.

    Raises:
        OptionError: one is of no known kind, or its words are wrong.
    """
    if isinstance(edits, Edit | Mapping):
        edits = [edits]
    return tuple(_parsed(edit) for edit in edits or ())


def _parsed(edit: Any) -> Edit:
    if isinstance(edit, Edit):
        return edit
    from irkit import options  # pydantic takes longer to import than irkit

    kinds = {"steer": (options.SteerWords, steer), "scale": (options.ScaleWords, scale)}
    kinds |= {"ablate": (options.AblateWords, ablate)}
    op = edit.get("op") if isinstance(edit, Mapping) else None
    if not isinstance(op, str) or op not in kinds:
        raise OptionError(f"edits: one of {', '.join(kinds)} is needed as op, got {str(edit)[:80]}")
    words, make = kinds[op]
    try:
        given = options.parse(words, {name: value for name, value in edit.items() if name != "op"})
        with np.errstate(over="ignore"):  # infinity is refused where the value is laid out
            return make(**dict(given))
    except (TypeError, ValueError, OverflowError) as error:  # numpy's too, of lists that are no array
        raise OptionError(f"edits: {op}: {error}") from None
