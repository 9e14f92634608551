"""Answers that are still being made, as HTTP responses; a client that leaves ends its answer."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from irkit.errors import IrkitError
from irkit.results import Generation
from irkit.server.places import PLACE


async def answer_once(request: Request, generation: Generation, reply: Awaitable[Any]) -> Response:
    """A response of one JSON object, `reply`, which waits for the end of `generation`."""
    async with _cancelled_with_client(request, generation):
        return JSONResponse(await reply)


async def answer_lines(request: Request, generation: Generation, objects: AsyncIterator[dict[str, Any]]) -> Response:
    """A response of `objects`, one line each, as they come.

    An error before the first of them is raised, and so has an HTTP status; a later one is the last line.
    """
    lines = _lines(request, generation, objects)
    first = await anext(lines)

    async def body() -> AsyncIterator[bytes]:
        yield first
        async for line in lines:
            yield line

    return StreamingResponse(body(), media_type="application/x-ndjson")


async def _lines(
    request: Request, generation: Generation, objects: AsyncIterator[dict[str, Any]]
) -> AsyncIterator[bytes]:
    begun = False
    async with _cancelled_with_client(request, generation):
        try:
            async for item in objects:
                yield _line(item)
                begun = True
        except Exception as error:
            if not begun:
                raise
            expected = isinstance(error, IrkitError)
            yield _line({"error": str(error) if expected else "internal error"})
            if not expected:
                raise


def _line(item: dict[str, Any]) -> bytes:
    return json.dumps(item, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


@asynccontextmanager
async def _cancelled_with_client(request: Request, generation: Generation) -> AsyncIterator[None]:
    """Cancels `generation` when the client disconnects, and when nobody reads on."""

    async def wait() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        generation.cancel()

    waiting = asyncio.create_task(wait())
    if place := PLACE.get():
        place.answers.append(generation)
    try:
        yield
    finally:
        waiting.cancel()
        generation.cancel()
