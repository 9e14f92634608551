"""Decoding: one answer alone, or several in one call."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from irkit.engine.runtime import BATCH
from irkit.transformer.sampling import everything

if TYPE_CHECKING:
    from irkit.engine.cache import Cache
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
        """What captures or edits is computed by itself."""
        return id(self) if self.tapping else (id(self.runtime), self.capacity)

    def together(self, steps: Sequence[Decode]) -> list[tuple[Sampled, dict[str, Any]]]:
        """What was drawn, `[token, 1]` on the host, and what was captured, for each of `steps`.

        Where one of them can draw but one token a call, so do those beside it.
        """
        top = any(step.top for step in steps)
        several = len(steps) > 1 and self.runtime.can_batch(self.capacity, top)
        batches = _arranged(self.runtime, self.capacity, [step.cache for step in steps]) if several else []
        drawn: dict[Cache, Sampled] = {}
        for batch in batches:
            drawn |= batch.decode([step for step in steps if step.cache.batch is batch], top)
        return [(drawn[step.cache], {}) if step.cache in drawn else alone(step) for step in steps]


def alone(step: Decode) -> tuple[Sampled, dict[str, Any]]:
    """What was drawn in a call of its own, and captured."""
    runtime, cache = step.runtime, step.cache
    arrays = room(runtime, cache, runtime.at_once)
    tokens, start = np.array([[step.token]], np.int32), np.array([len(cache.ids)], np.int32)
    how = step.settings, step.top, step.tapping, step.allowed
    cache.arrays, sampled, captures = runtime.decode(arrays, tokens, start, *how)
    return sampled, captures


class Batch:
    """A KV cache of several rows, each of which holds what belongs to one answer's `Cache` for the time being."""

    def __init__(self, runtime: Runtime, capacity: int) -> None:
        self._runtime = runtime
        self.capacity = capacity
        self.rows: list[Cache | None] = [None] * BATCH
        self._arrays = runtime.empty(capacity, BATCH)
        self._settings: tuple[list[Settings], Settings] | None = None

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

    def decode(self, steps: Sequence[Decode], top: bool) -> dict[Cache, Sampled]:
        """What was drawn for these, all of them in the batch.

        Whoever else is in it leaves: the other rows are computed for nothing, and written over.
        """
        for other in {*filter(None, self.rows)} - {step.cache for step in steps}:
            self.give_back(other)
        tokens, start = np.zeros((BATCH, 1), np.int32), np.zeros(BATCH, np.int32)
        settings, allowed = [steps[0].settings] * BATCH, None
        if any(step.allowed is not None for step in steps):
            allowed = everything(BATCH, self._runtime.config.d_vocab)
        for step in steps:
            row = self.rows.index(step.cache)
            tokens[row], start[row], settings[row] = step.token, len(step.cache.ids), step.settings
            if allowed is not None and step.allowed is not None:
                allowed[row] = step.allowed
        how = self._joined(settings), top, steps[0].tapping, allowed
        self._arrays, drawn, _ = self._runtime.decode(self._arrays, tokens, start, *how)
        rows = {step.cache: self.rows.index(step.cache) for step in steps}
        return {cache: jax.tree.map(lambda x, row=row: x[:, row : row + 1], drawn) for cache, row in rows.items()}

    def _joined(self, settings: list[Settings]) -> Settings:
        """Of all rows; they are the same from call to call, until an answer comes or goes."""
        if self._settings is None or any(a is not b for a, b in zip(self._settings[0], settings, strict=True)):
            self._settings = settings, jax.tree.map(lambda *each: jnp.concatenate(each), *settings)
        return self._settings[1]


def _arranged(runtime: Runtime, capacity: int, caches: Sequence[Cache]) -> list[Batch]:
    """The batches that these caches are in now: as few as can be, and none with a single one.

    Whoever is in a batch stays there, as long as it is not by itself.
    """
    for cache in caches:
        if cache.batch is not None and (cache.batch.capacity != capacity or len(cache.batch) == 1):
            cache.batch.give_back(cache)
    batches = [batch for batch in runtime.batches if batch.capacity == capacity]
    outside = [cache for cache in caches if cache.batch is None]
    for batch in batches:
        while outside and len(batch) < BATCH:
            batch.take_in(outside.pop(0))
    while len(outside) > 1:
        runtime.batches.append(batch := Batch(runtime, capacity))
        batches.append(batch)
        for cache in outside[:BATCH]:
            batch.take_in(cache)
        del outside[:BATCH]
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
