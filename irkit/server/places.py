"""The requests that are being answered: on whose behalf, which sessions they use, and how many there may be."""

import asyncio
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from irkit.errors import BusyError
from irkit.observing import ASKED_BY, Asker

MOST_BYTES = 1 << 28
"""The most bytes that the bodies of all requests may have together."""


class Answer(Protocol):
    """An answer in the making, or several: a `Generation` is one."""

    @property
    def done(self) -> bool:
        """Whether nothing more is computed for it."""
        ...

    def cancel(self) -> None:
        """End it."""


@dataclass(eq=False)
class Place:
    """What one request takes up."""

    asker: Asker
    admitted: bool = False
    """Whether it may compute."""
    uses: set[Hashable] = field(default_factory=set)
    """The sessions that must stay open for it."""
    answers: list[Answer] = field(default_factory=list)
    held: int = 0
    """Bytes of its body."""

    @property
    def computing(self) -> bool:
        """Whether it computes, or waits for its turn: not where a client is merely slow to read what is made."""
        return self.admitted and not (self.answers and all(answer.done for answer in self.answers))


PLACE: ContextVar[Place | None] = ContextVar("place", default=None)
"""That of the request that is answered in this context."""


class Places:
    """The requests in flight, of which `most` may compute or wait."""

    def __init__(self, most: int, left: Callable[[Hashable], None] = lambda session: None) -> None:
        """`left` is told of each session that a request has used, when it has ended."""
        self._most = most
        self._left = left
        self._taken: set[Place] = set()
        self._ended = asyncio.Event()

    def admit(self) -> None:
        """Let the request of this context compute.

        Raises:
            BusyError: as many others do as may.
        """
        place = PLACE.get()
        if place is None or place.admitted:
            return
        if sum(other.computing for other in self._taken) >= self._most:
            raise BusyError(f"the server is busy: {self._most} requests are computed or wait already")
        place.admitted = True

    def use(self, session: Hashable) -> None:
        """Note that the request of this context uses `session`."""
        if place := PLACE.get():
            place.uses.add(session)

    def used(self, session: Hashable) -> bool:
        """Whether a request other than that of this context uses `session`."""
        mine = PLACE.get()
        return any(session in place.uses for place in self._taken if place is not mine)

    async def until_one_ends(self) -> None:
        """Wait for the end of any request."""
        await self._ended.wait()

    def take(self, place: Place) -> None:
        """A request comes."""
        self._taken.add(place)

    def leave(self, place: Place) -> None:
        """A request has ended."""
        self._taken.discard(place)
        place.answers.clear()  # a thread keeps the context of what it last computed, and the place in it
        for session in place.uses:
            self._left(session)
        self._ended.set()
        self._ended = asyncio.Event()

    def receive(self, place: Place, content: bytes) -> None:
        """More of a body has come.

        Raises:
            BusyError: all bodies together would have more than `MOST_BYTES`.
        """
        place.held += len(content)
        if sum(other.held for other in self._taken) > MOST_BYTES:
            raise BusyError(f"the server is busy: it has {MOST_BYTES} bytes of requests already")


class TakesPlace:
    """ASGI middleware that gives each request its place, and learns when the client has left it."""

    def __init__(self, app: ASGIApp, places: Places) -> None:
        self._app = app
        self._places = places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        place = Place(Asker(f"{scope['method']} {scope['path']}", _client(scope)))
        left: asyncio.Task[Message] | None = None

        async def until_left() -> Message:
            while (message := await receive())["type"] != "http.disconnect":
                pass
            place.asker.left.set()
            return message

        async def watched() -> Message:
            nonlocal left
            if left is not None:
                return await asyncio.shield(left)
            message = await receive()
            if message["type"] == "http.disconnect":
                place.asker.left.set()
            else:
                self._places.receive(place, message.get("body", b""))
                if not message.get("more_body"):
                    left = asyncio.create_task(until_left())
            return message

        # Each request has a context of its own.
        ASKED_BY.set(place.asker)
        PLACE.set(place)
        self._places.take(place)
        try:
            await self._app(scope, watched, send)
        finally:
            self._places.leave(place)
            if left is not None:
                left.cancel()


def _client(scope: Scope) -> str:
    """Who is to have a fair share: a program on a machine."""
    address = scope.get("client") or ("",)
    return f"{address[0]} {Headers(scope=scope).get('user-agent', '')}"
