"""The thread that owns the device: what is to be computed is queued, and computed in order, answers side by side.

Another one loads models meanwhile.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Hashable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar

from irkit.errors import IrkitError
from irkit.observing import ASKED_BY

_Result = TypeVar("_Result")

# What compiles, LLVM on the device's thread or llguidance, needs more than the 512 kB that macOS gives a thread.
_STACK_BYTES = 64 << 20
_starting = threading.Lock()

MOST = 8
"""Answers that are made at once unless a server says otherwise; more of them wait for their turn."""


_TOGETHER_SECONDS = 0.1
"""For how long those that have just come are read before the others decode again: as long as a part of a long prompt
takes."""
_PATIENCE = 0.002
"""Seconds for which the device waits at a time for what another thread makes."""
_REMEMBERED = 256
"""Clients of which it is known when they were served last."""


def start_deep(thread: threading.Thread) -> None:
    """Start `thread` with a stack of 64 MB, of which what it does not touch takes no memory."""
    with _starting:
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)


class Step(Protocol):
    """What an answer asks for where others may ask for the same: to be computed for all of them in one call."""

    @property
    def kind(self) -> Hashable:
        """Equal for those that one call can compute."""
        ...

    def together(self, steps: Sequence[Any]) -> list[Any]:
        """The results of `steps`, all of this kind."""
        ...


Steps = Generator[Step | None, Any, Any]
"""An answer in the making: it yields a step and is sent its result, or None where others may go on for a while."""


@dataclass(eq=False)
class _Task:
    begin: Callable[[], Any]
    """Computes the result, or gives the steps of an answer."""
    future: Future[Any]
    cancelled: threading.Event
    uses: tuple[object, ...]
    """What no other task may touch before this one has ended."""
    answers: bool
    client: str
    steps: Steps | None = None
    wants: Step | None = None


class Worker:
    """A queue of jobs and answers, and the one thread that computes them.

    Jobs are done one after the other, answers a step at a time in turn. What uses the same things keeps its order.
    Where answers wait, the client goes first that has the fewest: one that asks for much does not keep out the others.
    """

    def __init__(self) -> None:
        self.most = MOST
        self._arrived: SimpleQueue[_Task] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._open: set[_Task] = set()
        self._waiting: list[_Task] = []
        self._running: list[_Task] = []
        self._served: list[str] = []

    def submit(self, job: Callable[[], _Result], *uses: object) -> Future[_Result]:
        """Queue `job`; its result or exception arrives in the future."""
        return self._put(_Task(job, Future(), threading.Event(), uses, answers=False, client=""))

    def answer(self, begin: Callable[[], Steps], cancelled: threading.Event, *uses: object) -> Future[Any]:
        """Queue an answer, whose steps `begin` gives; what they return at their end arrives in the future.

        `cancelled` is set when the interpreter exits, so that an answer that looks at it between its steps
        does not hold up the exit.
        """
        return self._put(_Task(begin, Future(), cancelled, uses, answers=True, client=ASKED_BY.get().client))

    @property
    def queued(self) -> int:
        """How many answers have not begun yet."""
        return sum(task.answers for task in tuple(self._open)) - len(self._running)

    @property
    def running(self) -> int:
        """How many answers are being made."""
        return len(self._running)

    @property
    def crowded(self) -> bool:
        """Whether there is more to do than one answer."""
        return len(self._open) > 1

    @property
    def here(self) -> bool:
        """Whether this is its thread."""
        return threading.current_thread() is self._thread

    def _put(self, task: _Task) -> Future[Any]:
        with self._lock:
            self._open.add(task)
            if self._thread is None:
                self._start()
        self._arrived.put(task)
        return task.future

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._loop, name="irkit-device", daemon=True)
        start_deep(self._thread)
        atexit.register(self._stop)

    def _loop(self) -> None:
        while self._running or self._waiting or not self._stopping.is_set():
            self._take()
            self._begin()
            self._go_on()

    def _take(self) -> None:
        """What has arrived; it waits where there is nothing else to do."""
        if not self._running and not self._waiting:
            self._waiting.append(self._arrived.get())  # to stop, too, is something that arrives
        while True:
            try:
                self._waiting.append(self._arrived.get_nowait())
            except Empty:
                return

    def _begin(self) -> None:
        """Do the jobs that can be done, and begin the answers that can begin."""
        taken = {id(used) for task in self._running for used in task.uses}
        kept = set[_Task]()
        for task in self._in_turn():
            mine = {id(used) for used in task.uses}
            full = task.answers and len(self._running) >= self.most and not task.cancelled.is_set()
            if full or mine & taken:
                taken |= mine  # what was asked later must not overtake it
                kept.add(task)
            elif task.answers:
                taken |= mine
                self._running.append(task)
                self._served = [client for client in self._served if client != task.client][-_REMEMBERED:]
                self._served.append(task.client)
            else:
                self._end(task, *_outcome(task.begin))
        self._waiting = [task for task in self._waiting if task in kept]

    def _in_turn(self) -> list[_Task]:
        """What waits, in the order in which it may begin: an answer behind as many as its client has before it, and of
        those with as many, the client's last that was served last."""
        before = Counter(task.client for task in self._running)
        served = {client: turn for turn, client in enumerate(self._served, 1)}
        turns = dict[_Task, tuple[int, int]]()
        for task in self._waiting:
            turns[task] = 0, 0
            if task.answers and not task.uses:  # all else keeps its order
                turns[task] = before[task.client], served.get(task.client, 0)
                before[task.client] += 1
        return sorted(self._waiting, key=turns.__getitem__)

    def _go_on(self) -> None:
        """One part of an answer that computes by itself, and a step of all that decode.

        Who has just come goes first: a short prompt does not wait for another part of a long one. Where several have,
        they begin one after the other for a while, so that they decode together from their start.
        """
        until = time.monotonic() + _TOGETHER_SECONDS
        new = [task for task in self._running if task.steps is None]
        begun = [task for task in self._running if task.steps is not None and task.wants is None]
        for task in new:
            self._advance(task, None)
            if time.monotonic() > until:
                break
        for task in begun[:1]:
            self._running.remove(task)  # the others have their turn before it
            self._running.append(task)
            self._advance(task, None)
        groups: dict[Hashable, list[_Task]] = {}
        for task in self._running:
            if task.wants is not None:
                groups.setdefault(task.wants.kind, []).append(task)
        for tasks in groups.values():
            wants = [task.wants for task in tasks]
            assert wants[0] is not None
            found, error = _outcome(lambda first=wants[0], all=wants: first.together(all))
            for index, task in enumerate(tasks):
                self._advance(task, None if found is None else found[index], error)

    def _advance(self, task: _Task, result: Any, error: BaseException | None = None) -> None:
        """Let an answer go on to its next step, with the result of the last, or the error."""
        try:
            steps = task.steps = task.steps or task.begin()
            task.wants = steps.throw(error) if error else steps.send(result)
        except StopIteration as end:
            self._end(task, end.value, None)
        except BaseException as failure:  # the future's reader must learn of it, whatever it is
            self._end(task, None, failure)

    def _end(self, task: _Task, result: Any, error: BaseException | None) -> None:
        if task in self._running:
            self._running.remove(task)
        self._open.discard(task)
        if error is None:
            task.future.set_result(result)
        else:
            task.future.set_exception(error)

    def _stop(self) -> None:
        """Let what is computed end: a thread killed inside the device's code would crash the exit."""
        for task in tuple(self._open):
            task.cancelled.set()
        self.submit(self._stopping.set)
        assert self._thread is not None
        self._thread.join(timeout=10)


def _outcome(function: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return function(), None
    except BaseException as error:
        return None, error


def turn(stopped: Callable[[], bool]) -> Generator[None, None, None]:
    """Let others go on.

    Raises:
        IrkitError: nobody waits any more.
    """
    yield None
    if stopped():
        raise IrkitError("it was cancelled")


def until_done(future: Future[_Result], stopped: Callable[[], bool]) -> Generator[None, None, _Result | None]:
    """The result of `future`, for which others go on meanwhile; None where nobody waits for it any more."""
    while not future.done():
        if stopped():
            return None
        wait([future], _PATIENCE)
        yield None
    return future.result()


def until_there(future: Future[_Result]) -> Generator[None, None, _Result]:
    """The result of `future`, for which others go on meanwhile, whoever waits for it."""
    yield from until_done(future, lambda: False)
    return future.result()


DEVICE = Worker()
LOADER = Worker()
"""It reads weights, so that those who have theirs go on."""
COMPILER = Worker()
"""It compiles what one answer waits for while others go on."""
