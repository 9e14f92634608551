"""Making traces, on the device's thread, and knowing beforehand what one takes."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import psutil

from irkit.engine.tapping import Tapping
from irkit.engine.worker import turn
from irkit.errors import BudgetError
from irkit.trace import Estimate, Largest, Provenance, Trace, Value, kept_axes
from irkit.trace import size as human
from irkit.transformer import taps

if TYPE_CHECKING:
    from irkit.engine.cache import Cache
    from irkit.engine.model import Model
    from irkit.engine.runtime import Runtime
    from irkit.engine.steps import Logits
    from irkit.options import CaptureOptions, TraceOptions

CHUNKS = (8, 16, 32, 64, 128, 256, 512)
"""Tokens that one call reads of each text; a longer text is read in several."""


@dataclass(frozen=True)
class Call:
    """One call of the compiled program: where its tokens stand, and how many count in each row."""

    start: int
    count: np.ndarray
    size: int
    captures: Mapping[str, Any]
    logits: Any
    step: int | None = None
    """Of several passes in one call, the one that is meant: the first axis of what was captured."""


def whole(
    model: Model,
    name: str,
    rows: Sequence[Sequence[int]],
    tapping: Tapping,
    logits: Logits,
    runtime: Runtime,
    stopped: Callable[[], bool],
) -> Generator[None, None, Trace]:
    """The `Trace` of the texts, and the steps of making it."""
    calls = yield from trace(runtime, rows, tapping, logits, stopped)
    strings = [[model.tokenizer.token(token) for token in ids] for ids in rows]
    held = nbytes([(call.captures, call.logits) for call in calls])
    source = provenance(model, name, tapping)
    found = values(calls, tapping)
    return Trace(rows, strings, found, partial(_logits, calls, logits), source, model.config.n_layers, held)


def provenance(model: Model, name: str, tapping: Tapping) -> Provenance:
    """Where what `tapping` captures comes from."""
    captures = tapping.spec.captures
    return Provenance(
        model=name,
        path=str(model.path),
        precision=model.precision,
        names=tuple(capture.point for capture in captures),
        reduce={capture.point: capture.reduce for capture in captures if capture.reduce != "none"}
        | dict.fromkeys(tapping.lenses, "lens"),
        heads=dict(tapping.heads),
        positions=tapping.positions,
        edits=tuple(map(repr, tapping.edits)),
    )


def _logits(calls: Sequence[Call], which: Logits) -> np.ndarray | None:
    if which == "none":
        return None
    parts = [np.asarray(call.logits) for call in calls]
    capture = taps.Capture("hook_resid_post", reduce="last" if which == "last" else "none")
    return join(calls, parts, capture, None)


def estimate(runtime: Runtime, rows: Sequence[Sequence[int]], tapping: Tapping, options: TraceOptions) -> Estimate:
    """What a trace would take."""
    by_name, cache = sizes(runtime, len(rows), max(map(len, rows)), tapping, options.logits)
    budget = psutil.virtual_memory().available // 2 if options.budget is None else options.budget
    return Estimate(sum(by_name.values()), cache, by_name, budget)


def check(
    found: Estimate, runtime: Runtime, rows: Sequence[Sequence[int]], tapping: Tapping, options: TraceOptions
) -> None:
    """Raises BudgetError where `found` is over its budget, and says what would fit."""
    if found.fits:
        return
    longest = max(map(len, rows))
    fitting = 0
    for length in (size for size in (*CHUNKS, 1024, 2048, 4096, 8192) if size < longest):
        by_name, cache = sizes(runtime, len(rows), length, tapping, options.logits)
        fitting = length if sum(by_name.values()) + cache <= found.budget else fitting
    largest = max(found.by_name, key=lambda name: found.by_name[name], default="")
    alone = f" ({largest} alone {human(found.by_name[largest])})" if largest else ""
    hint = f"{fitting} tokens would fit" if fitting else "fewer names, layers or heads, or a reducer, would take less"
    raise BudgetError(
        f"the trace would hold {human(found.nbytes)}{alone}, and a KV cache of {human(found.cache)} meanwhile; the "
        f"budget is {human(found.budget)} (option budget, in bytes); {hint}"
    )


def shower(
    model: Model, tapping: Tapping, ids: list[int], cache: Cache, options: CaptureOptions | None
) -> Callable[[dict[str, Any], int, int | None], Trace]:
    """Turns what each pass of an answer captured into the `Trace` that its token carries, of one position.

    Together they hold no more than the budget: the oldest are let go, and say so when they are read.
    """
    source = provenance(model, model.path.stem, tapping)
    free = psutil.virtual_memory().available // 2
    budget = free if options is None or options.budget is None else options.budget
    why = f"the captures of this token were let go: together they took more than the budget of {human(budget)}"
    held: deque[Trace] = deque()
    total = 0

    def show(captures: dict[str, Any], length: int, step: int | None) -> Trace:
        nonlocal total
        call = Call(length - 1, np.ones(1, np.int32), 1, captures, None, step)
        found = values([call], tapping)
        for point, k in tapping.lenses.items():
            found |= _through_lens(model, {name: found[name] for name in found if taps.split(name)[0] == point}, k)
        token = cache.ids[-1]
        where = replace(source, positions=(length - 1,))
        text, taken = model.tokenizer.token(token), nbytes(captures)
        if step is not None:
            taken //= len(jax.tree.leaves(captures)[0])
        made = Trace([[token]], [[text]], found, lambda: None, where, model.config.n_layers, taken)
        if made.nbytes > budget:
            raise BudgetError(
                f"what one token captures takes {human(made.nbytes)}, the budget is {human(budget)} (option budget)"
            )
        held.append(made)
        total += made.nbytes
        while total > budget:
            total -= held[0].nbytes
            held.popleft()._let_go(why)
        return made

    return show


def _through_lens(model: Model, streams: Mapping[str, Callable[[], Value]], k: int) -> dict[str, Callable[[], Value]]:
    """What the logit lens reads in the `streams` of one position, all of them when the first is looked at."""

    @functools.cache
    def largest() -> dict[str, Value]:
        rows = np.stack([np.asarray(stream())[0] for stream in streams.values()], axis=1)
        runtime = model.load().result()
        reading = model.submit(lambda: jax.device_get(runtime.lens(rows, np.array([-1], np.int32), k))).result()
        parts = zip(streams, reading.logprobs[0], reading.ids[0], strict=True)
        return {name: Largest(values[None, None], ids[None, None]) for name, values, ids in parts}

    return {name: lambda name=name: largest()[name] for name in streams}


def plan(length: int) -> tuple[list[tuple[int, int]], int]:
    """The calls in which texts up to this length are read, as (start, size), and the cache's capacity."""
    starts = range(0, max(length, 1), CHUNKS[-1])
    sizes = [next(size for size in CHUNKS if size >= min(length - start, CHUNKS[-1])) for start in starts]
    calls = list(zip(starts, sizes, strict=True))
    whole = calls[-1][0] + sizes[-1]
    return calls, 1 << (whole - 1).bit_length()


def trace(
    runtime: Runtime,
    rows: Sequence[Sequence[int]],
    tapping: Tapping,
    logits: Logits,
    stopped: Callable[[], bool],
) -> Generator[None, None, list[Call]]:
    """Read the texts in one batch, from an empty cache; others have their turn between two calls.

    Raises:
        IrkitError: it was `stopped` there.
    """
    calls, capacity = plan(max(map(len, rows)))
    cache = runtime.empty(capacity, len(rows))
    made = []
    for start, size in calls:
        yield from turn(stopped)
        tokens = np.zeros((len(rows), size), np.int32)
        for row, ids in zip(tokens, rows, strict=True):
            part = ids[start : start + size]
            row[: len(part)] = part
        count = np.array([min(max(len(ids) - start, 0), size) for ids in rows], np.int32)
        cache, found, captures = yield from runtime.trace(cache, tokens, start, np.maximum(count, 1), tapping, logits)
        made.append(Call(start, count, size, captures, found))
        # Or all calls would be under way at once, and nobody could go on between them.
        jax.block_until_ready((cache.tokens, captures, found))
    return made


def sizes(runtime: Runtime, rows: int, length: int, tapping: Tapping, logits: Logits) -> tuple[dict[str, int], int]:
    """The bytes that `trace` would hold of each hook point and of the logits, and those of its KV cache."""
    calls, capacity = plan(length)
    found: dict[str, int] = {}
    shapes = {size: runtime.traced((rows, size), capacity, tapping, logits) for size in {size for _, size in calls}}
    for _, size in calls:
        _, kept, captures = shapes[size]
        for name, value in [*captures.items(), ("logits", kept)]:
            point = taps.split(name)[0]
            found[point] = found.get(point, 0) + nbytes(value)
    return {name: size for name, size in found.items() if size}, nbytes(runtime._cache(capacity, rows))


def nbytes(tree: Any) -> int:
    """Of all arrays, or shapes of arrays, in `tree`."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def values(calls: Sequence[Call], tapping: Tapping) -> dict[str, Callable[[], Value]]:
    """What was captured, by full name, each put together when it is asked for."""
    made: dict[str, Callable[[], Value]] = {}
    for capture in tapping.spec.captures:
        layers = tapping.layers[capture.point]
        if not taps.POINTS[capture.point].per_layer:
            made[capture.point] = partial(_value, calls, tapping, capture, capture.point, None)
        for slot, layer in enumerate(layers):
            full = f"blocks.{layer}.{capture.point}"
            key, where = (capture.point, slot) if capture.slots or tapping.spec.stacked else (full, None)
            made[full] = partial(_value, calls, tapping, capture, key, where)
    return made


def _value(calls: Sequence[Call], tapping: Tapping, capture: taps.Capture, key: str, slot: int | None) -> Value:
    parts = []
    for call in calls:
        part = call.captures[key]
        leaves = part if isinstance(part, tuple | list) else (part,)
        at = tuple(index for index in (call.step, slot) if index is not None)
        parts.append([np.asarray(leaf)[at] for leaf in leaves])
    joined = [join(calls, list(each), capture, tapping.positions) for each in zip(*parts, strict=True)]
    return Largest(*joined) if len(joined) == 2 else joined[0]


def join(
    calls: Sequence[Call], parts: Sequence[np.ndarray], capture: taps.Capture, positions: tuple[int, ...] | None
) -> np.ndarray:
    """The parts of several calls as one array, without the padding."""
    axes = kept_axes(capture.point, capture.reduce)
    ends = [call.start + int(call.count.max()) for call in calls]
    if "key" in axes:
        parts = [part[..., : ends[-1]] for part in parts]
    if capture.reduce in ("last", "mean"):
        return _over_calls(calls, parts, axes, capture.reduce)
    axis = next(i for i, name in enumerate(axes) if name in ("pos", "query"))
    if positions is None:
        counts = [end - call.start for call, end in zip(calls, ends, strict=True)]
        parts = [
            np.take(part, range(n), axis) if n < part.shape[axis] else part
            for part, n in zip(parts, counts, strict=True)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)
    by_call = [next(i for i, call in enumerate(calls) if position < call.start + call.size) for position in positions]
    return np.stack([np.take(parts[call], i, axis) for i, call in enumerate(by_call)], axis)


def _over_calls(calls: Sequence[Call], parts: Sequence[np.ndarray], axes: tuple[str, ...], reduce: str) -> np.ndarray:
    """Row by row: the last position is in the last call that reads of the row; a mean is weighted."""
    found = np.zeros_like(parts[0]) if "key" not in axes else np.zeros(parts[0].shape, np.float32)
    for row in range(len(found)):
        counts = np.array([call.count[row] for call in calls])
        if reduce == "last":
            found[row] = parts[int(np.flatnonzero(counts)[-1])][row]
        else:
            weights = counts / counts.sum()
            found[row] = sum(w * part[row] for w, part in zip(weights, parts, strict=True))
    return found
