"""Decoding: one answer alone, or several in one call."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from irkit.engine.tapping import joined
from irkit.transformer.sampling import everything
from irkit.transformer.taps import POINTS, Operands, split

if TYPE_CHECKING:
    from irkit.engine.cache import Cache
    from irkit.engine.programs import Program
    from irkit.engine.runtime import Runtime
    from irkit.engine.tapping import Tapping
    from irkit.transformer.cache import KVCache
    from irkit.transformer.sampling import Sampled, Settings


@dataclass(frozen=True, eq=False)
class Decode:
    """The step of an answer that reads `token` and draws the next `runtime.at_once`, or one of those `allowed`."""

    runtime: Runtime
    cache: Cache
    token: int
    settings: Settings
    top: bool
    tapping: Tapping
    allowed: np.ndarray | None = None
    """A bit for each token that may be drawn: uint32 `[1, w]`."""

    @property
    def capacity(self) -> int:
        """Positions that the cache needs for it."""
        return self.cache.capacity(len(self.cache.ids) + self.runtime.at_once)

    @property
    def kind(self) -> Hashable:
        """Those that capture and edit the same hook points are computed together, but where a function does it: it may
        know of one answer only."""
        if self.tapping.spec.calls:
            return id(self)
        return id(self.runtime), self.capacity, self.tapping.kind(self.capacity)

    @property
    def operands(self) -> Operands:
        """Of its tapping, for the token that is read."""
        return self.tapping.operands(self.capacity, len(self.cache.ids), 1)

    @property
    def program(self) -> Future[Program]:
        """What computes it alone."""
        return self.runtime.decoder(self.capacity, self.top, self.tapping.spec, self.operands)

    def together(self, steps: Sequence[Decode]) -> list[tuple[Sampled, dict[str, Any]]]:
        """What was drawn, `[token, 1]` on the host, and what was captured, for each of `steps`.

        Where one of them can draw but one token a call, so do those beside it.
        """
        made: dict[Cache, tuple[Sampled, dict[str, Any]]] = {}
        if len(steps) > 1:
            top = any(step.top for step in steps)
            how = top, self.tapping.spec, self.operands
            sizes = [size for size in self.runtime.batch_sizes if self.runtime.can_batch(size, self.capacity, *how)]
            for batch in _arranged(self, [step.cache for step in steps], sizes):
                made |= batch.decode([step for step in steps if step.cache.batch is batch], top)
        return [made.get(step.cache) or alone(step) for step in steps]


def alone(step: Decode) -> tuple[Sampled, dict[str, Any]]:
    """What was drawn in a call of its own, and captured."""
    runtime, cache = step.runtime, step.cache
    arrays = room(runtime, cache, runtime.at_once)
    tokens, start = np.array([[step.token]], np.int32), np.array([len(cache.ids)], np.int32)
    taps = step.tapping.spec, step.tapping.operands(arrays.capacity, len(cache.ids), 1)
    how = step.settings, step.top, *taps, step.allowed
    cache.arrays, sampled, captures = runtime.decode(arrays, tokens, start, *how)
    return sampled, captures


class Batch:
    """A KV cache of several rows, each of which holds what belongs to one answer's `Cache` for the time being."""

    def __init__(self, first: Decode, size: int) -> None:
        """Of `size` rows, for steps of the kind of `first`."""
        self._runtime = first.runtime
        self.kind = first.kind
        self.capacity = first.capacity
        self.rows: list[Cache | None] = [None] * size
        self._arrays = self._runtime.empty(self.capacity, size)
        self._joined: tuple[list[Any], Settings, Operands] | None = None

    def __len__(self) -> int:
        return sum(row is not None for row in self.rows)

    def take_in(self, cache: Cache) -> None:
        """Hold what `cache` holds; there is a free row."""
        row = self.rows.index(None)
        self._arrays = self._runtime.put_row(self._arrays, room(self._runtime, cache, 0, self.capacity), row)
        self.rows[row] = cache
        cache.own(None)
        cache.batch = self

    def give_back(self, cache: Cache) -> None:
        """Let `cache` hold its content itself again."""
        cache.own(self._runtime.take_row(self._arrays, self.rows.index(cache)))
        self.forget(cache)

    def forget(self, cache: Cache) -> None:
        """Free the row of `cache`."""
        self.rows[self.rows.index(cache)] = cache.batch = None
        if not len(self):
            self._runtime.batches.remove(self)

    def decode(self, steps: Sequence[Decode], top: bool) -> dict[Cache, tuple[Sampled, dict[str, Any]]]:
        """What was drawn and captured for these, all of them in the batch.

        Whoever else is in it leaves: the other rows are computed for nothing, and written over.
        """
        for other in {*filter(None, self.rows)} - {step.cache for step in steps}:
            self.give_back(other)
        size = len(self.rows)
        tokens, start, by_row = np.zeros((size, 1), np.int32), np.zeros(size, np.int32), [steps[0]] * size
        allowed = None
        if any(step.allowed is not None for step in steps):
            allowed = everything(size, self._runtime.config.d_vocab)
        for step in steps:
            row = self.rows.index(step.cache)
            tokens[row], start[row], by_row[row] = step.token, len(step.cache.ids), step
            if allowed is not None and step.allowed is not None:
                allowed[row] = step.allowed
        settings, operands = self._of_all(by_row)
        how = settings, top, steps[0].tapping.spec, operands, allowed
        self._arrays, drawn, captures = self._runtime.decode(self._arrays, tokens, start, *how)
        made = {}
        for step in steps:
            row = self.rows.index(step.cache)
            mine = jax.tree.map(lambda x, row=row: x[:, row : row + 1], drawn)
            made[step.cache] = mine, {name: _of_row(name, value, row) for name, value in captures.items()}
        return made

    def _of_all(self, steps: Sequence[Decode]) -> tuple[Settings, Operands]:
        """Of all rows; they are the same from call to call, until an answer comes or goes."""
        now = [each for step in steps for each in (step.settings, step.tapping)]
        if self._joined is None or any(a is not b for a, b in zip(self._joined[0], now, strict=True)):
            settings = jax.tree.map(lambda *each: jnp.concatenate(each), *(step.settings for step in steps))
            self._joined = now, settings, joined([step.operands for step in steps])
        return self._joined[1:]


def _of_row(name: str, captured: Any, row: int) -> Any:
    """What was captured of one row: a copy, or the memory of all rows would be held as long as it."""
    point, layer = split(name)
    # Its first axis is the token's, and the second the layer's, where all layers are in one array.
    axis = 2 if layer is None and POINTS[point].per_layer else 1
    return jax.tree.map(lambda x: np.take(np.asarray(x), [row], axis), captured)


def _arranged(first: Decode, caches: Sequence[Cache], sizes: Sequence[int]) -> list[Batch]:
    """The batches that these caches, for steps of the kind of `first`, are in now: as few as can be of these sizes,
    and none with a single one.

    Whoever is in a batch stays there, as long as at least half of it is used.
    """
    kind, largest = first.kind, max(sizes, default=0)
    for cache in caches:
        held = cache.batch
        if held is not None and (held.kind != kind or len(held.rows) not in sizes or 2 * len(held) < len(held.rows)):
            held.give_back(cache)
    batches = [batch for batch in first.runtime.batches if batch.kind == kind and len(batch.rows) in sizes]
    outside = [cache for cache in caches if cache.batch is None]
    for batch in sorted(batches, key=lambda batch: -len(batch.rows)):
        while outside and len(batch) < len(batch.rows):
            batch.take_in(outside.pop(0))
        if outside and len(batch.rows) < largest:  # it is full, and there is a larger size
            batches.remove(batch)
            for cache in filter(None, tuple(batch.rows)):
                batch.give_back(cache)
            outside = [cache for cache in caches if cache.batch is None]
    while len(outside) > 1 and sizes:
        size = next((size for size in sizes if size >= len(outside)), largest)
        batches.append(batch := Batch(first, size))
        first.runtime.batches.append(batch)
        for cache in outside[:size]:
            batch.take_in(cache)
        del outside[:size]
    return batches


def room(runtime: Runtime, cache: Cache, tokens: int, least: int = 0) -> KVCache:
    """The cache's arrays, its own, of at least this capacity and with room for as many more tokens: they are about to
    be written to, or taken over."""
    cache.leave_batch()
    capacity = max(least, cache.capacity(len(cache.ids) + tokens))
    if cache.arrays is None:
        cache.own(runtime.empty(capacity))
    elif cache.arrays.capacity < capacity:
        cache.own(runtime.grow(cache.arrays, capacity))
    elif cache.shared:
        cache.own(jax.tree.map(jnp.copy, cache.arrays))
    assert cache.arrays is not None
    return cache.arrays
