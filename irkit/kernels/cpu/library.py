"""The library of CPU kernels in C++: whether it can be used here, and jax's way into it.

`IRKIT_KERNELS` in the environment chooses: `cpu` insists on these kernels, `xla` does without them, and unset they
are used where they can be. What was chosen holds for the process.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
from functools import cache
from pathlib import Path

from irkit.errors import BackendError, OptionError

_PATH = Path(__file__).with_name("libirkit_kernels.dylib" if sys.platform == "darwin" else "libirkit_kernels.so")
_ABI_VERSION = 1
"""What `irkit_abi_version` of the library that belongs to this file returns."""
_INSTALL = "reinstall irkit where there is a C++ compiler"
_lock = threading.RLock()
_log = logging.getLogger("irkit")


def load() -> ctypes.CDLL | None:
    """The library, or None where it is not to be used or cannot be: then one warning in a process says why.

    Does not start jax. Whether jax can call its handlers is what `register` finds out.

    Raises:
        BackendError: IRKIT_KERNELS is cpu, and the library cannot be used.
        OptionError: IRKIT_KERNELS is something else than cpu or xla.
    """
    with _lock:
        return _load()[0]


def register() -> bool:
    """Make the library's handlers known to jax, once; False where they cannot be called.

    Starts jax's CPU backend, if nothing has. Raises what `load` does.
    """
    with _lock:
        return not _unusable()


def describe() -> str:
    """Which kernels compute on a CPU: `cpu` and their instruction set, or `xla` and why. Raises what `load` does."""
    with _lock:
        reason = _unusable()
        return f"xla ({reason})" if reason else f"cpu ({instruction_set()})"


def set_threads(threads: int) -> None:
    """How many threads the kernels called from now on use, in the whole process."""
    library = load()
    if library:
        library.irkit_set_threads(threads)


def instruction_set() -> str:
    """What the library's kernels were compiled for: generic, avx2, avx512 or neon; empty without the library.

    It is the best that this machine has, or a lesser one that IRKIT_ISA names.
    """
    library = load()
    if not library:
        return ""
    library.irkit_isa.restype = ctypes.c_char_p
    return library.irkit_isa().decode()


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or why it is not used."""
    chosen = os.environ.get("IRKIT_KERNELS", "")
    if chosen not in ("", "cpu", "xla"):
        raise OptionError(f"IRKIT_KERNELS is {chosen!r}, and can be cpu or xla")
    if chosen == "xla":
        return None, "IRKIT_KERNELS=xla"
    if not _PATH.is_file():
        return None, _do_without("the extension is not installed", _INSTALL)
    try:
        library = ctypes.CDLL(str(_PATH))
        version = library.irkit_abi_version()
    except (OSError, AttributeError) as error:
        return None, _do_without(f"the extension cannot be loaded: {error}", _INSTALL)
    if version != _ABI_VERSION:
        return None, _do_without("the extension is of another version of irkit", _INSTALL)
    return library, ""


@cache
def _unusable() -> str:
    """Why jax cannot call the library's handlers; empty once they are registered."""
    library, reason = _load()
    if not library:
        return reason
    import jax

    library.irkit_handlers.restype = ctypes.c_char_p
    try:
        # XLA itself knows best which versions of its interface it takes. It says so at once when the backend has
        # started; a handler that it refuses when the backend starts later takes the whole backend down.
        jax.devices("cpu")
        for name in library.irkit_handlers().decode().split(","):
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    except Exception as error:
        return _do_without(
            f"jax {jax.__version__} does not take the extension: {str(error).strip().splitlines()[0]}",
            "reinstall irkit beside this jax",
        )
    return ""


def _do_without(reason: str, remedy: str) -> str:
    if os.environ.get("IRKIT_KERNELS") == "cpu":
        raise BackendError(f"IRKIT_KERNELS is cpu, but {reason}; {remedy}")
    _log.warning("computing through XLA, which is slower than irkit's CPU kernels: %s; %s", reason, remedy)
    return reason
