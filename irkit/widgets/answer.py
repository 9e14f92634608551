"""An answer as a page shows it: Markdown that grows, its tokens and what could have stood in their places."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from typing import Any

import numpy as np

from irkit import reprs
from irkit.results import Token
from irkit.widgets import markdown
from irkit.widgets.conversation import Turn

ALTERNATIVES = 8
"""How many of the likeliest tokens are kept with each token."""
_TWIN_TOP = 3
"""How many of those the static twin tells."""
_SENTENCE = re.compile(r"[.!?…:]+[\"')\]]*\s|\n")
_ENDS = {"length": "num_predict reached", "context": "the context is full", "cancelled": "stopped"}


class Live:
    """An answer in the making, and how much of it the page has been told."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn
        self.ended = threading.Event()
        self.seq = 0
        self._growing = markdown.Growing()
        self._html = self._open = ""
        self._count = -1
        self._said = 0

    def news(self, with_tokens: bool, tokens: Sequence[Token]) -> tuple[dict[str, Any], list[bytes]]:
        """What the page is told of what is new; nothing, where nothing is."""
        if len(tokens) == self._count:
            return {}, []
        text = self.turn.text
        fresh, self._open = self._growing.update(text)
        self._html += fresh
        self.seq += 1
        message = {"kind": "delta", "turn": self.turn.id, "seq": self.seq, "html": fresh, "open": self._open}
        ends = [match.end() for match in _SENTENCE.finditer(text, self._said)]
        if ends:
            message["said"], self._said = text[self._said : ends[-1]], ends[-1]
        buffers: list[bytes] = []
        if with_tokens:
            first = max(self._count, 0)
            data, buffers = packed(tokens[first:])
            message["tokens"] = {"first": first, **data}
        self._count = len(tokens)
        return message, buffers

    def whole(self) -> dict[str, Any]:
        """All that the page has been told so far."""
        return {"turn": self.turn.id, "seq": self.seq, "html": self._html, "open": self._open}


def packed(tokens: Sequence[Token], most: int = ALTERNATIVES) -> tuple[dict[str, Any], list[bytes]]:
    """Tokens as a page takes them: texts, and as buffers ids (int32), log-probabilities (float32), and those of the
    `most` likeliest in the place of each, `[token, most]`, where -1 stands for none; `words` has the texts of those."""
    top_ids = np.full((len(tokens), most), -1, np.int32)
    top_logprobs = np.full((len(tokens), most), -np.inf, np.float32)
    words: dict[str, str] = {}
    for row, token in enumerate(tokens):
        for column, other in enumerate(token.top[:most]):
            top_ids[row, column], top_logprobs[row, column] = other.id, other.logprob
            words[str(other.id)] = other.text
    logprobs = [np.nan if token.logprob is None else token.logprob for token in tokens]
    arrays = np.array([token.id for token in tokens], np.int32), np.array(logprobs, np.float32), top_ids, top_logprobs
    return {"texts": [token.text for token in tokens], "words": words}, [array.tobytes() for array in arrays]


def drawn(turn: Turn, live: int) -> dict[str, Any]:
    """A message as the page draws it; `live` is the id of the answer that is being made."""
    versions = turn.versions
    if turn.role == "assistant" and turn.id != live and turn.html is None:
        turn.html = markdown.render(turn.text)
    return {
        "id": turn.id,
        "role": turn.role,
        "versions": [version.id for version in versions],
        "text": turn.text,
        "html": turn.html or "",
        "facts": facts(turn) if turn.id != live else "",
        "problem": turn.problem,
    }


def facts(turn: Turn) -> str:
    """What an answer took, in words."""
    made, count = turn.generation, len(turn.tokens)
    if turn.role != "assistant":
        return ""
    told = [f"{count:,} token{'s' * (count != 1)}"]
    if made is not None:
        speed = made._stats.tokens_per_second if made.done else reprs._speed(made._tokens)
        told += [f"{speed:.0f} tokens/s"] if speed else []
        if made.done and made._stats.prompt_tokens:
            stats = made._stats
            cached = f", {stats.cached_tokens:,} from the cache" if stats.cached_tokens else ""
            told.append(f"{stats.prompt_tokens:,} read{cached}")
        told += [_ENDS[made._reason]] if made._reason in _ENDS else []
    return " · ".join(told)


def twin(turns: Sequence[Turn]) -> str:
    """Messages without script; the tokens of the last answers, as many as a page takes well, can be unfolded."""
    room, parts = reprs.MOST_TOKENS, []
    for turn in reversed(turns):
        room -= len(turn.tokens)
        parts.append(_twin(turn, with_tokens=room >= 0))
    return "".join(reversed(parts))


def _twin(turn: Turn, with_tokens: bool) -> str:
    who = {"user": "you"}.get(turn.role, turn.role)
    if turn.role != "assistant":
        return f"<p><b>{escape(who)}</b></p><div class='irkit-words'>{escape(turn.text)}</div>"
    parts = [f"<p><b>{escape(who)}</b></p>", markdown.render(turn.text) if turn.html is None else turn.html]
    if turn.problem:
        parts.append(f"<p><i>{escape(turn.problem)}</i></p>")
    if turn.tokens and with_tokens:
        spans = reprs.spans(replace(token, top=token.top[:_TWIN_TOP]) for token in turn.tokens)
        words = f"<div class='irkit-words'>{spans}</div>"
        parts.append(f"<details><summary>{escape(facts(turn))}</summary>{words}</details>")
    else:
        parts.append(reprs.note([facts(turn)]))
    return "".join(parts)
