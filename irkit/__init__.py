"""irkit: run, see inside and change local language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from irkit import errors, gguf, tokenizer
from irkit.edits import Edit, ablate, call, patch, scale, steer
from irkit.errors import IrkitError
from irkit.trace import Trace

if TYPE_CHECKING:
    from irkit.analysis.comparison import compare
    from irkit.session import Session
    from irkit.tracefile import load_trace
    from irkit.transformer.sampling import sampling_distribution

__version__ = "0.1.0.dev0"
__all__ = [
    "Edit",
    "IrkitError",
    "Session",
    "Trace",
    "__version__",
    "ablate",
    "call",
    "compare",
    "errors",
    "gguf",
    "load_trace",
    "patch",
    "sampling_distribution",
    "scale",
    "steer",
    "tokenizer",
]

# What needs jax or pydantic is imported when it is first asked for, so that `import irkit` stays quick.
_LAZY = {
    "Session": "irkit.session",
    "compare": "irkit.analysis.comparison",
    "load_trace": "irkit.tracefile",
    "sampling_distribution": "irkit.transformer.sampling",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'irkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
