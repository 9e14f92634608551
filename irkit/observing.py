"""What a session's observers are told: which answers are begun, and on whose behalf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from irkit.edits import Edit
    from irkit.results import Generation

ASKED_BY: ContextVar[str] = ContextVar("asked_by", default="")
"""Who asks in this context: the server puts the request here, such as `POST /api/chat`."""


@dataclass(frozen=True, eq=False)
class Asked:
    """An answer that was begun, with what it answers."""

    words: str | Sequence[Mapping[str, Any]]
    """A text that is continued, or the messages of a conversation."""
    options: Any
    """The `GenerateOptions` of the answer."""
    generation: Generation
    model: str
    ids: tuple[int, ...] = ()
    """What is answered, as the model reads it."""
    edits: tuple[Edit, ...] = ()
    """What is changed while it is answered."""
    by: str = ""
    """Who asked: a request such as `POST /api/chat`, or nobody but the program itself."""
    at: datetime = field(default_factory=lambda: datetime.now().astimezone())
