"""Giving freed memory back, while a server runs for long."""

import asyncio
import ctypes
import sys

SECONDS = 30.0
"""Between two times."""
_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def trim() -> None:
    """Give back to the system what has been freed; nothing where the C library is not glibc.

    glibc keeps what threads free in arenas of their own, several a core, and the caches of answers come and go in other
    threads than those that use the room again: a server's memory would grow for hours. See malloc_trim(3).
    """
    if _TRIM is not None:
        _TRIM(0)


async def give_back() -> None:
    """`trim`, again and again."""
    while _TRIM is not None:
        await asyncio.sleep(SECONDS)
        await asyncio.to_thread(trim)
