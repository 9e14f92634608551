"""What a notebook gets that a program does not: progress bars, and answers that end with the cell that was stopped."""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from irkit.results import Generation

Progress = Callable[[int, int | None, str], None]
"""Called as progress(bytes done, bytes in all or None, what is being done)."""
LOAD_BAR_FROM = 256 << 20
"""Weights, in bytes, from which on loading shows a bar: fewer are there before it is drawn."""
REFRESH_SECONDS = 0.2
"""Between two looks at an answer in the making: each sends the whole text."""
STOP_SECONDS = 5.0
"""How long an interrupted answer may take to end, to be shown as it stands."""

_begun: weakref.WeakSet[Generation] = weakref.WeakSet()
_watched: weakref.WeakSet[Any] = weakref.WeakSet()


def shell() -> Any:
    """The shell of the Jupyter kernel that runs this, or None."""
    ipython = sys.modules.get("IPython")
    found = ipython.get_ipython() if ipython else None
    return found if hasattr(found, "kernel") else None


def in_cell() -> bool:
    """Whether this runs in a cell of a notebook: what is shown from another thread lands nobody knows where."""
    return shell() is not None and threading.current_thread() is threading.main_thread()


@contextmanager
def progress() -> Iterator[Progress | None]:
    """Yields what puts up a bar at its first call, in a notebook, and None elsewhere."""
    bar: Any = None

    def show(done: int, total: int | None, what: str) -> None:
        nonlocal bar
        if bar is None:
            bar = _bar(what, total)
        if bar.total != total or done < bar.n:
            bar.reset(total)
        if bar.desc != f"{what}: ":
            bar.set_description(what)
        bar.update(done - bar.n)

    if not in_cell():
        yield None
        return
    try:
        yield show
    finally:
        if bar is not None:
            bar.close()


def load_bar(name: str, total: int) -> Callable[[float], None]:
    """What shows, in a notebook, which fraction of the `total` bytes of a model's weights is loaded."""
    if total < LOAD_BAR_FROM or not in_cell():
        return lambda fraction: None
    bar = _bar(f"loading {name}", total)

    def show(fraction: float) -> None:
        bar.update(round(fraction * total) - bar.n)
        if fraction >= 1:
            bar.close()

    return show


def _bar(what: str, total: int | None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without ipywidgets it says so, and draws with characters
        from tqdm.auto import tqdm
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, file=sys.stdout)


def ends_with_cell(generation: Generation) -> Generation:
    """The same answer; if the cell that asked for it is interrupted, in whatever it does, the answer is cancelled."""
    kernel_shell = shell()
    if kernel_shell is not None and in_cell():
        _begun.add(generation)
        if kernel_shell not in _watched:
            _watched.add(kernel_shell)
            kernel_shell.events.register("post_run_cell", _after_cell)
    return generation


def _after_cell(result: Any) -> None:
    if isinstance(result.error_in_exec, KeyboardInterrupt):
        for generation in tuple(_begun):
            generation.cancel()
    _begun.clear()


def stream(generation: Generation) -> None:
    """Show an answer while it is made: what IPython does with a cell's value."""
    if shell() is None:  # IPython in a terminal
        for piece in generation.texts():
            print(piece, end="", flush=True)
        print()
        return
    from IPython.display import display

    def bundle() -> dict[str, str]:
        return {"text/plain": generation.partial_text, "text/html": generation._repr_html_()}

    shown = display(bundle(), raw=True, display_id=True)
    assert shown is not None
    try:
        while not generation.wait_for(REFRESH_SECONDS):
            shown.update(bundle(), raw=True)
        generation.wait()
    except KeyboardInterrupt:
        generation.cancel()
        raise
    finally:
        generation.wait_for(STOP_SECONDS)
        shown.update(bundle(), raw=True)
