"""`CacheView`: a session's KV cache, or a fork of one, as its user sees it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from irkit.engine import cachefile
from irkit.errors import ContextFullError, OptionError
from irkit.options import check
from irkit.trace import size

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from irkit.edits import Chosen
    from irkit.engine.cache import Cache
    from irkit.engine.model import Model
    from irkit.widgets.cache import CacheWidget

_Result = TypeVar("_Result")


class CacheView:
    """The tokens in a KV cache, with their keys and values.

    `Session.cache` is the session's own, and shows what it holds when everything asked of the session so far has been
    computed; `fork` gives one that only its owner changes. Positions are counted from the text's first token. The
    last token of an answer is made but not yet read, so it is not in the cache.
    """

    def __init__(self, model: Model, cache: Cache) -> None:
        self._model = model
        self._cache = cache

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids of the tokens that it holds."""
        return self._do(lambda: tuple(self._cache.ids))

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens' own texts."""
        return tuple(map(self._model.tokenizer.token, self.ids))

    strings = tokens

    @property
    def n_layers(self) -> int:
        """How many layers it has keys and values of."""
        return self._model.config.n_layers

    @property
    def capacity(self) -> int:
        """Positions that there is memory for; it grows up to `n_ctx`."""
        return self._do(lambda: self._cache.arrays.capacity if self._cache.arrays else 0)

    @property
    def n_ctx(self) -> int:
        """The most tokens it may hold."""
        return self._cache.n_ctx

    @property
    def nbytes(self) -> int:
        """The memory of its arrays, which forks share until they are written to."""
        return self._do(lambda: _nbytes(self._cache))

    @property
    def provenance(self) -> str:
        """What went into it: `clean`, `edited`, `dropped` (from its middle), or `dropped and edited`.

        Only a clean cache serves a prompt without edits; `Session.continue_from` goes on from any.
        """
        return self._do(lambda: self._cache.kind)

    def keys(self, layer: int, head: int | None = None) -> np.ndarray:
        """A layer's keys, rotated to their positions: float32 `[kv_head, position, d_head]`, or without the first axis
        of one head. They are a copy.

        Raises:
            OptionError: there is no such layer or head.
        """
        return self._part("keys", layer, head)

    def values(self, layer: int, head: int | None = None) -> np.ndarray:
        """A layer's values: float32 `[kv_head, position, d_head]`, or without the first axis of one head.

        Raises:
            OptionError: there is no such layer or head.
        """
        return self._part("values", layer, head)

    def lengths(self) -> np.ndarray:
        """The lengths of keys and values: float32 `[2, layer, kv_head, position]`, keys first.

        A layer at a time is looked at, so that nothing larger than that is copied.
        """
        kept = self.fork()
        parts = (kept.keys, kept.values)
        found = [[np.linalg.norm(part(layer), axis=-1) for layer in range(self.n_layers)] for part in parts]
        return np.array(found, np.float32)

    def shares_memory(self, other: CacheView) -> bool:
        """Whether both have the same arrays, as forks have until one of them is written to."""
        return self._do(lambda: self._cache.arrays is not None and other._cache in self._cache._sharing)

    def fork(self) -> CacheView:
        """The cache as it is now, which nothing the session computes changes.

        Put it back with `session.cache = fork`, also into another session of the same model and options. It takes no
        time and no memory until one of the two is written to, which then copies the arrays first. It keeps the model
        in memory.
        """
        return CacheView(self._model, self._do(self._cache.fork))

    def rewind(self, tokens: int) -> None:
        """Forget the last `tokens`: nothing is computed.

        Raises:
            OptionError: there are fewer, or it is negative.
        """

        tokens = check(int, "tokens", tokens)

        def job() -> None:
            held = len(self._cache.ids)
            if not 0 <= tokens <= held:
                raise OptionError(f"rewind: {tokens} is not between 0 and the {held} tokens in the cache")
            self._cache.rewind(tokens)

        self._do(job)

    def drop(self, positions: Chosen) -> None:
        """Forget the tokens at these positions: one, a slice or several; negative ones count from the end.

        Those behind them move up: their keys are rotated to their new positions, values stay. The tokens that had read
        the dropped ones are not computed again, so only `Session.continue_from` goes on from here, unless everything
        up to the end was dropped, which is a `rewind`.

        Raises:
            OptionError: there is no such position.
        """
        runtime = self._model.load()

        def job() -> None:
            cache = self._cache
            gone = set(_chosen(positions, len(cache.ids), "positions"))
            left = [position for position in range(len(cache.ids)) if position not in gone]
            if left != list(range(len(left))):
                assert cache.arrays is not None
                origin = np.arange(cache.arrays.capacity)
                origin[: len(left)] = left
                cache.own(runtime.result().move(cache.arrays, origin))
                cache.ids = [cache.ids[position] for position in left]
                cache.mark("dropped", min(gone))
            else:
                cache.rewind(len(gone))

        self._do(job)

    def save(self, path: str | Path) -> None:
        """Write it into a safetensors file, which is there whole or not at all.

        Raises:
            OptionError: the file cannot be written, or the cache is empty.
        """
        keys, values, ids, kind = self._do(self._content)
        cachefile.save(path, self._model, keys, values, ids, kind)

    def load(self, path: str | Path) -> None:
        """Hold what `save` wrote, in place of what it holds.

        Raises:
            ContextFullError: the file holds more tokens than fit the context.
            ModelFileError: it cannot be read, is damaged, or of another model, precision or type of cache; the cache is
                then as it was.
        """
        runtime = self._model.load()
        keys, values, ids, kind = cachefile.load(path, self._model, str(runtime.result().cache_dtype), self.n_ctx)

        def job() -> None:
            cache = self._cache
            cache.clear()
            cache.own(runtime.result().filled(keys, values, ids, cache.capacity(len(ids))))
            cache.ids = list(ids)
            if kind != "clean":
                cache.mark(kind, 0)

        self._do(job)

    def plot(self) -> Figure:
        """A matplotlib Figure: the lengths of keys and values by layer and token."""
        from irkit import plots

        return plots.cache(self.fork())

    def view(self, **chosen: Any) -> CacheWidget:
        """The cache to look at in a notebook, to rewind, to fork and to drop from.

        `chosen` is as for `irkit.view.cache`.
        """
        from irkit import view  # imported late, as surfaces lie above

        return view.cache(self, **chosen)

    def to_frame(self, layer: int | None = None) -> pandas.DataFrame:
        """A row a position: the token, and the mean length of its keys and values over heads, of one layer or all."""
        import pandas

        kept = self.fork()
        layers = range(self.n_layers) if layer is None else _chosen(layer, self.n_layers, "layer")
        columns = dict(zip(("keys", "values"), kept.lengths()[:, list(layers)].mean(axis=(1, 2)), strict=True))
        index = pandas.RangeIndex(len(kept), name="position")
        return pandas.DataFrame({"id": kept.ids, "token": kept.tokens, **columns}, index)

    def __repr__(self) -> str:
        # It does not wait: a notebook shows it while an answer is made.
        held = self._cache
        of = f"{len(held.ids)} of {held.n_ctx} tokens"
        return f"<CacheView: {of}, {held.kind}, {size(self._nbytes())}>"

    def _repr_html_(self) -> str:
        from irkit import reprs

        return reprs.cache(self)

    def _nbytes(self) -> int:
        """The memory of the arrays as they are now, without waiting."""
        return _nbytes(self._cache)

    def _do(self, job: Callable[[], _Result]) -> _Result:
        return self._model.submit(job, self._cache).result()

    def _part(self, name: str, layer: int, head: int | None) -> np.ndarray:
        config = self._model.config
        (index,) = _chosen(layer, config.n_layers, "layer")
        heads = None if head is None else _chosen(head, config.n_kv_heads, "head")[0]

        def job() -> np.ndarray:
            cache = self._cache
            if cache.arrays is None:
                found = np.zeros((config.n_kv_heads, 0, config.d_head), np.float32)
            else:
                found = np.asarray(getattr(cache.arrays, name)[index])[0, :, : len(cache.ids)]
            return np.array(found if heads is None else found[heads], np.float32)

        return self._do(job)

    def _content(self) -> tuple[np.ndarray, np.ndarray, list[int], str]:
        """Keys and values `[layer, kv_head, position, d_head]` as they are held, ids and provenance."""
        cache = self._cache
        if cache.arrays is None or not cache.ids:
            raise OptionError("the cache is empty: there is nothing to save")
        length = len(cache.ids)
        keys, values = (
            np.stack([np.asarray(layer)[0, :, :length] for layer in layers])
            for layers in (cache.arrays.keys, cache.arrays.values)
        )
        return keys, values, list(cache.ids), cache.kind

    def _put(self, snapshot: CacheView) -> None:
        """Hold what `snapshot` holds."""
        if not isinstance(snapshot, CacheView):
            raise OptionError(f"cache: a fork of a cache is needed, got {type(snapshot).__name__}")
        if snapshot._model is not self._model:
            raise OptionError(f"cache: it is of {snapshot._model.path.name} or of other options than the session's")

        def job() -> None:
            if len(snapshot._cache.ids) > self.n_ctx:
                raise ContextFullError(
                    f"the cache has {len(snapshot._cache.ids)} tokens; the context holds {self.n_ctx}"
                )
            self._cache.adopt(snapshot._cache)

        self._model.submit(job, self._cache, snapshot._cache).result()

    def _before(self, position: int | None) -> Cache:
        """A fork of what it holds before `position`; of all where that is None.

        Raises:
            OptionError: there is no such position, or nothing is held.
        """

        position = check(int | None, "token_index", position)

        def job() -> Cache:
            held = len(self._cache.ids)
            at = held if position is None else position + held * (position < 0)
            if not held:
                raise OptionError("the cache is empty: there is nothing to continue from")
            if not 0 <= at <= held:
                raise OptionError(f"token_index: there is no {position}; the cache holds {held} tokens")
            kept = self._cache.fork()
            kept.rewind(held - at)
            return kept

        return self._do(job)


def _chosen(chosen: Chosen, count: int, what: str) -> tuple[int, ...]:
    from irkit.engine.tapping import choose  # late, as it imports jax

    return choose(chosen, count, what)


def _nbytes(cache: Cache) -> int:
    arrays = cache.arrays
    return sum(layer.nbytes for layer in (*arrays.keys, *arrays.values, arrays.tokens)) if arrays else 0
