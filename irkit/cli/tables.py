"""What `irkit trace` and `irkit lens` print: arrays in one line each, and a table as wide as the terminal."""

import math
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from irkit.analysis.lens import LogitLens, lens_rows
from irkit.cli.terminal import is_terminal, printable
from irkit.results import columns
from irkit.trace import Largest, Trace, size

_WIDEST = 14
"""Characters of a cell of the lens on a terminal; longer tokens are cut."""


def summary(trace: Trace) -> str:
    """A line for each hook point: its layers, the shape of one layer's array, and its size in numbers."""
    count = max(map(len, trace.ids))
    texts = f"{len(trace.ids)} texts, " if len(trace.ids) > 1 else ""
    lines = [f"{texts}{count} tokens, {len(trace)} arrays, {size(trace.nbytes)}"]
    rows = []
    for point in trace.provenance.names:
        layers = trace.layers(point)
        values = [trace[point, layer] for layer in layers] or [trace[point]]
        kept = trace.provenance.reduce.get(point, "none")
        shape = (values[0].values if isinstance(values[0], Largest) else values[0]).shape
        where = f"layers {_ranges(layers)}" if layers else ""
        rows.append([point, where, str(list(shape)), _measured(point, values, kept)])
    if trace.has_logits:
        rows.append(["logits", "", str(list(trace.logits.shape)), ""])
    lines += ["  ".join(row).rstrip() for row in columns(rows)] if rows else []
    lines += [f"changed by {edit}" for edit in trace.provenance.edits]
    return "\n".join(printable(line) for line in lines)


def _measured(point: str, values: list[Any], kept: str) -> str:
    """The mean over all of a hook point's vectors of what says most about them."""
    if kept == "lens":
        return f"probability {np.mean([np.exp(value.values[..., 0]) for value in values]):.3g}"
    if kept == "top_k":
        return f"largest {np.mean([value.values[..., 0] for value in values]):.3g}"
    if kept in ("norm", "entropy"):
        return f"{kept} {np.mean(values):.3g}"
    if point == "attn.hook_pattern":
        return f"entropy {np.mean([_entropy(value) for value in values]):.3g} nats"
    finite = [np.where(np.isfinite(value), value, 0) for value in values]
    return f"norm {np.mean([np.linalg.norm(value, axis=-1) for value in finite]):.3g}"


def _entropy(pattern: np.ndarray) -> np.ndarray:
    return -np.sum(np.where(pattern > 0, pattern * np.log(np.where(pattern > 0, pattern, 1)), 0), axis=-1)


def _ranges(numbers: tuple[int, ...]) -> str:
    """Sorted numbers with runs of them as 3-7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def show_lens(lens: LogitLens) -> None:
    """Print a table of the likeliest token of each layer at each position.

    On a terminal it is as wide as that, in as many parts as it takes, and likelier tokens stand out; elsewhere it is
    the plain whole.
    """
    if not is_terminal(sys.stdout):
        print(lens)
        return
    from rich.console import Console
    from rich.table import Table

    probability = np.exp(lens.logprobs[:, :, 0])[::-1]
    for begin, end in _parts(lens, shutil.get_terminal_size().columns):
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=False)
        for _ in range(end - begin + 1):
            table.add_column(no_wrap=True, overflow="ellipsis", max_width=_WIDEST)
        for index, row in enumerate(lens_rows(lens)):
            styles = ["bold"] * (end - begin) if not index else [_style(p) for p in probability[index - 1, begin:end]]
            cells = zip(row[begin + 1 : end + 1], styles, strict=True)
            table.add_row(row[0], *(_text(cell, style) for cell, style in cells))
        Console(highlight=False).print(table)


def _parts(lens: LogitLens, width: int) -> Iterator[tuple[int, int]]:
    """Ranges of positions whose columns fit into `width`, beside that of the layers."""
    from rich.cells import cell_len

    rows = lens_rows(lens)
    widths = [min(max(map(cell_len, column)), _WIDEST) + 1 for column in zip(*rows, strict=True)]
    begin, used = 0, widths[0]
    for position, column in enumerate(widths[1:]):
        if position > begin and used + column > width:
            yield begin, position
            begin, used = position, widths[0]
        used += column
    yield begin, len(widths) - 1


def _text(cell: str, style: str) -> Any:
    from rich.text import Text

    return Text(printable(cell), style)


def _style(probability: float) -> str:
    steps = ("dim", "", "bold", "bold green")
    return steps[min(math.floor(4 * probability), 3)]
