"""What goes to the terminal beside the answers: messages, and a progress bar, on stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody may sit at the other end; a process without console has None for its streams."""
    return stream is not None and stream.isatty()


def say(text: str) -> None:
    """Print one line on stderr."""
    print(printable(text), file=sys.stderr)


def printable(text: str, keep: str = "") -> str:
    """`text` without the control characters that a model file's strings might send to a terminal."""
    return "".join(c if c.isprintable() or c in keep else " " for c in text)


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

    try:
        yield show if is_terminal(sys.stderr) else lambda done, total, what: None
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
