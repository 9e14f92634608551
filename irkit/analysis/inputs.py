"""What the functions of analysis are given, checked: a text or a trace, tokens, captured values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from irkit.errors import OptionError
from irkit.trace import Trace

if TYPE_CHECKING:
    import irkit

Given = str | Sequence[int] | Trace
"""A text, its token ids, or a trace of it."""


def one_text(session: irkit.Session, given: Given, names: Sequence[str], **options: Any) -> Trace:
    """A trace of one text: the one given, or one that is made, of these hook points and without logits.

    Raises:
        OptionError: it is of several texts, or of a model of another shape.
    """
    texts: Any = given
    trace = given if isinstance(given, Trace) else session.trace(texts, names=names, logits="none", **options)
    if len(trace.ids) != 1:
        raise OptionError(f"one text is read at a time, not {len(trace.ids)}; trace.row(i) is one of them")
    if trace.n_layers != session.model.config.n_layers:
        raise OptionError(f"the trace is of {trace.n_layers} layers, the model has {session.model.config.n_layers}")
    return trace


def value(trace: Trace, name: str) -> np.ndarray:
    """The whole value of a hook point, by its full name.

    Raises:
        OptionError: the trace does not hold it, or holds less of it.
    """
    if name not in trace:
        raise OptionError(f"this needs {name}, which the trace does not hold")
    point = name.split(".", 2)[2] if name.startswith("blocks.") else name
    if point in trace.provenance.reduce:
        raise OptionError(f"this needs {name} whole; the trace holds its {trace.provenance.reduce[point]}")
    return trace[name]


def held_positions(trace: Trace) -> tuple[int, ...]:
    """The positions of the first text whose values the trace holds."""
    kept = trace.provenance.positions
    return tuple(range(len(trace.ids[0]))) if kept is None else kept


def places(trace: Trace, positions: Sequence[int]) -> list[int]:
    """Where along the position axis the values of `positions` are.

    Raises:
        OptionError: the trace does not hold one.
    """
    held = held_positions(trace)
    for position in positions:
        if position not in held:
            raise OptionError(f"positions: the trace does not hold {position}")
    return [held.index(position) for position in positions]


def token_id(session: irkit.Session, token: str | int) -> int:
    """The id of one token, given as text or as id.

    Raises:
        OptionError: the text is not exactly one token, or there is no such id.
    """
    if isinstance(token, str):
        ids = session.tokenize(token, add_special=False, parse_special=True)
        if len(ids) != 1:
            shown = [session.model.tokenizer.token(each) for each in ids]
            raise OptionError(f"token: {token!r} is {len(ids)} tokens, not one: {shown}")
        return ids[0]
    session.model.tokenizer.token(int(token))  # raises where there is none
    return int(token)
