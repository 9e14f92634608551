"""From the tensors of a file to the decoder's parameters in memory, as the chosen kernels read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np

from irkit import families, gguf
from irkit.errors import UnsupportedModelError
from irkit.kernels.cpu import packing

if TYPE_CHECKING:
    from ctypes import CDLL

    from irkit.families import Weight
    from irkit.gguf import File

Array: TypeAlias = np.ndarray[Any, Any]
# What one thread reads at a time: enough not to wait for Python's lock often, little enough to be shared evenly.
_BYTES_AT_ONCE = 24 << 20
_CACHE_LINE = 64


@dataclass(frozen=True)
class Plan:
    """How a parameter will lie in memory."""

    weight: Weight
    form: str | None
    """The packed form, or None: float32."""
    start: int | None = None
    """The byte at which it begins in the memory of all; None for what is derived, and not read."""

    @property
    def nbytes(self) -> int:
        """The memory it takes."""
        if self.form is None:
            return math.prod(self.weight.shape) * 4
        rows, cols = self.weight.shape
        return packing.packed_bytes(self.form, (rows, cols))


def plan(file: File, weights: Any, kernels: CDLL | None, *, exact: bool = False) -> Any:
    """A `Plan` for each of the tree's weights, None where the model has none; matrices packed for the `kernels`.

    Where it is to be `exact`, they are packed as the float32 numbers that the file's stand for.

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
        known = "F32" if exact else info.format
        return Plan(weight, packing.form_of(kernels, known, (info.shape[0], info.shape[1])))

    plans = jax.tree.map(one, weights)
    starts, end = dict[str, int](), 0
    for each in sorted(jax.tree.leaves(plans), key=lambda each: each.form is None):  # what is packed comes first
        if each.weight.derive is None:
            starts[each.weight.name] = end
            end += -(-each.nbytes // _CACHE_LINE) * _CACHE_LINE
    return jax.tree.map(lambda each: replace(each, start=starts.get(each.weight.name)), plans)


def total(plans: Any, *, packed: bool = False) -> int:
    """The memory in which the plans' parameters lie, or only those that are packed."""
    chosen = [each for each in jax.tree.leaves(plans) if each.form is not None or not packed]
    ends = [each.start + each.nbytes for each in chosen if each.start is not None]
    return -(-max(ends, default=0) // _CACHE_LINE) * _CACHE_LINE


def read(
    file: File, plans: Any, kernels: CDLL | None, threads: int, show: Callable[[float], None]
) -> tuple[Array, dict[str, Array]]:
    """The memory of all parameters, as bytes, and the float32 ones by name, most of which lie in it.

    Linux gives one large piece in large pages: touched for the first time, it costs a third of many small ones.
    `show` is told now and then which fraction has been read.
    """
    size = total(plans)
    memory = np.empty(size + _CACHE_LINE, np.uint8)
    memory = memory[-memory.ctypes.data % _CACHE_LINE :][:size]  # as XLA wants it, or it would copy
    values: dict[str, Array] = {}
    groups = list(_groups(plans))
    with ThreadPoolExecutor(threads, thread_name_prefix="irkit-read") as pool:
        parts = [pool.submit(_read, file, pieces, kernels, memory) for pieces in groups]
        for number, part in enumerate(parts, 1):
            values |= part.result()
            show(number / len(parts))
    return memory, values


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


def _read(file: File, pieces: list[tuple[Plan, range | None]], kernels: CDLL | None, memory: Array) -> dict[str, Any]:
    """Read some parameters into their places; those that are not packed, by name."""
    values: dict[str, Any] = {}
    packed, tasks = [], []
    for plan, panels in pieces:
        weight, room = plan.weight, None if plan.start is None else memory[plan.start : plan.start + plan.nbytes]
        if panels is None or kernels is None or room is None:
            out = None if room is None else room.view(np.float32).reshape(weight.shape)
            values[weight.name] = families.read_weight(file, weight, out)
            continue
        info = families.tensor(file, weight)
        packed.append(weight.name)
        if plan.form == "f32" and info.format != "F32":
            tasks.append(_dequantized(file, plan, panels, kernels, room))
            continue
        order = families.unpaired_rows(weight).astype(np.int32) if weight.paired_heads else None
        rows, cols = info.shape
        tasks.append(packing.task(kernels, file.raw(weight.name), info.format, (rows, cols), room, order, panels))
    if kernels is not None and not all(fits := packing.pack_all(kernels, tasks)):
        raise UnsupportedModelError(
            f"{file.path}: tensor {packed[fits.index(False)]!r} has scales too large for the CPU kernels; "
            "use precision exact"
        )
    for name in packed:
        file.forget(name)  # both copies of a model need not be in memory at once
    return values


def _dequantized(file: File, plan: Plan, panels: range, kernels: CDLL, room: Array) -> packing.Task:
    """The packing of these panels' rows, turned into float32 here."""
    weight, (rows, cols) = plan.weight, plan.weight.shape
    chosen = range(rows)[panels.start * packing.PANEL_ROWS : panels.stop * packing.PANEL_ROWS]
    raw = file.raw(weight.name).reshape(rows, -1)
    raw = raw[families.unpaired_rows(weight)[chosen]] if weight.paired_heads else raw[chosen.start : chosen.stop]
    shape = len(chosen), cols
    values = gguf.dequantize(raw.reshape(-1), families.tensor(file, weight).format, shape)
    panel = packing.packed_bytes("f32", (1, cols))
    mine = room[panels.start * panel : panels.stop * panel]
    return packing.task(kernels, values.reshape(-1).view(np.uint8), "F32", shape, mine)
