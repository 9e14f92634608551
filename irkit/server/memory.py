"""Giving freed memory back, while a server runs for long."""

import asyncio
import ctypes
import sys

SECONDS = 30.0
"""Between two times."""
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_TRIM, _SET = (getattr(_LIBC, name, None) for name in ("malloc_trim", "mallopt"))
# The numbers of M_ARENA_MAX and M_MMAP_THRESHOLD in malloc.h, and what they are set to.
_SETTINGS = {-8: 2, -3: 1 << 20}


def settle() -> None:
    """Have few arenas, and memory of a megabyte or more apart from them; nothing where the C library is not glibc.

    For a process that serves, before it has threads: see mallopt(3). By default glibc has up to eight arenas a core,
    and what is as large as the largest freed so far, up to 32 MB, lies in them. What stays among caches and activations
    that come and go then keeps their room from being used as one piece, or given back.
    """
    if _SET is not None:
        for name, value in _SETTINGS.items():
            _SET(name, value)


def trim() -> None:
    """Give back to the system what has been freed; nothing where the C library is not glibc.

    glibc keeps what threads free in arenas, and the caches of answers come and go in other threads than those that use
    the room again: a server's memory would grow for hours. See malloc_trim(3).
    """
    if _TRIM is not None:
        _TRIM(0)


async def give_back() -> None:
    """`trim`, again and again."""
    while _TRIM is not None:
        await asyncio.sleep(SECONDS)
        await asyncio.to_thread(trim)
