"""The thread that owns the device: what is to be computed is queued, and computed in order."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

_Result = TypeVar("_Result")

# LLVM, which compiles on this thread, needs more than the 512 kB that macOS gives a thread.
_STACK_BYTES = 64 << 20


class Worker:
    """A queue of jobs and the one thread that runs them."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._open: set[threading.Event] = set()

    def submit(self, job: Callable[[], _Result], cancelled: threading.Event | None = None) -> Future[_Result]:
        """Queue `job`; its result or exception arrives in the future.

        `cancelled` is set when the interpreter exits, so that a job that looks at it between its steps
        does not hold up the exit.
        """
        future: Future[Any] = Future()
        event = cancelled or threading.Event()

        def run() -> None:
            try:
                future.set_result(job())
            except BaseException as error:  # the future's reader must learn of it, whatever it is
                future.set_exception(error)
            finally:
                self._open.discard(event)

        with self._lock:
            self._open.add(event)
            if self._thread is None:
                self._start()
        self._queue.put(run)
        return future

    def _start(self) -> None:
        before = threading.stack_size(_STACK_BYTES)
        try:
            self._thread = threading.Thread(target=self._loop, name="irkit-device", daemon=True)
            self._thread.start()
        finally:
            threading.stack_size(before)
        atexit.register(self._stop)

    def _loop(self) -> None:
        while True:
            self._queue.get()()

    def _stop(self) -> None:
        """Let the running job end: a thread killed inside the device's code would crash the exit."""
        for event in tuple(self._open):
            event.set()
        idle = threading.Event()
        self._queue.put(idle.set)
        idle.wait(timeout=10)


DEVICE = Worker()
