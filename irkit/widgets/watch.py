"""The watch view: what a session answers, as it answers it, whoever asks; each token can be looked into."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING, Any

import traitlets
from ipywidgets import VBox, Widget

from irkit import notebook, reprs
from irkit.errors import OptionError
from irkit.observing import Asked
from irkit.results import Generation, Token
from irkit.widgets import answer, base
from irkit.widgets.choosing import choose
from irkit.widgets.inspector import Inspector

if TYPE_CHECKING:
    from irkit.session import Session

PERIOD = 0.1
"""Seconds between two messages to the page, at least."""
MOST = 100
"""Answers that are kept; the oldest go."""
MOST_TOKENS = 100_000
"""Tokens of all answers that are kept; the oldest answers go, but for the last."""
_SNIPPET = 120
_WORDS = 8000
"""Characters of one message of what was asked that the page is sent, from its end."""
_IN_TWIN = 20


@dataclass(eq=False)
class Seen:
    """An answer that was watched: what was asked, by whom, and what became of it."""

    id: int
    asked: Asked
    tokens: list[Token] = field(default_factory=list)
    tail: str = ""
    """Text that belongs to none of them, where an answer ends within a character."""
    facts: str = ""
    live: bool = True

    @property
    def prompt(self) -> str:
        """What was asked: the text, or the last message."""
        said = messages(self.asked.words)
        return said[-1]["content"] if said else ""

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(token.text for token in self.tokens) + self.tail

    def __repr__(self) -> str:
        return f"<{_who(self)}: {self.prompt[:40]!r}, {self.facts}>"


class WatchView(base.View):
    """The answers of a session and of what serves it, the last ones: `answers` has them in Python.

    What is kept is bounded: `MOST` answers and `MOST_TOKENS` tokens. What an answer captured is not kept here.
    """

    _esm = base.source("common.js", "answer.js", "watch.js")
    _css = base.source("views.css", "chat.css", "watch.css")

    info = traitlets.Dict().tag(sync=True)
    chosen = traitlets.Int(0).tag(sync=True, choice=True)
    """The id of the answer that is shown in full; 0 where there is none yet."""
    follow = traitlets.Bool(True).tag(sync=True, choice=True)
    """Whether the newest answer is shown in full as soon as it is begun."""
    problem = traitlets.Unicode().tag(sync=True)

    def __init__(self, session: Session, **chosen: Any) -> None:
        """`chosen` are values for the traits.

        Raises:
            OptionError: there is nothing to choose like that, or the session is closed.
        """
        session.model  # noqa: B018 - says so if the session is closed
        super().__init__(info={"model": session.name, "alternatives": answer.ALTERNATIVES, "most": MOST})
        choose(self, chosen)
        self._kept: deque[Seen] = deque()
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._told = 0  # tokens of the chosen answer that the page has
        self._rows: dict[int, dict[str, Any]] = {}  # what the page was told of each answer
        self._pump: threading.Thread | None = None
        self._work = ThreadPoolExecutor(1, "irkit-watch")
        self._inspector = Inspector(session)
        self._end: Callable[[], None] = session.observe(self._begun)
        self.observe(lambda _: self._send_whole(), "chosen")
        self.on_msg(self._asked)

    @property
    def answers(self) -> list[Seen]:
        """What was seen, the oldest first."""
        with self._lock:
            return list(self._kept)

    def whole(self) -> Widget:
        """The view, and what was opened in it."""
        return VBox([self, self._inspector.box])

    def close(self) -> None:
        """Look no longer, and take the view away; `answers` stay readable."""
        self._end()
        self._work.shutdown(wait=False, cancel_futures=True)
        self._inspector.close()
        super().close()

    def look_into(self, id: int, position: int) -> None:
        """Show the attention, lens and cache of the step that made a token of an answer.

        Raises:
            OptionError: there is no such answer or token, or the session is closed.
            BudgetError: it would take more memory than it may.
        """
        seen = self._find(id)
        if not 0 <= position < len(seen.tokens):
            raise OptionError(f"there is no token {position} in that answer")
        before = [token.id for token in seen.tokens[:position]]
        self._inspector.show([*seen.asked.generation.prompt, *before], seen.tokens[position], seen.asked.edits)

    def _find(self, id: int) -> Seen:
        found = next((seen for seen in self.answers if seen.id == id), None)
        if found is None:
            raise OptionError(f"there is no answer {id} here any more")
        return found

    # What happens in the session.

    def _begun(self, asked: Asked) -> None:
        """Called in the thread that asks: it does not wait for anything."""
        with self._lock:
            seen = Seen(next(self._numbers), asked)
            self._kept.append(seen)
            if self._pump is None:
                self._pump = threading.Thread(target=self._tell, name="irkit-watch", daemon=True)
                self._pump.start()

    def _tell(self) -> None:
        """Tell the page what is new, a message for all of it, until there is nothing that goes on."""
        going_on = True
        try:
            while going_on:
                with self._lock:
                    live = [seen for seen in self._kept if seen.live]
                    for seen in live:
                        _look(seen)
                    self._forget()
                    if self.follow and live:
                        self.chosen = live[-1].id
                    self._send_news(live)
                    going_on = any(seen.live for seen in self._kept)
                    if not going_on:
                        self._pump = None
                time.sleep(PERIOD)
        except Exception as error:
            self._pump = None  # the next answer has another
            self.problem = base.problem(error)
            return
        self.refresh_twin()

    def _forget(self) -> None:
        """Let the oldest answers go that are too many; one in the making is gone for the page, not for who asked."""
        total = sum(len(seen.tokens) for seen in self._kept)
        while len(self._kept) > 1 and (len(self._kept) > MOST or total > MOST_TOKENS):
            total -= len(self._kept.popleft().tokens)

    # What the page is told and asks.

    def _send_whole(self) -> None:
        """The chosen answer: what was asked, and all its tokens."""
        with self._lock:
            seen = next((each for each in self._kept if each.id == self.chosen), None)
            if seen is None:
                return
            said = [{**each, "content": each["content"][-_WORDS:]} for each in messages(seen.asked.words)]
            data, buffers = answer.packed(seen.tokens)
            self._told = len(seen.tokens)
            more = {"messages": said, "row": _row(seen), "edits": [repr(edit) for edit in seen.asked.edits]}
            self.send({"kind": "whole", "id": seen.id, **more, **data}, buffers)

    def _send_news(self, live: Sequence[Seen]) -> None:
        """The rows of answers that have changed, and the new tokens of the chosen one, in one message."""
        rows = [row for seen in live if (row := _row(seen)) != self._rows.get(seen.id)]
        self._rows |= {row["id"]: row for row in rows}
        self._rows = {seen.id: self._rows[seen.id] for seen in self._kept if seen.id in self._rows}
        chosen = next((each for each in live if each.id == self.chosen), None)
        more, buffers = None, []
        if chosen is not None and len(chosen.tokens) > self._told:
            data, buffers = answer.packed(chosen.tokens[self._told :])
            more = {"id": chosen.id, "first": self._told, **data}
            self._told = len(chosen.tokens)
        if rows or more:
            self.send({"kind": "news", "rows": rows, "first": self._kept[0].id, "more": more}, buffers)

    def _asked(self, _: Any, message: dict[str, Any], buffers: Any) -> None:
        match message:
            case {"kind": "state"}:
                with self._lock:
                    self.send({"kind": "news", "rows": [_row(seen) for seen in self._kept], "first": 0, "more": None})
                self._send_whole()
            case {"kind": "stop", "id": int(id)}:
                for seen in self.answers:
                    if seen.id == id:
                        seen.asked.generation.cancel()
            case {"kind": "open", "id": int(id), "position": int(position)}:
                self._work.submit(self._open, id, position)
            case {"kind": "shut"}:
                self._work.submit(self._inspector.clear)

    def _open(self, id: int, position: int) -> None:
        try:
            self.look_into(id, position)
            self.problem = ""
        except Exception as error:
            self.problem = base.problem(error)

    def twin(self) -> str:
        """The last answers as a table without script."""
        heads = ("when", "asked by", "asked", "answer", "")
        rows = [
            (f"{seen.asked.at:%H:%M:%S}", _who(seen), _short(seen.prompt), seen.text, seen.facts)
            for seen in self.answers[-_IN_TWIN:]
        ]
        title = f"<b>Answers</b> of <b>{escape(self.info['model'])}</b>"
        return reprs.out(title, reprs.table([heads, *rows], head=True) if rows else reprs.note(["nothing asked yet"]))


def _look(seen: Seen) -> None:
    """Take over what an answer has become."""
    made = seen.asked.generation
    ended = made.done  # before its tokens are read: all of them are there then
    fresh = made.partial_tokens[len(seen.tokens) :]
    seen.tokens += [token if token.captures is None else replace(token, captures=None) for token in fresh]
    seen.facts = " · ".join(reprs.generation_facts(made))
    if ended:
        seen.live, seen.tail = False, made._tail
        # The answer's own object may hold captures, which are as large as they are wanted.
        seen.asked = replace(seen.asked, generation=Generation(prompt=made.prompt))


def messages(words: str | Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """What was asked as messages, each with a role and a text; a text that is continued has the role `text`."""
    if isinstance(words, str):
        return [{"role": "text", "content": words}]
    return [{"role": str(each.get("role", "")), "content": _text(each.get("content"))} for each in words]


def _text(content: Any) -> str:
    if isinstance(content, str) or content is None:
        return content or ""
    parts = content if isinstance(content, Sequence) else [content]
    return "".join(str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in parts)


def _who(seen: Seen) -> str:
    return seen.asked.by or ("this notebook" if notebook.shell() else "this program")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SNIPPET else f"{line[: _SNIPPET - 1]}…"


def _row(seen: Seen) -> dict[str, Any]:
    return {
        "id": seen.id,
        "by": _who(seen),
        "at": f"{seen.asked.at:%H:%M:%S}",
        "asked": _short(seen.prompt),
        "facts": seen.facts,
        "live": seen.live,
    }
