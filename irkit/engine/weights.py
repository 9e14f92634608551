"""From the tensors of a file to the decoder's parameters in memory, as the chosen kernels read them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from irkit import families
from irkit.errors import UnsupportedModelError
from irkit.kernels.cpu import packing

if TYPE_CHECKING:
    from ctypes import CDLL

    from irkit.families import Weight
    from irkit.gguf import File

# What one thread reads at a time: enough not to wait for Python's lock often, little enough to be shared evenly.
_BYTES_AT_ONCE = 8 << 20


@dataclass(frozen=True)
class Plan:
    """How a parameter will lie in memory."""

    weight: Weight
    form: str | None
    """The packed form, or None: float32."""

    @property
    def nbytes(self) -> int:
        """The memory it takes."""
        if self.form is None:
            return math.prod(self.weight.shape) * 4
        rows, cols = self.weight.shape
        return packing.packed_bytes(self.form, (rows, cols))


def plan(file: File, weights: Any, kernels: CDLL | None) -> Any:
    """A `Plan` for each of the tree's weights, None where the model has none; matrices packed for the `kernels`.

    Raises:
        ModelFileError, UnsupportedModelError: a tensor is missing, has another shape or a format unknown here.
    """

    def one(weight: Weight) -> Plan | None:
        if not weight.is_in(file):
            return None
        if weight.derive is not None:
            return Plan(weight, None)
        info = families.tensor(file, weight)
        if kernels is None or len(info.shape) != 2:
            return Plan(weight, None)
        return Plan(weight, packing.form_of(kernels, info.format, (info.shape[0], info.shape[1])))

    return jax.tree.map(one, weights)


def read(file: File, plans: Any, kernels: CDLL | None, pool: Executor) -> Any:
    """Begin reading on the pool's threads: for each plan a function that waits for its value.

    That is a float32 array, or a uint8 one of what is packed.
    """
    places = _places(plans)
    parts = [pool.submit(_read, file, pieces, kernels, places) for pieces in _groups(plans)]

    @cache
    def values() -> dict[str, Any]:
        return {name: value for part in parts for name, value in part.result().items()}

    return jax.tree.map(lambda plan: lambda: values()[plan.weight.name], plans)


def total(plans: Any) -> int:
    """The memory that the plans' parameters take together."""
    return sum(plan.nbytes for plan in jax.tree.leaves(plans))


def _groups(plans: Any) -> Iterator[list[tuple[Plan, range | None]]]:
    """The plans, in groups of some size; of what is packed, with the panels that belong to the group."""
    group, size = [], 0
    for plan in jax.tree.leaves(plans):
        panels, step = range(1), 1
        if plan.form is not None:
            panels = range(-(-plan.weight.shape[0] // packing.PANEL_ROWS))
            step = max(1, len(panels) * _BYTES_AT_ONCE // plan.nbytes)
        for first in range(0, len(panels), step):
            piece = panels[first : first + step]
            group.append((plan, None if plan.form is None else piece))
            size += plan.nbytes * len(piece) // len(panels)
            if size >= _BYTES_AT_ONCE:
                yield group
                group, size = [], 0
    yield group


def _read(
    file: File, pieces: list[tuple[Plan, range | None]], kernels: CDLL | None, places: dict[str, np.ndarray]
) -> dict[str, Any]:
    """The values of some weights, by name."""
    values: dict[str, Any] = {}
    packed, tasks = [], []
    for plan, panels in pieces:
        weight, room = plan.weight, places.get(plan.weight.name)
        if panels is None or kernels is None or room is None:
            out = None if room is None else room.view(np.float32).reshape(weight.shape)
            values[weight.name] = families.read_weight(file, weight, out)
            continue
        info = families.tensor(file, weight)
        order = families.unpaired_rows(weight).astype(np.int32) if weight.paired_heads else None
        rows, cols = info.shape
        packed.append(weight.name)
        tasks.append(packing.task(kernels, file.raw(weight.name), info.format, (rows, cols), room, order, panels))
        values[weight.name] = room
    if kernels is not None and not all(fits := packing.pack_all(kernels, tasks)):
        raise UnsupportedModelError(
            f"{file.path}: tensor {packed[fits.index(False)]!r} has scales too large for the CPU kernels; "
            "use precision exact"
        )
    for name in packed:
        file.forget(name)  # both copies of a model need not be in memory at once
    return values


def _places(plans: Any) -> dict[str, np.ndarray]:
    """Room for each tensor in one piece of memory, each at a multiple of 64 bytes, as XLA wants it.

    Linux gives one large piece in large pages: touched for the first time, it costs a third of many small ones.
    """
    found = [plan for plan in jax.tree.leaves(plans) if plan.weight.derive is None]
    sizes = [-(-plan.nbytes // 64) * 64 for plan in found]
    arena = np.empty(sum(sizes) + 64, np.uint8)
    start = -arena.ctypes.data % 64
    places = {}
    for plan, size in zip(found, sizes, strict=True):
        places[plan.weight.name] = arena[start : start + plan.nbytes]
        start += size
    return places
