"""Work that takes long, in a thread of its own, which says in lines how far it is."""

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread

from irkit.errors import PullError

REPORT_SECONDS = 0.1
"""How often it is said how far each thing is."""

_Result = TypeVar("_Result")


class Job:
    """One of them. It ends early when its client leaves: what was fetched stays, to be gone on from."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._said: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._cancelled = threading.Event()
        self._told: dict[str, float] = {}
        self.done = False

    def cancel(self) -> None:
        """Have it end."""
        self._cancelled.set()

    def say(self, status: str, **more: Any) -> None:
        """Send a line; from any thread."""
        self._loop.call_soon_threadsafe(self._said.put_nowait, {"status": status, **more})

    def progress(self, done: int, total: int | None, what: str) -> None:
        """Say how much of something is done, in bytes.

        Raises:
            PullError: nobody waits for it any more.
        """
        if self._cancelled.is_set():
            raise PullError("whoever asked for it has left")
        if not self._told:
            self.say("pulling manifest")
        now = time.monotonic()
        if done == total or now - self._told.get(what, -math.inf) >= REPORT_SECONDS:
            self._told[what] = now
            size = {} if total is None else {"total": total}
            # By the digest, clients tell the bars of several files apart.
            self.say(f"pulling {what}", digest=what, **size, completed=done)

    async def lines(
        self, work: Callable[["Job"], _Result], end: Callable[[_Result], Awaitable[None]], limiter: CapacityLimiter
    ) -> AsyncIterator[dict[str, Any]]:
        """What `work` says, in a thread that `limiter` allows, and the end, when `end` was done with its result."""

        def run() -> _Result:
            try:
                return work(self)
            finally:
                self._loop.call_soon_threadsafe(self._said.put_nowait, None)

        working = asyncio.create_task(to_thread.run_sync(run, limiter=limiter))
        working.add_done_callback(self._ended)
        while (line := await self._said.get()) is not None:
            yield line
        await end(await working)
        yield {"status": "success"}

    def _ended(self, working: "asyncio.Task[Any]") -> None:
        self.done = True
        if not working.cancelled():
            working.exception()  # nobody may be left to look at it
