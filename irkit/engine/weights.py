"""From the tensors of a file to the decoder's parameters in memory, as the chosen kernels read them."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
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

# What one thread packs at a time: the embedding is a fifth of a small model.
_ROWS_AT_ONCE = 1 << 13


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

    def one(plan: Plan) -> Callable[[], Any]:
        if plan.form is not None and kernels is not None:
            return _pack(file, plan, kernels, places[plan.weight.name], pool)
        room = places.get(plan.weight.name)
        out = None if room is None else room.view(np.float32).reshape(plan.weight.shape)
        return pool.submit(families.read_weight, file, plan.weight, out).result

    return jax.tree.map(one, plans)


def total(plans: Any) -> int:
    """The memory that the plans' parameters take together."""
    return sum(plan.nbytes for plan in jax.tree.leaves(plans))


def _pack(file: File, plan: Plan, kernels: CDLL, out: np.ndarray, pool: Executor) -> Callable[[], np.ndarray]:
    weight, info = plan.weight, families.tensor(file, plan.weight)
    rows, cols = info.shape
    order = families.unpaired_rows(weight).astype(np.int32) if weight.paired_heads else None
    panels = range(0, -(-rows // packing.PANEL_ROWS), _ROWS_AT_ONCE // packing.PANEL_ROWS)
    parts = [
        pool.submit(
            packing.pack,
            kernels,
            file.raw(weight.name),
            info.format,
            (rows, cols),
            out,
            order,
            range(first, min(first + panels.step, panels.stop)),
        )
        for first in panels
    ]

    def result() -> np.ndarray:
        packed = [part.result() for part in parts]
        if not all(packed):
            raise UnsupportedModelError(
                f"{file.path}: tensor {weight.name!r} has scales too large for the CPU kernels; use precision exact"
            )
        file.forget(weight.name)  # both copies of a model need not be in memory at once
        return out

    return result


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
