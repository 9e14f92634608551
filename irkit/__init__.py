"""irkit: run, see inside and change local language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from irkit import errors
from irkit.errors import IrkitError

if TYPE_CHECKING:
    from irkit import gguf, tokenizer, view
    from irkit.analysis.comparison import compare
    from irkit.edits import Edit, ablate, call, patch, scale, steer
    from irkit.session import Session
    from irkit.trace import Trace
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
    "view",
]

# Everything is imported when it is first asked for: the command line, which imports this, can hear Ctrl-C at once.
_LAZY = {
    "Session": "irkit.session",
    "Trace": "irkit.trace",
    "compare": "irkit.analysis.comparison",
    "gguf": "irkit.gguf",
    "load_trace": "irkit.tracefile",
    "sampling_distribution": "irkit.transformer.sampling",
    "tokenizer": "irkit.tokenizer",
    "view": "irkit.view",
} | dict.fromkeys(("Edit", "ablate", "call", "patch", "scale", "steer"), "irkit.edits")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module = import_module(_LAZY[name])
        return module if module.__name__ == f"irkit.{name}" else getattr(module, name)
    raise AttributeError(f"module 'irkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
