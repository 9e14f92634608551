"""The sessions a server holds: one for each model and set of load options, opened when first asked for."""

import asyncio
import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
from anyio import CapacityLimiter, to_thread

from irkit import hub
from irkit.engine import Model
from irkit.errors import BudgetError, BusyError, ModelNotFoundError, OptionError
from irkit.hub import naming
from irkit.observing import Asked
from irkit.options import LoadOptions, ServeOptions, seconds
from irkit.server import memory
from irkit.server.places import Places
from irkit.session import Session
from irkit.trace import size

_Key = tuple[str, LoadOptions]
_Result = TypeVar("_Result")

WAITING = 64
"""The most calls that wait for their results in a thread each; further ones queue for a thread."""


PATIENCE = 60.0
"""Seconds that a model waits for room in memory while others compute."""


@dataclass
class _Stay:
    """How long a session stays open when nobody uses it: for `seconds`, of which `timer` tells the end."""

    seconds: float
    timer: asyncio.Handle | None = None
    ends: float = math.inf
    """When that is, on the loop's clock."""


@dataclass(frozen=True)
class Running:
    """A model in memory, with a context of `n_ctx`; it is let go of in `expires` seconds, if nobody uses it."""

    name: str
    model: Model
    n_ctx: int
    expires: float
    lent: bool = False
    """Whether a program has lent it."""


class Sessions:
    """Opens each session once, however many requests ask for it at the same time.

    One that nobody has used for as long as was asked is let go of. Where the weights of all would take more memory
    than they may, those that were not used for the longest time are; never one that a request is using.
    """

    def __init__(self, options: ServeOptions | None = None) -> None:
        serving = options or ServeOptions()
        self.places = Places(serving.parallel + serving.max_queue, self._left)
        self._keep_alive = seconds(serving.keep_alive)
        self._stays: dict[_Key, _Stay] = {}
        self._letting_go: set[asyncio.Task[None]] = set()
        self._memory = psutil.virtual_memory().total * 3 // 4 if serving.memory is None else serving.memory
        self._opened: dict[_Key, asyncio.Task[Session]] = {}
        self._making_room = asyncio.Lock()
        self._waiting = CapacityLimiter(WAITING)
        self._lent: dict[str, Session] = {}
        self._observed: list[Callable[[], None]] = []
        self.observer: Callable[[Asked], Any] = lambda asked: None
        """Told of every answer that a request begins."""

    def lend(self, session: Session) -> str:
        """Answer with a session that a program has opened, too; the name that requests give its model."""
        here = hub.manifest(session.name) if naming.parse(session.name) else None
        name = here.name if here else naming.clean_name(session.model.path.stem)
        self._lent[name] = session.pooled()
        self._observed.append(session.observe(self._tell))
        return name

    def _tell(self, asked: Asked) -> None:
        if asked.by:  # a session that was lent answers the program, too
            self.observer(asked)

    def _open(self, key: _Key) -> Session:
        session = Session(hub.OnlyName(key[0]), **dict(key[1])).pooled()
        session.observe(self._tell)
        return session

    @property
    def lent(self) -> Sequence[str]:
        """The names of the models that programs have opened, and lent."""
        return tuple(self._lent)

    def only(self) -> str:
        """The model that a request means which names none: the one that is held, or the only one there is.

        Raises:
            OptionError: there are several, or none.
        """
        names = self.held or {manifest.name for manifest in hub.models()}
        if len(names) != 1:
            raise OptionError(f'option "model" is missing; there are {", ".join(sorted(names)) or "none yet"}', "model")
        return names.pop()

    async def get(
        self, model: str, options: LoadOptions, *, computes: bool = True, keep_alive: float | None = None
    ) -> Session:
        """The session of the model that `model` means, for the request of this context; where it `computes`, with room
        in memory for the weights. When that has ended, it stays open for `keep_alive` seconds.

        Raises:
            ModelNotFoundError: there is no such model.
            BusyError: the server has enough to do, or others compute with models that leave no room for this one.
            BudgetError: it takes more memory than all models may.
            IrkitError: what opening it raises.
        """
        if computes:
            self.places.admit()
        name = await self.name_of(model)
        if lent := self._lent.get(name):
            if options in (LoadOptions(), lent.options):
                return lent
            await to_thread.run_sync(known, name)
        key = name, options
        while True:
            task = self._opened.get(key)
            if task is None:
                opening = to_thread.run_sync(self._open, key)
                task = self._opened[key] = asyncio.create_task(opening)
            try:
                session = await asyncio.shield(task)  # a client that leaves does not stop what others wait for
            finally:
                if _failed(task) and self._opened.get(key) is task:
                    del self._opened[key]  # the next request tries again
            if computes:
                await self._make_room(key, task)
            if self._opened.get(key) is task:  # nobody let go of it meanwhile
                self.places.use(key)
                self._stay(key, self._keep_alive if keep_alive is None else keep_alive)
                self._opened[key] = self._opened.pop(key)  # those used last come last
                return session

    async def name_of(self, model: str) -> str:
        """The name of the model that `model` means: that of one that is lent, or is `known`.

        Raises:
            ModelNotFoundError, OptionError: as for `known`.
        """
        asked = naming.parse(model.lower())
        if asked and not asked.host and asked.own in self._lent:
            return asked.own
        return await to_thread.run_sync(known, model)

    async def _make_room(self, key: _Key, task: "asyncio.Task[Session]") -> None:
        """Let go of other models, until the weights of the session that `task` opened have room."""
        if self._opened.get(key) is not task or (task.result().model.loaded and not self._making_room.locked()):
            return
        async with self._making_room:  # first come, first served
            if self._opened.get(key) is not task:
                return
            session = task.result()
            needed = session.model.nbytes + sum(lent.model.nbytes for lent in self._lent.values())
            if needed > self._memory:
                raise BudgetError(
                    f"with {session.name}, {size(needed)} of memory would be taken; the models of this server may take "
                    f"{size(self._memory)} (irkit serve --memory)"
                )
            try:
                async with asyncio.timeout(PATIENCE):
                    while self._opened.get(key) is task and self._loaded(session) > self._memory:
                        idle = next((other for other in self._idle() if other != key), None)
                        if idle is None:
                            await self.places.until_one_ends()
                        else:
                            await self._let_go(idle)
            except TimeoutError:
                raise BusyError(f"there is no room in memory for {session.name} beside the models in use") from None
            if self._opened.get(key) is task:
                session.model.load()  # whoever comes next sees what it takes

    @property
    def nbytes(self) -> int:
        """Bytes that the weights of all models take that are loaded or being loaded."""
        return self._loaded()

    @property
    def held(self) -> set[str]:
        """The names of the models that are open."""
        return {*self._lent, *(name for name, _ in tuple(self._opened))}

    def _loaded(self, *more: Session) -> int:
        """Bytes of the weights that are loaded or being loaded, and of `more`."""
        opened = [task.result() for task in tuple(self._opened.values()) if task.done() and not _failed(task)]
        models = {s.model for s in (*opened, *self._lent.values()) if s.model.loading} | {s.model for s in more}
        return sum(model.nbytes for model in models)

    def _idle(self) -> list[_Key]:
        """The sessions that no request uses, those that were not used for the longest time first."""
        return [key for key, task in self._opened.items() if task.done() and not self.places.used(key)]

    def running(self) -> list[Running]:
        """The models in memory, and those that programs have lent."""
        now = asyncio.get_running_loop().time()
        found = [Running(name, lent.model, lent.n_ctx, math.inf, lent=True) for name, lent in self._lent.items()]
        for key, task in self._opened.items():
            if task.done() and not _failed(task) and task.result().model.loading:
                stay, session = self._stays.get(key, _Stay(self._keep_alive)), task.result()
                expires = stay.ends - now if stay.timer else stay.seconds
                found.append(Running(key[0], session.model, session.n_ctx, expires))
        return found

    def _stay(self, key: _Key, keep_alive: float) -> None:
        """The session of `key` is used; how long it stays open then."""
        if (before := self._stays.get(key)) and before.timer:
            before.timer.cancel()
        self._stays[key] = _Stay(keep_alive)

    def _left(self, key: Any) -> None:
        """A request that used the session of `key` has ended."""
        stay = self._stays.get(key)
        if stay is None or self.places.used(key):
            return
        if stay.timer:
            stay.timer.cancel()
        if stay.seconds < math.inf:
            loop = asyncio.get_running_loop()
            # uvloop's handle of a moment does not know when it ends.
            stay.timer, stay.ends = loop.call_later(stay.seconds, self._expire, key), loop.time() + stay.seconds

    def _expire(self, key: _Key) -> None:
        if key in self._opened and not self.places.used(key):
            letting_go = asyncio.create_task(self._let_go(key))
            self._letting_go.add(letting_go)
            letting_go.add_done_callback(self._letting_go.discard)

    async def _let_go(self, key: _Key) -> None:
        task = self._opened.pop(key)
        if (stay := self._stays.pop(key, None)) and stay.timer:
            stay.timer.cancel()
        if task.done() and not _failed(task):
            await to_thread.run_sync(task.result().close)
            await to_thread.run_sync(gc.collect)  # what is compiled and its arrays hold each other
            await to_thread.run_sync(memory.trim)

    async def compute(self, call: Callable[[], _Result]) -> _Result:
        """What `call` returns, in a thread: for what takes long, apart from the threads of quick calls."""
        return await to_thread.run_sync(call, limiter=self._waiting)

    async def close(self, model: str | None = None) -> None:
        """Closes the sessions of a model, or all of them, and cancels what they are computing.

        Raises:
            ModelNotFoundError: there is no such model.
        """
        if model is None:
            for end in self._observed:
                end()
            for lent in self._lent.values():
                await to_thread.run_sync(lent.close)
            await self.forget(None)
        elif (name := await self.name_of(model)) not in self._lent:  # which is not the server's to close
            await self.forget(name)

    async def forget(self, name: str | None) -> None:
        """Closes the sessions of a registered name, which means another model now, or none; or all of them."""
        for key in [key for key in self._opened if name in (None, key[0])]:
            await self._let_go(key)


def known(model: str) -> str:
    """The name of the model that `model` means, by `hub.find` or in the catalog.

    A path is no name: whoever can reach the server shall not open any file of its machine.

    Raises:
        ModelNotFoundError: in Ollama's words.
        OptionError: `model` cannot be a model's name.
    """
    if found := hub.find(model):
        return found.name
    if (short := model.lower().removesuffix(":latest")) in hub.CATALOG:
        return short
    raise missing(model)


def missing(model: str) -> ModelNotFoundError:
    """What to raise where there is no such model: Ollama's words, and the names that come near."""
    return ModelNotFoundError(f"model '{model}' not found{hub.near(model)}")


def _failed(task: asyncio.Task[Session]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
