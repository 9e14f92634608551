"""On whose behalf something is computed, and what a session's observers are told of it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from irkit.edits import Edit
    from irkit.results import Generation


@dataclass(frozen=True, eq=False)
class Asker:
    """Who asks for something: the server makes one for each request; without one, the program itself asks."""

    request: str = ""
    """Such as `POST /api/chat`."""
    client: str = ""
    """The same for all requests of one client."""
    left: threading.Event = field(default_factory=threading.Event)
    """Set when nobody waits for the result any more."""


NOBODY = Asker()
"""Who asks where the program itself does."""
ASKED_BY: ContextVar[Asker] = ContextVar("asked_by", default=NOBODY)
"""Who asks in this context."""


@dataclass(frozen=True, eq=False)
class Asked:
    """An answer that was begun, with what it answers."""

    words: str | Sequence[Mapping[str, Any]]
    """A text that is continued, or the messages of a conversation."""
    options: Any
    """The `GenerateOptions` of the answer."""
    generation: Generation
    model: str
    edits: tuple[Edit, ...] = ()
    """What is changed while it is answered."""
    by: str = ""
    """Who asked: a request such as `POST /api/chat`, or nobody but the program itself."""
    at: datetime = field(default_factory=lambda: datetime.now().astimezone())
