"""Compiled programs: each compiled once, kept on disk, and loaded from there without tracing it again.

jax's own compilation cache still traces and lowers a program before it finds it; for 30 unrolled layers
that takes longer than everything else on the way to a first token. So whole executables are kept, keyed
on all that they depend on.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import pickle
import platform
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jaxlib.version
from jax.experimental import serialize_executable

from irkit import hub

if TYPE_CHECKING:
    from irkit.engine.sharding import Layout

Program: TypeAlias = Callable[..., Any]
Device: TypeAlias = Any
"""`jax.Device`, which type checkers take for a variable."""
# The library that XLA would multiply matrices with repacks all weights at a program's first call: 0.7 s for
# the default model, on the way to its first token, to save 0.06 s for each 32 tokens of prompt.
_COMPILER_OPTIONS: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": ""}
MOST_KEPT = 200
"""Programs on disk, about 2 MB each; those not used for longest go first, as versions and models come and go."""
_log = logging.getLogger("irkit")


def load_or_compile(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    *,
    device: Device,
    donate: int | None = None,
    keep: bool = True,
    repack: bool = False,
    layout: Layout | None = None,
    **static: Any,
) -> Program:
    """`partial(function, **static)`, compiled for `device` and arguments of these shapes.

    Args:
        function: A pure function of arrays, defined in irkit.
        arguments: Pytrees of arrays or of `jax.ShapeDtypeStruct`.
        device: Where it runs.
        donate: The index of the argument whose buffers the result takes over.
        keep: Whether to keep it on disk; not where `static` holds what only this process knows.
        repack: Whether XLA may lay out all weights anew at the first call, for faster ones later; on the CPU.
        layout: How the arguments lie on several devices, of which `device` is one.
        static: Keyword arguments fixed when compiling; their repr must tell them apart.
    """
    leaves, tree = jax.tree.flatten(arguments)
    shapes = [(leaf.shape, str(leaf.dtype)) for leaf in leaves]
    what = repr((function.__module__, function.__qualname__, static, donate, tree, shapes, repack, layout))
    path = hub.home() / "programs" / hashlib.sha256((_surroundings(device) + what).encode()).hexdigest()
    run: Callable[..., Any] = partial(function, **static)
    if layout:
        run, arguments = layout.results(run), layout.arguments(arguments)
    if not keep:
        return _compiled(run, arguments, device, donate, repack)
    devices = list(layout.mesh.devices.flat) if layout else [device]
    return _load(path, devices) or _compile(path, run, arguments, device, donate, repack)


def _compile(
    path: Path,
    run: Callable[..., Any],
    arguments: Sequence[Any],
    device: Device,
    donate: int | None,
    repack: bool,
) -> Program:
    program = _compiled(run, arguments, device, donate, repack)
    try:
        _write(path, pickle.dumps(serialize_executable.serialize(program)))
    except Exception as error:  # a backend that cannot serialize, a full disk: only speed is lost
        _log.debug("program not kept on disk: %s", error)
    return program


def _compiled(
    run: Callable[..., Any], arguments: Sequence[Any], device: Device, donate: int | None, repack: bool
) -> Any:
    # jax-metal and jax-mps do not implement donation, and say so at every call.
    donated = () if donate is None or device.platform not in ("cpu", "gpu", "cuda") else (donate,)
    with jax.default_device(device):
        lowered = jax.jit(run, donate_argnums=donated).lower(*arguments)
    try:
        return lowered.compile(_COMPILER_OPTIONS if device.platform == "cpu" and not repack else None)
    except jax.errors.JaxRuntimeError:  # an older jax, which does not know the option
        return lowered.compile()


def _load(path: Path, devices: Sequence[Device]) -> Program | None:
    try:
        kept = path.read_bytes()
        os.utime(path)  # it was used now
    except OSError:
        return None
    try:
        load = serialize_executable.deserialize_and_load
        # By default a program is loaded for all devices of the backend; jax 0.5.0 takes it from the program.
        chosen = {"execution_devices": devices} if "execution_devices" in inspect.signature(load).parameters else {}
        return load(*pickle.loads(kept), backend=devices[0].client, **chosen)
    except Exception as error:  # written by another build of the backend, or damaged: compile it again
        _log.debug("kept program not usable: %s", error)
        return None


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        unfinished.write_bytes(data)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    for old in sorted(path.parent.iterdir(), key=_used)[:-MOST_KEPT]:
        old.unlink(missing_ok=True)


def _used(kept: Path) -> int:
    try:
        return kept.stat().st_mtime_ns
    except OSError:  # another process has deleted it meanwhile
        return 0


@cache
def _surroundings(device: Device) -> str:
    """Everything outside a program's own definition that its machine code depends on."""
    package = Path(__file__).parent.parent
    # What is traced, and the kernels that it calls, which also say how much room they need.
    traced = ("engine/steps.py", "transformer/*.py", "kernels/**/*.py", "kernels/cpu/libirkit_kernels.*")
    sources = sorted(path for pattern in traced for path in package.glob(pattern))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    chosen = [os.environ.get(name) for name in ("NPROC", "XLA_FLAGS", "IRKIT_KERNELS", "IRKIT_ISA")]
    hardware = (platform.system(), platform.machine(), _cpu_features(), device.platform, device.device_kind)
    versions = (jax.__version__, jaxlib.version.__version__, device.client.platform_version)
    return repr((code, versions, hardware, chosen))


def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()
