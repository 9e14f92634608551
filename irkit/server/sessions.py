"""The sessions a server holds: one for each model and set of load options, opened when first asked for."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

from irkit import hub
from irkit.errors import ModelNotFoundError
from irkit.hub.registry import clean_name
from irkit.options import LoadOptions
from irkit.session import Session

_Key = tuple[str, LoadOptions]
_Result = TypeVar("_Result")

WAITING = 64
"""The most calls that wait for their results in a thread each; further ones queue for a thread."""


class Sessions:
    """Opens each session once, however many requests ask for it at the same time."""

    def __init__(self) -> None:
        self._opened: dict[_Key, asyncio.Task[Session]] = {}
        self._waiting = CapacityLimiter(WAITING)
        self._lent: dict[str, Session] = {}

    def lend(self, session: Session) -> str:
        """Answer with a session that a program has opened, too; the name that requests give its model."""
        here = hub.find(session.name) if Path(session.name).name == session.name else None
        name = here.name if here else clean_name(session.model.path.stem)
        self._lent[name] = session.pooled()
        return name

    @property
    def lent(self) -> Sequence[str]:
        """The names of the models that programs have opened, and lent."""
        return tuple(self._lent)

    async def get(self, model: str, options: LoadOptions) -> Session:
        """The session of a model that is `known`.

        Raises:
            ModelNotFoundError: there is no such model.
            IrkitError: what opening it raises.
        """
        name = model.lower().removesuffix(":latest")
        lent = self._lent.get(name)
        if lent and options in (LoadOptions(), lent.options):
            return lent
        key = await to_thread.run_sync(known, model), options
        task = self._opened.get(key)
        if task is None:
            opening = to_thread.run_sync(lambda: Session(key[0], **dict(options)).pooled())
            task = self._opened[key] = asyncio.create_task(opening)
        try:
            return await asyncio.shield(task)  # a client that leaves does not stop what others wait for
        finally:
            if _failed(task) and self._opened.get(key) is task:
                del self._opened[key]  # the next request tries again

    async def compute(self, call: Callable[[], _Result]) -> _Result:
        """What `call` returns, in a thread: for what takes long, apart from the threads of quick calls."""
        return await to_thread.run_sync(call, limiter=self._waiting)

    async def close(self, model: str | None = None) -> None:
        """Closes the sessions of a model, or all of them, and cancels what they are computing.

        Raises:
            ModelNotFoundError: there is no such model.
        """
        if model is None:
            for lent in self._lent.values():
                await to_thread.run_sync(lent.close)
        elif model.lower().removesuffix(":latest") in self._lent:
            return  # it is not the server's to close
        name = model and await to_thread.run_sync(known, model)
        for key in [key for key in self._opened if name in (None, key[0])]:
            task = self._opened.pop(key)
            if task.done() and not _failed(task):
                await to_thread.run_sync(task.result().close)


def known(model: str) -> str:
    """The name that `model` is registered under, or stands under in the catalog.

    A path is neither: whoever can reach the server shall not open any file of its machine. Ollama's clients
    may add the tag "latest", which is left out unless the name was registered with it.

    Raises:
        ModelNotFoundError: in Ollama's words.
        OptionError: `model` cannot be a model's name.
    """
    short = model.lower().removesuffix(":latest")
    for name in (short, f"{short}:latest"):
        if hub.find(name):
            return name
    if short in hub.CATALOG:
        return short
    raise ModelNotFoundError(f"model '{model}' not found")


def _failed(task: asyncio.Task[Session]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
