"""JSON as bytes; what is large is written in a thread, and in parts, so that the loop goes on meanwhile."""

import json
from collections.abc import Iterator
from typing import Any

from anyio import to_thread
from fastapi.responses import Response

_PART = 1 << 12
"""The most items that are written at once, and 8 times as many characters."""

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def json_response(value: Any) -> Response:
    """The response of `value`, written here: where that may be large, in a thread."""
    return Response(b"".join(parts(value)), media_type="application/json")


async def written(value: Any) -> bytes:
    """`value` as JSON, written in a thread if it is large."""
    if _weight(value) <= _PART:
        return _encode(value).encode()  # a token: to ask a thread for it would take longer
    return await to_thread.run_sync(lambda: b"".join(parts(value)))


def parts(value: Any) -> Iterator[bytes]:
    """`value` as JSON, piece by piece: while the json module writes what it is given at once, no other thread runs."""
    if _weight(value) <= _PART:
        yield _encode(value).encode()
    elif isinstance(value, dict):
        between = b"{"
        for name, item in value.items():
            yield between + _encode({name: 0})[1:-2].encode()  # with the colon
            yield from parts(item)
            between = b","
        yield b"}"
    elif isinstance(value, str):
        size = 8 * _PART
        yield b'"'
        yield from (_encode(value[at : at + size])[1:-1].encode() for at in range(0, len(value), size))
        yield b'"'
    elif isinstance(value[0], list | dict | str):
        between = b"["
        for item in value:
            yield between
            yield from parts(item)
            between = b","
        yield b"]"
    else:
        between = b"["
        for at in range(0, len(value), _PART):
            yield between + _encode(value[at : at + _PART])[1:-1].encode()
            between = b","
        yield b"]"


def _weight(value: Any) -> int:
    """About how many items `value` has, counted little further than `_PART`: a list that begins with a number has only
    such."""
    if isinstance(value, str):
        return len(value) // 8
    if isinstance(value, dict):
        found, items = len(value), value.values()
    elif isinstance(value, list) and value:
        found, items = len(value), value if isinstance(value[0], list | dict | str) else ()
    else:
        return 0
    for item in items:
        if found > _PART:
            break
        if isinstance(item, list | dict | str):
            found += _weight(item)
    return found
