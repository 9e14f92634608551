"""A session's KV cache, as the engine keeps it between requests."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from irkit.transformer.cache import KVCache

SMALLEST = 512
"""Positions a cache starts with; it doubles from there, so that few shapes are ever compiled."""
LARGEST_STEP = 2048
"""By how many positions it grows once it has as many: doubling would soon be more than is needed."""
AHEAD = SMALLEST // 2
"""Tokens before the cache must grow at which the larger programs begin to be compiled."""


class Cache:
    """The arrays of a KV cache, and the tokens whose keys and values they hold.

    Only the device's thread touches the arrays. `n_ctx` is the most tokens it may ever hold.
    """

    def __init__(self, n_ctx: int) -> None:
        self.n_ctx = n_ctx
        self.arrays: KVCache | None = None
        self.ids: list[int] = []
        self.provenance: str | None = None
        """What edits went into it: None where there were none."""
        self.closed = threading.Event()
        """Set when its session closes: what is still to be computed with it ends."""

    def capacity(self, tokens: int) -> int:
        """Positions it has once `tokens` fit: what it has, or the next size; never past `n_ctx`."""
        size = 1 << (tokens - 1).bit_length()
        if size > LARGEST_STEP:
            size = -(-tokens // LARGEST_STEP) * LARGEST_STEP
        return min(max(SMALLEST, size, self.arrays.capacity if self.arrays else 0), self.n_ctx)

    def keep_prefix_of(self, ids: Sequence[int], provenance: str | None = None) -> int:
        """Forget what does not begin `ids`, and the last of `ids`, whose logits are wanted; how many stay.

        Nothing stays of what other edits went into: an edited cache never serves a clean run.
        """
        if provenance != self.provenance:
            self.ids, self.provenance = [], provenance
        most = min(len(self.ids), len(ids) - 1)
        same = next((n for n in range(most) if self.ids[n] != ids[n]), most)
        del self.ids[same:]
        return same

    def clear(self) -> None:
        """Forget every token, and free the memory."""
        self.ids = []
        self.provenance = None
        self.arrays = None
