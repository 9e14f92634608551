"""One step of an answer, looked into: the attention of its layers and heads, the logit lens, and the cache."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import takewhile

import numpy as np
from ipywidgets import HTML, Tab, VBox

from irkit.edits import Edit
from irkit.results import Token
from irkit.session import Session
from irkit.trace import Trace, size
from irkit.widgets import base

_POSITIONS = 8
"""Positions of the lens, the last of which is the step's."""
_K = 8


class Inspector:
    """What is shown of a step, in `box`; nothing, until `show` is called.

    It is computed when it is asked for, from the tokens that came before: decoding pays nothing for it.
    """

    def __init__(self, session: Session) -> None:
        self.box = VBox([])
        self._session = session

    def show(self, ids: Sequence[int], token: Token, edits: Sequence[Edit] = ()) -> None:
        """Show the step that read `ids` and made `token`, with these edits.

        Raises:
            IrkitError: it cannot be computed, or would take more memory than it may.
        """
        session = self._session
        trace = session.trace(ids, edits, names=("pattern", "rot_k", "v"), positions=-1, logits="none")
        lens = session.lens(ids, edits, positions=range(-min(_POSITIONS, len(ids)), 0), k=_K)
        looked = lens.view(locked=True)
        looked.follow(token.id)
        heading = HTML(
            f"<b>The step that made</b> <code>{escape(repr(session.model.tokenizer.token(token.id)))}</code>"
        )
        parts = {"Attention": trace.view(), "Logit lens": looked, "Cache": HTML(cached(session, ids, trace))}
        self.clear()
        tabs = Tab(list(parts.values()), titles=list(parts))
        tabs.add_class("irkit-below")
        tabs.add_class("irkit-step")
        self.box.children = (heading, tabs)

    def clear(self) -> None:
        """Show nothing."""
        gone, self.box.children = self.box.children, ()
        for child in gone:
            base.close_tree(child)

    def close(self) -> None:
        """Take it away."""
        self.clear()
        base.close_tree(self.box)


def cached(session: Session, ids: Sequence[int], trace: Trace) -> str:
    """What the cache held when `ids` had been read: its size, and the keys and values of the last one, by layer.

    `trace` is of the last position, with `rot_k` and `v`.
    """
    config = session.model.config
    held = list(session._cache.ids)  # `session.cache` would wait for the answer that is being made, if one is
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(held, ids, strict=False)))
    numbers = 2 * config.n_layers * config.n_kv_heads * config.d_head
    taken = size(len(ids) * numbers * session.model.load().result().cache_dtype.itemsize)
    still = "holds them still" if shared == len(ids) else f"holds {shared:,} of them now, and is filled again as needed"
    shape = f"{config.n_layers} layers × {config.n_kv_heads} heads × {config.d_head} numbers, twice: keys and values"
    text = f"<p>{len(ids):,} tokens were held in {taken}: for each, {shape}. The session's cache {still}.</p>"
    lengths = {
        name: np.linalg.norm(trace[point][:, 0, 0], axis=-1).mean(axis=-1)
        for name, point in (("key", "rot_k"), ("value", "v"))
    }
    word = escape(repr(session.model.tokenizer.token(ids[-1])))
    bars = "".join(_bars(name, each) for name, each in lengths.items())
    return f"{text}<p>What <code>{word}</code>, read last, left there, by layer:</p>{bars}"


def _bars(name: str, lengths: np.ndarray) -> str:
    """Lengths of vectors by layer as bars, in a picture that needs no script."""
    wide, tall, step = 12 * len(lengths) + 40, 70, 12
    most = float(lengths.max()) or 1.0
    parts = [
        f'<rect x="{40 + step * layer}" y="{tall - 12 - 52 * part:.1f}" width="9" height="{52 * part:.1f}" rx="1">'
        f"<title>layer {layer}: {most * part:.2f}</title></rect>"
        for layer, part in enumerate(lengths / most)
    ]
    labels = [
        f'<text x="{44.5 + step * layer}" y="{tall}" text-anchor="middle">{layer}</text>'
        for layer in range(0, len(lengths), 5)
    ]
    return (
        f"<div>length of its {name}s, the mean over the heads, up to {most:.2f}</div>"
        f'<svg role="img" aria-label="length of its {name}s by layer" width="{wide}" height="{tall}" '
        f'viewBox="0 0 {wide} {tall}" style="max-width:100%;font-size:9px" fill="currentColor" fill-opacity=".6">'
        f"{''.join(parts)}{''.join(labels)}</svg>"
    )
