"""Traces in requests and replies: how much a request may ask for, and how arrays travel."""

import base64
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from irkit.as_json import as_json
from irkit.errors import OptionError
from irkit.options import CaptureOptions, parse
from irkit.trace import Trace

Format = Annotated[
    Literal["safetensors", "json"],
    Field(description="How arrays travel: a file of them in base64, or lists of numbers, of which there may be fewer."),
]

MAX_TEXTS = 64
"""The most texts of one trace."""


def bounded(given: Mapping[str, Any], budget: int) -> dict[str, Any]:
    """The arguments of a verb, with no more to keep than the server's budget.

    Raises:
        OptionError: there are too many texts, or what is to be captured is told wrongly.
    """
    found = dict(given)
    if "budget" in found:
        found["budget"] = _least(found["budget"], budget)
    if not isinstance(texts := found.get("texts", ""), str) and "budget" in found and len(texts) > MAX_TEXTS:
        raise OptionError(f"texts: a request may have {MAX_TEXTS}, got {len(texts)}")
    if found.get("capture") is not None:
        capture = found["capture"]
        options = parse(CaptureOptions, capture if isinstance(capture, Mapping) else {"names": capture})
        found["capture"] = dict(options) | {"budget": _least(options.budget, budget)}
    return found


def _least(asked: int | None, budget: int) -> int:
    return budget if asked is None else min(asked, budget)


def sent(value: Any, format: str) -> Any:
    """What a verb returned, as JSON whose traces are in this format.

    Raises:
        BudgetError: they hold more numbers than JSON lists may, or were let go.
    """
    return as_json(value, _packed if format == "safetensors" else None)


def without_traces(value: Any) -> Any:
    """What a verb returned, as JSON: the traces in it were sent before."""
    return as_json(value, lambda trace: None)


def _packed(trace: Trace) -> dict[str, str]:
    """The file that `Trace.save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.safetensors")
        trace.save(path)
        return {"format": "safetensors", "data": base64.b64encode(path.read_bytes()).decode()}
