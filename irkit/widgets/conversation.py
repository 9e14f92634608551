"""A conversation with branches: every message keeps all that has ever come after it, and one of them is chosen."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from irkit.results import Generation, Token

_ids = itertools.count(1)


@dataclass(eq=False)
class Turn:
    """One message, or (without a role) the beginning of a conversation."""

    role: str
    text: str = ""
    before: Turn | None = None
    after: list[Turn] = field(default_factory=list)
    """Every message that has come next, oldest first."""
    chosen: int = 0
    """Which of them is shown."""
    id: int = field(default_factory=lambda: next(_ids))
    prompt: tuple[int, ...] = ()
    """Of an answer: the ids that were read before its first token."""
    kept: tuple[Token, ...] = ()
    """Of an answer that goes on from within another: the tokens that it begins with."""
    generation: Generation | None = None
    """Of an answer, what makes it, or made it."""
    problem: str = ""
    """Of an answer, why it failed."""
    stopped: bool = False
    """Of an answer: whether its end was asked for."""
    html: str | None = None
    """Of an answer that has ended and was drawn: its text as HTML."""
    entropies: np.ndarray | None = None
    """Of an answer whose tokens were looked at so: how undecided the model was before each, in nats."""

    @property
    def tokens(self) -> tuple[Token, ...]:
        """Of an answer: its tokens so far."""
        return self.kept + (tuple(self.generation._tokens) if self.generation else ())

    @property
    def ids(self) -> tuple[int, ...]:
        """Of an answer: all that was read and made for it."""
        return (*self.prompt, *(token.id for token in self.tokens))

    @property
    def versions(self) -> Sequence[Turn]:
        """All that stand in this one's place, itself included."""
        return self.before.after if self.before else [self]

    def add(self, role: str, text: str = "", **more: Any) -> Turn:
        """Put a message behind this one, and choose it."""
        made = Turn(role, text, self, **more)
        self.after.append(made)
        self.chosen = len(self.after) - 1
        return made

    def choose(self) -> None:
        """Show this one, of those that stand in its place."""
        if self.before:
            self.before.chosen = self.before.after.index(self)


def path(root: Turn) -> Iterator[Turn]:
    """The messages that are shown, from the first to the last."""
    turn = root
    while turn.after:
        turn = turn.after[turn.chosen]
        yield turn


def find(root: Turn, id: int) -> Turn | None:
    """The message of this id, wherever it is."""
    waiting = [root]
    while waiting:
        turn = waiting.pop()
        if turn.id == id:
            return turn
        waiting.extend(turn.after)
    return None


def messages(turns: Sequence[Turn], system: str = "") -> list[dict[str, str]]:
    """What a chat template, or another program, is given of them."""
    opening = [{"role": "system", "content": system}] if system else []
    return [*opening, *({"role": turn.role, "content": turn.text} for turn in turns)]


def to_json(root: Turn, model: str, system: str = "") -> str:
    """The whole conversation: the messages that are shown, and every message with the id of the one before it."""
    turns, waiting = [], [root]
    while waiting:
        turn = waiting.pop()
        waiting.extend(reversed(turn.after))
        if turn.before is not None:
            kept: dict[str, Any] = {"id": turn.id, "before": turn.before.id, "role": turn.role, "content": turn.text}
            if turn.tokens:
                kept["tokens"] = [[token.id, token.text, token.logprob] for token in turn.tokens]
            turns.append(kept)
    shown = messages(list(path(root)), system)
    return json.dumps({"model": model, "messages": shown, "all": turns}, ensure_ascii=False, indent=1)


def to_markdown(root: Turn, model: str, system: str = "") -> str:
    """The messages that are shown, for reading."""
    parts = [f"# A conversation with {model}"]
    parts += [f"**{message['role']}**\n\n{message['content']}" for message in messages(list(path(root)), system)]
    return "\n\n".join(parts) + "\n"
