"""A session's KV cache, as the engine keeps it between requests."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakSet

if TYPE_CHECKING:
    from irkit.engine.batch import Batch
    from irkit.transformer.cache import KVCache

SMALLEST = 512
"""Positions a cache starts with; it doubles from there, so that few shapes are ever compiled."""
LARGEST_STEP = 2048
"""By how many positions it grows once it has as many: doubling would soon be more than is needed."""
AHEAD = SMALLEST // 2
"""Tokens before the cache must grow at which the larger programs begin to be compiled."""
KEPT = 8
"""Caches of ended answers that a model keeps for others."""


class Cache:
    """The arrays of a KV cache, and the tokens whose keys and values they hold.

    Only the device's thread touches the arrays. `n_ctx` is the most tokens it may ever hold. Forks share their arrays
    until one of them writes: the compiled programs take over the arrays that they are given, so whoever is about to
    call one asks `shared` first, and copies.
    """

    def __init__(self, n_ctx: int) -> None:
        self.n_ctx = n_ctx
        self.arrays: KVCache | None = None
        self.batch: Batch | None = None
        """What holds the content instead of `arrays` while an answer is decoded beside others."""
        self.ids: list[int] = []
        self.provenance: str | None = None
        """What edits went into it: None where there were none. What nothing else has is never reused: see `mark`."""
        self.unedited = 0
        """How many of the first tokens are as a clean cache would hold them, where it is none."""
        self._sharing: WeakSet[Cache] = WeakSet([self])
        self.closed = threading.Event()
        """Set when its session closes: what is still to be computed with it ends."""

    def capacity(self, tokens: int) -> int:
        """Positions it has once `tokens` fit: what it has, or the next size; it never grows past `n_ctx`."""
        size = 1 << (tokens - 1).bit_length()
        if size > LARGEST_STEP:
            size = -(-tokens // LARGEST_STEP) * LARGEST_STEP
        held = self.arrays if self.batch is None else self.batch
        return max(min(max(SMALLEST, size), self.n_ctx), 0 if held is None else held.capacity)

    def keep_prefix_of(self, ids: Sequence[int], provenance: str | None = None) -> int:
        """Forget what does not begin `ids`, and the last of `ids`, whose logits are wanted; how many stay.

        Nothing stays of what other edits went into: an edited cache never serves a clean run.
        """
        if provenance != self.provenance:
            del self.ids[0 if provenance else self.unedited :]
            self.provenance, self.unedited = provenance, 0
        same = min(self.in_common(ids), len(ids) - 1)
        del self.ids[same:]
        return same

    def in_common(self, ids: Sequence[int]) -> int:
        """How many of the first `ids` it holds."""
        most = min(len(self.ids), len(ids))
        return next((n for n in range(most) if self.ids[n] != ids[n]), most)

    def go_on(self, ids: Sequence[int], provenance: str | None) -> int:
        """Keep all it holds, which begins `ids`, but for the last of `ids`; how many stay.

        Whatever has gone into it; where edits of this `provenance` are others, it is reused by nobody from then on.
        """
        self.rewind(len(self.ids) - len(ids) + 1)
        if not self.ids:
            self.provenance = provenance
        elif provenance != self.provenance:
            self.mark("edited" if provenance else self.kind)
        return len(self.ids)

    @property
    def kind(self) -> str:
        """What its provenance says: `clean`, `edited`, `dropped`, or `dropped and edited`."""
        if self.provenance is None:
            return "clean"
        kind, _, own = self.provenance.partition(":")
        return kind if own else "edited"

    def mark(self, kind: str, start: int | None = None) -> None:
        """Note what was done to it, or will be, from the position `start` on, or its end, beside what was already: no
        prompt will find the same provenance again, but for one without edits, which finds what is before that."""
        before = len(self.ids) if self.provenance is None else self.unedited
        self.unedited = before if start is None else min(before, start)
        kinds = {*kind.split(" and "), *self.kind.split(" and ")} - {"clean"}
        self.provenance = f"{' and '.join(sorted(kinds))}:{secrets.token_hex(8)}"

    def rewind(self, tokens: int) -> None:
        """Forget the last `tokens`; where only what no edit went into is left, the cache is clean."""
        del self.ids[max(len(self.ids) - tokens, 0) :]
        if len(self.ids) <= self.unedited:
            self.provenance, self.unedited = None, 0

    def fork(self) -> Cache:
        """Another cache of the same content, which shares the arrays until either is written to."""
        made = Cache(self.n_ctx)
        made.adopt(self)
        return made

    def adopt(self, other: Cache) -> None:
        """Hold what `other` holds, and share its arrays."""
        self.own(other.arrays)
        self.ids, self.provenance, self.unedited = list(other.ids), other.provenance, other.unedited
        if other.arrays is not None:
            self._sharing = other._sharing
            self._sharing.add(self)

    @property
    def shared(self) -> bool:
        """Whether the arrays must be copied before they are written to."""
        return len(self._sharing) > 1

    def own(self, arrays: KVCache | None) -> None:
        """Hold these arrays, which no other cache holds."""
        self._sharing.discard(self)
        self._sharing, self.arrays = WeakSet([self]), arrays

    def leave_batch(self) -> None:
        """Hold the content itself."""
        if self.batch is not None:
            self.batch.give_back(self)

    def clear(self) -> None:
        """Forget every token, and free the memory."""
        if self.batch is not None:
            self.batch.forget(self)
        self.ids = []
        self.provenance, self.unedited = None, 0
        self.own(None)


class Pool:
    """The caches of answers that have ended, for those to come that begin alike."""

    def __init__(self) -> None:
        self._idle: list[Cache] = []

    def take(self, ids: Sequence[int], provenance: str | None, n_ctx: int) -> Cache:
        """A cache for an answer to `ids`: of the idle ones that begin most like it, or an empty one.

        One that goes on beyond what they have in common stays, and is forked; so is one that leaves nothing of `ids` to
        read but the last, as the same may be asked again.
        """
        best, most = None, 0
        for cache in self._idle:
            same = cache.in_common(ids) if cache.provenance == provenance and len(cache.ids) <= n_ctx else 0
            if same > most:
                best, most = cache, same
        if best is None:
            return Cache(n_ctx)
        if most < len(best.ids) or most >= len(ids) - 1:
            best = best.fork()
        else:
            self._idle.remove(best)
        best.n_ctx = n_ctx
        return best

    def put(self, cache: Cache) -> None:
        """Keep what an answer leaves, in the place of what it begins with; the oldest goes."""
        if cache.ids:
            self._idle = [other for other in self._idle if not _begins(cache, other)]
            self._idle.append(cache)
            del self._idle[:-KEPT]

    def clear(self) -> None:
        """Let go of all of them."""
        self._idle.clear()


def _begins(cache: Cache, other: Cache) -> bool:
    """Whether `cache` begins with all that `other` holds."""
    return cache.provenance == other.provenance and cache.in_common(other.ids) == len(other.ids)
