"""Freed memory goes back to the system, where the C library keeps it."""

import asyncio
import ctypes
import sys
import threading
from pathlib import Path

import pytest
from real import serving

from irkit.server import memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is glibc's")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def freed_in_a_thread() -> None:
    """Leave pieces too small to be mapped alone, with one held behind them, so that the arena's end is not free."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    pieces = [libc.malloc(100_000) for _ in range(2000)]
    for piece in pieces:
        ctypes.memset(piece, 1, 100_000)
    for piece in pieces[:-1]:
        libc.free(piece)


def test_what_was_freed_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("not glibc")
    monkeypatch.setattr(memory, "SECONDS", 0.01)
    thread = threading.Thread(target=freed_in_a_thread)
    thread.start()
    thread.join()
    before = resident()

    async def some_time() -> None:
        task = asyncio.create_task(memory.give_back())
        for _ in range(500):
            await asyncio.sleep(0.01)
            if resident() < before - 100_000_000:
                break
        task.cancel()

    asyncio.run(some_time())
    assert resident() < before - 100_000_000


def test_a_server_has_few_arenas(model_path: Path) -> None:
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("not glibc")
    with serving() as server:
        server.ask()
        lines = Path(f"/proc/{server.process.pid}/maps").read_text().splitlines()
    # An arena's heaps begin at multiples of 64 MB, and have no name.
    heaps = [line for line in lines if int(line.split("-")[0], 16) % (64 << 20) == 0 and len(line.split()) == 5]
    assert len(heaps) <= 2  # a thread each, by default
