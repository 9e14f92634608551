"""Answers that are still being made, as HTTP responses; a client that leaves ends its answer."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from irkit.errors import IrkitError
from irkit.server.errors import fault
from irkit.server.places import PLACE, Answer
from irkit.server.replies import written

_AHEAD = 64
"""Parts of a stream that are made before a slow client has read those before them."""


async def answer_once(request: Request, answer: Answer, reply: Awaitable[Any]) -> Response:
    """A response of one JSON object, `reply`, which waits for the end of `answer`."""
    async with cancelled_with_client(request, answer):
        return Response(await written(await reply), media_type="application/json")


async def answer_lines(request: Request, answer: Answer, objects: AsyncIterator[dict[str, Any]]) -> Response:
    """A response of `objects`, one line each, as they come.

    An error before the first of them is raised, and so has an HTTP status; a later one is the last line.
    """
    return await _streamed(_written(request, answer, objects, _line), "application/x-ndjson")


async def answer_events(request: Request, answer: Answer, objects: AsyncIterator[dict[str, Any]]) -> Response:
    """A response of `objects` as server-sent events, as they come, and OpenAI's word for the end.

    An error before the first of them is raised, and so has an HTTP status; a later one is the last event.
    """
    written = _written(request, answer, objects, _event, b"data: [DONE]\n\n")
    return await _streamed(written, "text/event-stream")


async def _streamed(parts: AsyncIterator[bytes], media_type: str) -> Response:
    first = await anext(parts)

    async def body() -> AsyncIterator[bytes]:
        yield first
        async for piece in _joined(parts):
            yield piece

    return StreamingResponse(body(), media_type=media_type)


async def _joined(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """`parts`, in one piece those that come without a wait in between, and no more than `_AHEAD` of them.

    The engine makes several tokens in a call, and each write wakes the client, which takes a core from the engine.
    """
    ready = asyncio.Queue[bytes](_AHEAD)

    async def fill() -> None:
        async for part in parts:
            await ready.put(part)

    def end(_: Any) -> None:
        with suppress(asyncio.QueueFull):  # then nobody waits for more
            ready.put_nowait(b"")

    filling = asyncio.create_task(fill())
    filling.add_done_callback(end)
    try:
        while not filling.done() or not ready.empty():
            piece = [await ready.get()]
            while not ready.empty():
                piece.append(ready.get_nowait())
            if joined := b"".join(piece):
                yield joined
        await filling
    finally:
        filling.cancel()


async def _written(
    request: Request,
    answer: Answer,
    objects: AsyncIterator[dict[str, Any]],
    framed: Callable[[bytes], bytes],
    end: bytes = b"",
) -> AsyncIterator[bytes]:
    begun = False
    async with cancelled_with_client(request, answer):
        try:
            async for item in objects:
                yield framed(await written(item))
                begun = True
            if end:
                yield end
        except Exception as error:
            if not begun:
                raise
            yield framed(await written(fault(error).body(request.url.path)))
            if not isinstance(error, IrkitError):
                raise


def _line(item: bytes) -> bytes:
    return item + b"\n"


def _event(item: bytes) -> bytes:
    return b"data: " + item + b"\n\n"


@asynccontextmanager
async def cancelled_with_client(request: Request, answer: Answer) -> AsyncIterator[None]:
    """Cancels `answer` when the client disconnects, and when nobody reads on."""

    async def wait() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        answer.cancel()

    waiting = asyncio.create_task(wait())
    if place := PLACE.get():
        place.answers.append(answer)
    try:
        yield
    finally:
        waiting.cancel()
        answer.cancel()
