"""What the machine itself gives: how fast it reads memory; and how to keep one of its cores busy."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

BYTES = 256 << 20
"""Read to measure the memory: several times what caches hold."""
PASSES = 8

_SPIN = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
while True:
    pass
"""


def memory_bandwidth(threads: int, size: int = BYTES) -> float:
    """Bytes a second that so many threads read together, in the best of several passes over `size` bytes.

    The maximum of bytes is numpy's cheapest reduction: one thread of it is faster than the memory is, and it lets
    other threads run.
    """
    array = np.ones(size, np.uint8)  # touched: pages never written to would all be one page of zeros
    parts = np.array_split(array, threads)
    best = 0.0
    for _ in range(PASSES):
        readers = [threading.Thread(target=np.max, args=(part,)) for part in parts]
        began = time.perf_counter()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        best = max(best, size / (time.perf_counter() - began))
    return best


@contextmanager
def busy_core(wanted: bool) -> Iterator[None]:
    """Keeps one core busy with another process meanwhile, if that is wanted."""
    if not wanted:
        yield
        return
    # It ends with its standard input, so it cannot outlive this process either.
    with subprocess.Popen([sys.executable, "-c", _SPIN], stdin=subprocess.PIPE) as spinning:
        try:
            yield
        finally:
            spinning.kill()
