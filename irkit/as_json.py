"""What verbs return, as what the json module writes: the command line and the server print the same."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from irkit.errors import BudgetError
from irkit.results import Generation, Score, Token
from irkit.trace import Estimate, Largest, Trace, size

MAX_NUMBERS = 1_000_000
"""The most numbers of traces that `as_json` writes out."""


def as_json(value: Any, trace: Callable[[Trace], Any] | None = None) -> Any:
    """`value`, something a verb returned, as what the json module writes; a trace in it as `trace` puts it.

    Raises:
        BudgetError: the traces in it hold more than `MAX_NUMBERS` numbers, if nothing else puts them.
    """
    if trace is None:
        _check_numbers(value)
        trace = _trace_as_json
    if isinstance(value, Trace):
        return trace(value)
    if isinstance(value, Generation):
        parts = ("text", "finish_reason", "tokens", "stats")
        return {part: as_json(getattr(value, part), trace) for part in parts}
    if isinstance(value, Score):
        return {part: as_json(getattr(value, part), trace) for part in ("tokens", "total", "perplexity")}
    if isinstance(value, Estimate):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)} | {"fits": value.fits}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {field.name: as_json(getattr(value, field.name), trace) for field in dataclasses.fields(value)}
        if isinstance(value, Token) and found["captures"] is None:
            del found["captures"]  # a field of those who asked for it
        return found
    if isinstance(value, list | tuple):
        return [as_json(item, trace) for item in value]
    if isinstance(value, dict):
        return {name: as_json(item, trace) for name, item in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, np.ndarray):
        if np.isfinite(value).all():
            return value.tolist()
        # JSON has no infinity, which masked scores are.
        return np.where(np.isfinite(value), value.astype(object), np.array(None)).tolist()
    return value


def _trace_as_json(trace: Trace) -> dict[str, Any]:
    arrays = {name: _array_as_json(trace[name]) for name in trace}
    if trace.has_logits:
        arrays["logits"] = _array_as_json(trace.logits)
    plain = {"ids": trace.ids, "strings": trace.strings, "arrays": arrays, "nbytes": trace.nbytes}
    return as_json({**plain, "provenance": trace.provenance}, _trace_as_json)


def _array_as_json(value: Any) -> dict[str, Any]:
    if isinstance(value, Largest):
        return {"shape": list(value.values.shape), "values": value.values, "indices": value.indices}
    return {"shape": list(value.shape), "values": value}


def _check_numbers(value: Any) -> None:
    if isinstance(value, Generation):
        value = value.tokens
    several = value if isinstance(value, list | tuple) else [value]
    found = [item.captures if isinstance(item, Token) else item for item in several]
    nbytes = sum(item.nbytes for item in found if isinstance(item, Trace))
    if nbytes > 4 * MAX_NUMBERS:
        raise BudgetError(
            f"about {nbytes // 4:,} numbers ({size(nbytes)}) were kept, JSON holds at most {MAX_NUMBERS:,}; ask for "
            "fewer names, layers or positions, a reducer, no logits, or for safetensors (on the command line, --output)"
        )
