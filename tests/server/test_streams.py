import asyncio
from collections.abc import AsyncIterator

import pytest

from irkit.server.streams import _AHEAD, _joined


def pieces(parts: AsyncIterator[bytes]) -> list[bytes]:
    async def read() -> list[bytes]:
        return [piece async for piece in _joined(parts)]

    return asyncio.run(read())


def test_what_comes_without_a_wait_is_one_piece() -> None:
    async def parts() -> AsyncIterator[bytes]:
        for part in (b"a", b"b"):
            yield part
        await asyncio.sleep(0.01)
        for part in (b"c", b"d", b"e"):
            yield part

    assert pieces(parts()) == [b"ab", b"cde"]


def test_what_came_before_an_error_is_sent_before_it() -> None:
    async def parts() -> AsyncIterator[bytes]:
        yield b"a"
        raise ValueError("broken")

    async def read() -> None:
        joined = _joined(parts())
        assert await anext(joined) == b"a"
        with pytest.raises(ValueError, match="broken"):
            await anext(joined)

    asyncio.run(read())


def test_nothing_is_nothing() -> None:
    async def parts() -> AsyncIterator[bytes]:
        for part in ():
            yield part

    assert pieces(parts()) == []


def test_who_reads_no_further_ends_what_makes_the_parts() -> None:
    ended = asyncio.Event()

    async def parts() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"a"
                await asyncio.sleep(0.001)
        finally:
            ended.set()

    async def read() -> None:
        joined = _joined(parts())
        assert await anext(joined) == b"a"
        await joined.aclose()  # pyright: ignore[reportAttributeAccessIssue]
        await asyncio.wait_for(ended.wait(), 5)

    asyncio.run(read())


def test_little_is_made_ahead_of_who_reads_slowly() -> None:
    made = 0

    async def parts() -> AsyncIterator[bytes]:
        nonlocal made
        while made < 1000:
            made += 1
            yield b"a"

    async def read() -> None:
        sizes = []
        async for piece in _joined(parts()):
            await asyncio.sleep(0.001)
            sizes.append(len(piece))
            assert made <= sum(sizes) + 2 * _AHEAD
        assert sum(sizes) == 1000
        assert max(sizes) <= _AHEAD

    asyncio.run(read())
