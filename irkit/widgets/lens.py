"""The lens view: the likeliest next token of each layer at each position, and one token followed through the layers."""

from __future__ import annotations

import threading
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets

from irkit.errors import OptionError
from irkit.widgets import base
from irkit.widgets.choosing import choose

if TYPE_CHECKING:
    from irkit.analysis import LogitLens

_COLUMNS = 16
"""Positions in the static twin."""


class LensView(base.View):
    """A logit lens; what is chosen in it are traits, to be read, set and linked."""

    _esm = base.source("common.js", "lens.js")
    _css = base.source("views.css")

    info = traitlets.Dict().tag(sync=True)
    ids = traitlets.Bytes().tag(sync=True)
    logprobs = traitlets.Bytes().tag(sync=True)
    kl = traitlets.Bytes().tag(sync=True)
    followed = traitlets.Unicode().tag(sync=True)
    """The token that is followed; if empty, the one chosen at the end, at each position its own."""
    ranks = traitlets.Bytes().tag(sync=True)
    probabilities = traitlets.Bytes().tag(sync=True)
    problem = traitlets.Unicode().tag(sync=True)
    """Why a token cannot be followed, in words."""
    layer = traitlets.Unicode().tag(sync=True, choice=True)
    """The layer that is looked at, as the lens names it."""
    position = traitlets.Int().tag(sync=True, choice=True)
    locked = traitlets.Bool(False).tag(sync=True, choice=True)
    """Whether the pointer leaves `layer` and `position` as they are."""
    shown = traitlets.Enum(["probability", "kl", "rank"], "probability").tag(sync=True, choice=True)
    colours = traitlets.Enum(["viridis", "cividis"], "viridis").tag(sync=True, choice=True)

    def __init__(self, lens: LogitLens, **chosen: Any) -> None:
        """`chosen` are values for the traits.

        Raises:
            OptionError: there is nothing to choose like that.
        """
        self._lens = lens
        self._words = words = {
            int(token): text
            for layer, row in zip(lens.ids, lens.strings, strict=True)
            for cell, texts in zip(layer, row, strict=True)
            for token, text in zip(cell, texts, strict=True)
        }
        super().__init__(
            info={
                "layers": list(lens.layers),
                "positions": [int(position) for position in lens.positions],
                "tokens": list(lens.tokens),
                "k": lens.ids.shape[-1],
                "words": {str(token): text for token, text in words.items()},
            },
            ids=_bytes(lens.ids, np.int32),
            logprobs=_bytes(lens.logprobs, np.float32),
            kl=_bytes(lens.kl, np.float32),
            ranks=_bytes(lens.ranks, np.int32),
            probabilities=_bytes(lens.probability(), np.float32),
        )
        begin = {"layer": lens.layers[-1], "position": int(lens.positions[-1])}
        choose(self, begin | chosen)
        if self.layer not in lens.layers:
            raise OptionError(f"layer: there is no {self.layer!r} in the lens")
        if self.position not in lens.positions:
            raise OptionError(f"position: there is no {self.position} in the lens")
        self.on_msg(self._asked)

    def follow(self, token: str | int) -> None:
        """Show the rank of this token, a text or an id, at every place.

        Raises:
            OptionError: it is not one token, or the session is closed.
        """
        ranks, probabilities = self._lens.rank(token), self._lens.probability(token)
        with self.hold_sync():
            self.ranks, self.probabilities = _bytes(ranks, np.int32), _bytes(probabilities, np.float32)
            self.followed, self.problem = token if isinstance(token, str) else self._words.get(token, f"#{token}"), ""

    def _asked(self, _: Any, message: dict[str, Any], buffers: Any) -> None:
        token = message.get("token")
        if message.get("kind") == "follow" and isinstance(token, str | int):
            # The model may be at work for another cell; the other views' messages do not wait for it.
            threading.Thread(target=self._try, args=(token,), daemon=True).start()

    def _try(self, token: str | int) -> None:
        try:
            self.follow(token)
        except Exception as error:
            self.problem = base.problem(error)

    def twin(self) -> str:
        """The lens as a table without script, coloured by probability: the last positions, the last layer above."""
        lens = self._lens
        columns = range(len(lens.positions))[-_COLUMNS:]
        cell = "padding:1px 5px;text-align:left;font:11px ui-monospace,monospace;white-space:pre"
        heads = "".join(f'<th style="{cell}">{_shown(lens.tokens[at])}</th>' for at in columns)
        rows = []
        for row in reversed(range(len(lens.layers))):
            cells = []
            for at in columns:
                tops = zip(lens.strings[row][at], np.exp(lens.logprobs[row, at]), strict=True)
                hint = ", ".join(f"{text!r} {share:.3f}" for text, share in tops)
                share = float(np.exp(lens.logprobs[row, at, 0]))
                style = f"{cell};background:rgba(33,102,172,{0.85 * share:.2f});{'color:#fff' if share > 0.6 else ''}"
                title = escape(f"{hint}; KL {lens.kl[row, at]:.3f} nats")
                cells.append(f'<td style="{style}" title="{title}">{_shown(lens.strings[row][at][0])}</td>')
            rows.append(f'<tr><th style="{cell}">{lens.layers[row]}</th>{"".join(cells)}</tr>')
        left_out = len(lens.positions) - len(columns)
        note = f", the last {len(columns)} positions" if left_out else ""
        title = f"Logit lens: the likeliest next token by layer, darker where it is likelier{note}"
        table = f'<tr><th style="{cell}">layer</th>{heads}</tr>{"".join(rows)}'
        return f'<div style="overflow-x:auto"><div>{title}</div><table style="border-spacing:1px">{table}</table></div>'


def _bytes(values: np.ndarray, kind: type) -> bytes:
    return np.ascontiguousarray(values, kind).tobytes()


def _shown(token: str) -> str:
    """A token in a cell: white space to be seen, and not too long."""
    seen = token.replace(" ", "·").replace("\n", "↵").replace("\t", "→")
    return escape(seen if len(seen) <= 12 else f"{seen[:11]}…")
