"""What goes to the terminal beside the answers: messages, and a progress bar, on stderr."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn, TextIO, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future

    from rich.progress import Progress


_Result = TypeVar("_Result")
_PATIENCE = 0.5
"""Seconds to wait without a word."""
_WIDTH = 20
"""Characters of a bar."""


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody may sit at the other end; a process without console has None for its streams."""
    return stream is not None and stream.isatty()


def say(text: str) -> None:
    """Print one line on stderr."""
    print(printable(text), file=sys.stderr)


def printable(text: str, keep: str = "") -> str:
    """`text` without the control characters that a model file's strings might send to a terminal."""
    return "".join(c if c.isprintable() or c in keep else " " for c in text)


def quit_on_ctrl_c() -> None:
    """Let Ctrl-C end the process at once, with 130, unless whoever started it has made it deaf to Ctrl-C.

    There is nothing to clean up, and a KeyboardInterrupt that hits an import may leave its lock taken: the
    threads that load the model would wait for it for ever.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))


def end_as_by_sigpipe() -> NoReturn:
    """End the process as other programs end when whoever reads their output has gone.

    Python ignores the signal, and would complain about the output that is left.
    """
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGPIPE)
    os._exit(1)  # Windows has no such signal


def wait(future: "Future[_Result]", what: str, done: Callable[[], float]) -> _Result:
    """The result of `future`; a terminal shows what is waited for, if it takes long, and which fraction is `done`."""
    if not is_terminal(sys.stderr):
        return future.result()
    shown = ""
    while not future.done():
        with contextlib.suppress(TimeoutError):
            future.exception(timeout=_PATIENCE)
            break
        fraction = done()
        shown = f"{what} [{'#' * round(_WIDTH * fraction):<{_WIDTH}}] {fraction:4.0%}"
        print(f"\r{shown}", end="", file=sys.stderr, flush=True)
    if shown:
        print(f"\r{' ' * len(shown)}\r", end="", file=sys.stderr, flush=True)
    return future.result()


@contextmanager
def ctrl_c_raises() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt in here, for what it does not end, or what cleans up."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def typed_ahead() -> Iterator[None]:
    """Leave what is typed in here, unseen, to whoever next reads it key by key; Ctrl-C still interrupts.

    A terminal that reads by lines takes Ctrl-D for the end of one, and whoever reads keys then is not told of it.
    """
    try:
        import termios
        import tty
    except ImportError:  # Windows, whose consoles keep each key
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin, termios.TCSANOW)  # it would throw away, unless told otherwise, what was typed before
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int | None, str], None]]:
    """Yields `show(done, total, what)`, in bytes: its first call puts up the bar, if stderr is a terminal."""
    bar: Progress | None = None

    def show(done: int, total: int | None, what: str) -> None:
        nonlocal bar
        if bar is None:
            bar = _start()
            bar.add_task(what)
        bar.update(bar.task_ids[0], completed=done, total=total, description=what)

    if not is_terminal(sys.stderr):
        yield lambda done, total, what: None
        return
    with ctrl_c_raises():  # the bar hides the cursor
        try:
            yield show
        finally:
            if bar is not None:
                bar.stop()


def _start() -> "Progress":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
    bar.start()
    return bar
