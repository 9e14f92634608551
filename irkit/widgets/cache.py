"""The cache view: what a KV cache holds, by layer and position; to rewind, to fork and to drop from."""

from __future__ import annotations

import threading
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets

from irkit import reprs
from irkit.engine import CacheView
from irkit.errors import OptionError
from irkit.observing import Asked
from irkit.trace import size
from irkit.widgets import base
from irkit.widgets.choosing import choose

if TYPE_CHECKING:
    from irkit.session import Session

_COLUMNS = 24
"""Positions in the static twin."""


class CacheWidget(base.View):
    """A KV cache to look at: its tokens, and how long the keys and values of each are in every layer.

    `rewind`, `drop`, `fork` and `put_back` do what the view's buttons do. Of a session, the view follows the answers
    that it makes; of a cache alone, `refresh` looks again.
    """

    _esm = base.source("common.js", "cache.js")
    _css = base.source("views.css", "cache.css")

    info = traitlets.Dict().tag(sync=True)
    """What is held now; its `version` grows with every look."""
    position = traitlets.Int(0).tag(sync=True, choice=True)
    """The position that is looked at."""
    until = traitlets.Int(0).tag(sync=True, choice=True)
    """The other end of what is chosen, to be dropped; where nothing else is chosen, `position`."""
    layer = traitlets.Int(0).tag(sync=True, choice=True)
    shown = traitlets.Enum(["keys", "values"], "keys").tag(sync=True, choice=True)
    head = traitlets.Int(-1).tag(sync=True, choice=True)
    """The head of keys and values that is shown; -1 is the mean over all."""
    scaled_by = traitlets.Enum(["layer", "all"], "layer").tag(sync=True, choice=True)
    """Whether a layer's colours say what is long in that layer, or in the whole cache."""
    colours = traitlets.Enum(["viridis", "cividis"], "viridis").tag(sync=True, choice=True)
    listed = traitlets.List().tag(sync=True)
    """The forks, as the page lists them."""
    busy = traitlets.Bool(False).tag(sync=True)
    """Whether something waits for the answer that is being made."""
    problem = traitlets.Unicode().tag(sync=True)

    def __init__(self, of: Session | CacheView, **chosen: Any) -> None:
        """Of a session's cache, or of a fork of one; `chosen` are values for the traits.

        Raises:
            OptionError: there is nothing to choose like that, or the session is closed.
        """
        super().__init__()
        self.cache: CacheView = of if isinstance(of, CacheView) else of.cache
        """The cache that is shown."""
        self.forks: dict[int, CacheView] = {}
        """The forks that were made here, by their numbers."""
        self._lock = threading.RLock()
        self._lengths = np.zeros((2, 0, 0, 0), np.float16)
        self._version = 0
        self._made = 0
        choose(self, chosen)
        self._end_observing: Callable[[], None] | None = None
        if not isinstance(of, CacheView):
            self._end_observing = of.observe(self._begun)
        self.refresh()
        config = self.cache._model.config
        for name, value, count in (("layer", self.layer, config.n_layers), ("head", self.head, config.n_kv_heads)):
            if not -(name == "head") <= value < count:
                raise OptionError(f"{name}: there is no {value}; there are {count}")
        self.on_msg(self._asked)

    # What the buttons do.

    def refresh(self) -> None:
        """Show what the cache holds now, once the answer that is being made in it has ended."""
        with self._lock:
            held = self.cache.fork()  # so that all that is read is of the same moment
            lengths = held.lengths().astype(np.float16)
            self._lengths, self._version = lengths, self._version + 1
            last = max(len(held) - 1, 0)
            config, words = self.cache._model.config, self.cache._model.tokenizer
            with self.hold_sync():
                self.position, self.until = min(self.position, last), min(self.until, last)
                self.info = {
                    "version": self._version,
                    "model": self.cache._model.path.stem,
                    "tokens": [words.decode([token], skip_special=False, at_start=False) for token in held.ids],
                    "ids": list(held.ids),
                    "layers": config.n_layers,
                    "heads": config.n_kv_heads,
                    "d_head": config.d_head,
                    "n_ctx": self.cache.n_ctx,
                    "capacity": held.capacity,
                    "size": size(held.nbytes),
                    "each": size(held.nbytes // held.capacity) if held.capacity else "",
                    "kind": held.provenance,
                }
            del held  # before the next answer, which would copy the arrays
            self._list()
        self.refresh_twin()

    def rewind(self, position: int) -> None:
        """Forget the tokens from `position` on.

        Raises:
            OptionError: there is no such position.
        """
        with self._lock:
            held = len(self.cache)
            if not 0 <= position <= held:
                raise OptionError(f"position: there is no {position}; the cache holds {held} tokens")
            self.cache.rewind(held - position)
            self.refresh()

    def fork(self, position: int | None = None) -> CacheView:
        """A fork of the tokens before `position`, or of all; it is in `forks` too.

        Raises:
            OptionError: there is no such position.
        """
        with self._lock:
            made = self.cache.fork()
            if position is not None:
                if not 0 <= position <= len(made):
                    raise OptionError(f"position: there is no {position}; the cache holds {len(made)} tokens")
                made.rewind(len(made) - position)
            self._made += 1
            self.forks[self._made] = made
            self._list()
            return made

    def drop(self, first: int, last: int) -> None:
        """Forget the tokens from `first` to `last`, both included; those behind them move up.

        Raises:
            OptionError: there is no such position.
        """
        with self._lock:
            self.cache.drop(range(min(first, last), max(first, last) + 1))
            self.until = self.position = min(first, last)
            self.refresh()

    def put_back(self, number: int) -> None:
        """Have the cache hold what the fork of this number holds.

        Raises:
            OptionError: there is none.
        """
        if number not in self.forks:
            raise OptionError(f"there is no fork {number}")
        with self._lock:
            self.cache._put(self.forks[number])
            self.refresh()

    def forget(self, number: int) -> None:
        """Let go of a fork."""
        with self._lock:
            self.forks.pop(number, None)
            self._list()

    def close(self) -> None:
        """Take the view away; the forks stay."""
        if self._end_observing is not None:
            self._end_observing()
        super().close()

    def _list(self) -> None:
        self.listed = [
            {
                "number": number,
                "tokens": len(fork),
                "end": self.cache._model.tokenizer.decode(fork.ids[-12:], skip_special=False, at_start=False),
                "memory": "shared with the cache" if fork.shares_memory(self.cache) else size(fork.nbytes),
            }
            for number, fork in self.forks.items()
        ]

    # What is asked, and what happens.

    def _asked(self, _: Any, message: dict[str, Any], buffers: Any) -> None:
        match message:
            case {"kind": "lengths", "part": "keys" | "values" as part, "head": int(head), "version": self._version}:
                self._send_lengths(part, head)
            case {"kind": "refresh"}:
                self._later(self.refresh)
            case {"kind": "rewind", "position": int(position)}:
                self._later(lambda: self.rewind(position))
            case {"kind": "fork", "position": int(position)}:
                self._later(lambda: self.fork(position))
            case {"kind": "drop", "first": int(first), "last": int(last)}:
                self._later(lambda: self.drop(first, last))
            case {"kind": "put_back", "number": int(number)}:
                self._later(lambda: self.put_back(number))
            case {"kind": "forget", "number": int(number)}:
                self._later(lambda: self.forget(number))

    def _send_lengths(self, part: str, head: int) -> None:
        """Float16 `[layer, position]`, of one head or the mean over all."""
        lengths = self._lengths[0 if part == "keys" else 1]
        if not -1 <= head < lengths.shape[1]:
            return
        found = lengths[:, head] if head >= 0 else lengths.astype(np.float32).mean(axis=1)
        sent = np.ascontiguousarray(found, np.float32).tobytes()
        self.send({"kind": "lengths", "part": part, "head": head, "version": self._version}, [sent])

    def _begun(self, asked: Asked) -> None:
        """An answer was begun, perhaps in this cache: look again when it has ended."""

        def wait() -> None:
            while not asked.generation.wait_for(60):
                pass
            with self._lock:  # two answers may have ended at once: one look is enough for both
                if list(self.cache.ids) != self.info["ids"] or self.cache.provenance != self.info["kind"]:
                    self.refresh()

        self._later(wait)

    def _later(self, do: Callable[[], Any]) -> None:
        """Do it in a thread of its own, as it may wait for an answer; the other views' messages do not wait for it."""

        def job() -> None:
            self.busy = True
            try:
                do()
                self.problem = ""
            except Exception as error:
                self.problem = base.problem(error)
            finally:
                self.busy = False

        threading.Thread(target=job, name="irkit-cache-view", daemon=True).start()

    def twin(self) -> str:
        """What is held as HTML without script: its size, its last tokens, and the lengths by layer as a picture."""
        from irkit import plots

        info = self.info
        facts = [
            f"{len(info['ids']):,} of {info['n_ctx']:,} tokens",
            f"{info['size']} for {info['capacity']:,}",
            info["kind"],
            *(f"fork {fork['number']}: {fork['tokens']:,} tokens, {fork['memory']}" for fork in self.listed),
        ]
        parts = [f"<b>KV cache</b> of <b>{escape(info['model'])}</b>", reprs.note(facts)]
        if info["ids"]:
            text = "".join(info["tokens"])
            parts.append(f'<div class="irkit-words">{escape(text if len(text) < 2000 else "…" + text[-2000:])}</div>')
            first = max(0, len(info["ids"]) - _COLUMNS)
            means = self._lengths.astype(np.float32).mean(axis=2)[:, :, first:]
            figure = plots.lengths(means, info["tokens"][first:])
            parts.append(base.picture(figure, "the lengths of keys and values by layer and token"))
        return reprs.out(*parts)
