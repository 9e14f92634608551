"""Where to compute: the accelerator that works here, or the CPU, and with how many threads.

That `jax.devices()` names an accelerator proves nothing. Apple's plugins abort the whole process over
versions or operations they do not know, which cannot be caught: so an accelerator is tried in a process of
its own first, and a plugin that failed there is kept out of this one. Where no accelerator's plugin is
installed, none of this happens.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from irkit import hub
from irkit.errors import BackendError

if TYPE_CHECKING:
    import jax
    from jaxlib._jax import Device  # jax.Device, which type checkers take for a variable

    from irkit.options import Backend

SMOKE_TEST_SECONDS = 120.0
"""How long an accelerator may take over its smoke test; the first use of a driver can be slow."""


@dataclass(frozen=True)
class Selected:
    """A backend that has been started and works."""

    device: Device
    name: Backend
    threads: int
    """How many CPU threads to compute with."""
    line: str
    """Backend, device or threads, jax's version, and what was not used and why: one line to show."""


@dataclass(frozen=True)
class _Accelerator:
    name: Backend
    platform: str
    """jax's name for it, as in JAX_PLATFORMS."""
    packages: tuple[str, ...]
    """The distributions any of which brings its plugin."""
    modules: tuple[str, ...]
    """The plugins themselves, which jax imports when it starts."""
    needs: str
    install: str
    """The command that installs versions that go together."""


_ACCELERATORS = (
    _Accelerator(
        "metal",
        "METAL",
        ("jax-metal",),
        ("jax_plugins.metal_plugin",),
        "a Mac with Apple silicon",
        "pip install jax-metal==0.1.1 jax==0.5.0 jaxlib==0.5.0",
    ),
    _Accelerator(
        "mps",
        "mps",
        ("jax-mps",),
        ("jax_plugins.mps",),
        "macOS 14 or later on Apple silicon",
        "pip install --upgrade 'jax-mps>=0.10.11,<0.12'",
    ),
    _Accelerator(
        "cuda",
        "cuda",
        ("jax-cuda12-plugin", "jax-cuda13-plugin"),
        ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"),
        "Linux with an NVIDIA GPU",
        "pip install --upgrade 'jax[cuda12]'",
    ),
)
# From jaxlib 0.5.1 on nearly every operation of jax-metal 0.1.1, the last there is, fails; its metadata sets
# no upper bound, so pip installs pairs that cannot work.
_NEWEST_JAXLIB_FOR_METAL = "0.5.0"
# One of them is there where a GPU can be used: plain Linux, a container, WSL 2.
_NVIDIA_DEVICES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")


_selecting = threading.Lock()


def select(backend: Backend | None = None, threads: int | None = None) -> Selected:
    """Choose where to compute, and start jax there.

    Without `backend` that is the first accelerator that is installed and passes its smoke test, and else the
    CPU, with one warning if an accelerator failed. Where JAX_PLATFORMS is set, only what it lists is used,
    in its order. jax starts once in a process, with what was chosen then; later calls choose among that.

    Args:
        backend: Use this one, or none.
        threads: CPU threads; by default NPROC of the environment, or else `physical_cores()`.

    Raises:
        BackendError: `backend` cannot be used, or nothing of what JAX_PLATFORMS lists can.
    """
    with _selecting:
        return _select(backend, threads)


@cache
def _select(backend: Backend | None, threads: int | None) -> Selected:
    import jax
    from jax._src import xla_bridge  # jax has no public way to ask whether it has started

    started = list(xla_bridge.backends()) if xla_bridge.backends_are_initialized() else []
    threads = _set_threads(threads, bool(started))
    platforms: str | None = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    listed = [{"gpu": "cuda"}.get(each, each) for each in (platforms or "").split(",") if each]
    problems: list[str] = []
    names: list[Backend] = [backend] if backend else _candidates(listed, started)
    for name in names:
        try:
            device = _device(name, listed, started, retry=bool(backend))
        except BackendError as error:
            if backend:
                raise
            problems.append(str(error))
        else:
            if problems:
                warnings.warn(f"{'; '.join(problems)}; computing on {name} instead", stacklevel=2)
            of = f"{threads} thread{'s' * (threads > 1)}" if name == "cpu" else device.device_kind
            line = "; ".join([f"{name.upper()}: {of}, jax {jax.__version__}", *problems])
            return Selected(device, name, threads, line)
    known = ", ".join([*(a.platform for a in _ACCELERATORS), "cpu"])
    raise BackendError("; ".join(problems) or f"JAX_PLATFORMS is {platforms}, of which irkit knows none: {known}")


def _candidates(listed: list[str], started: list[str]) -> list[Backend]:
    """What may be used, best first: the accelerators that are here, as far as `listed`, and the CPU."""
    present: dict[str, Backend] = {a.platform: a.name for a in _ACCELERATORS if not _missing(a)}
    present["cpu"] = "cpu"
    return [present[p] for p in listed or present if p in present and (not started or p in started)]


def _missing(accelerator: _Accelerator) -> str | None:
    """What an accelerator that is not here lacks."""
    if not _installed(accelerator):
        return f"{accelerator.packages[0]} is not installed; {accelerator.install!r} installs it"
    if accelerator.name == "cuda" and not any(os.path.exists(path) for path in _NVIDIA_DEVICES):
        return "no NVIDIA GPU is visible on this machine"
    return None


def _installed(accelerator: _Accelerator) -> str | None:
    """Package and version of the accelerator's plugin."""
    for package in accelerator.packages:
        try:
            return f"{package} {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            continue
    return None


def _device(name: Backend, listed: list[str], started: list[str], *, retry: bool) -> Device:
    """The first device of the backend, jax having been started with it; `retry` a smoke test that failed."""
    import jax

    accelerator = next((a for a in _ACCELERATORS if a.name == name), None)
    wanted = accelerator.platform if accelerator else "cpu"
    failed = f"backend {name} cannot be used: "
    if started and wanted not in started:
        raise BackendError(
            f"{failed}jax has started with {', '.join(started)} only; restart Python and ask for it first"
        )
    if listed and wanted not in listed:
        raise BackendError(f"{failed}JAX_PLATFORMS is {','.join(listed)}, without {wanted}")
    if accelerator and (problem := _missing(accelerator) or _broken(accelerator, retry)):
        raise BackendError(failed + problem)
    if not started and any(_installed(a) for a in _ACCELERATORS):
        # What is listed before this one has failed. The CPU is always started: what an accelerator is bad at
        # is computed there.
        usable = [*(listed[listed.index(wanted) :] if listed else [wanted]), "cpu"]
        _keep_out(a for a in _ACCELERATORS if a.platform not in usable)
        jax.config.update("jax_platforms", ",".join(dict.fromkeys(usable)))
    if name == "cuda":
        # By default jax takes three quarters of the GPU's memory, and a second notebook finds none.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        return jax.local_devices(backend=wanted)[0]
    except RuntimeError as error:
        raise BackendError(f"{failed}{_shorten(str(error))}") from None


def _keep_out(accelerators: Iterable[_Accelerator]) -> None:
    """Have jax find empty plugins in place of these: it imports whatever there is, listed or not."""
    for module in (module for accelerator in accelerators for module in accelerator.modules):
        empty = types.ModuleType(module, "Keeps jax from loading a plugin that is not used.")
        empty.__dict__["initialize"] = lambda: None
        sys.modules.setdefault(module, empty)


def _broken(accelerator: _Accelerator, retry: bool) -> str | None:
    """Why an accelerator that is here does not work, and what may help; None if it does."""
    jaxlib = metadata.version("jaxlib")
    if accelerator.name == "metal" and _numbers(jaxlib) > _numbers(_NEWEST_JAXLIB_FOR_METAL):
        return (
            f"jax-metal works with jaxlib up to {_NEWEST_JAXLIB_FOR_METAL}, and {jaxlib} is installed; "
            f"{accelerator.install!r} installs what goes together"
        )
    verdict = _verdict_path(accelerator)
    try:
        reason = verdict.read_text()
    except OSError:
        reason = None
    if reason is None or (reason and retry):
        reason = _run_smoke_test(accelerator)
        _remember(verdict, reason)
    if not reason:
        return None
    needs, install = accelerator.needs, accelerator.install
    return f"its smoke test failed ({reason}); it needs {needs}, and {install!r} may help"


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def _verdict_path(accelerator: _Accelerator) -> Path:
    """Where the outcome of a smoke test is kept, under everything that it is known to depend on."""
    variables = ("CUDA_VISIBLE_DEVICES", "XLA_FLAGS", "ENABLE_PJRT_COMPATIBILITY", "JAX_MPS_LIBRARY_PATH")
    depends = (
        _installed(accelerator),
        metadata.version("jax"),
        metadata.version("jaxlib"),
        sys.version,
        platform.node(),
        platform.release(),
        [os.environ.get(variable) for variable in variables],
    )
    return hub.home() / "backends" / f"{accelerator.name}-{hashlib.sha256(repr(depends).encode()).hexdigest()[:16]}"


def _remember(path: Path, reason: str) -> None:
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(reason)
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)  # it is tested again next time: only time is lost


def _run_smoke_test(accelerator: _Accelerator) -> str:
    """What went wrong in the accelerator's smoke test, run in a process of its own; empty if nothing did."""
    code = f"from irkit.engine.backends import smoke_test; smoke_test({accelerator.name!r})"
    environment = os.environ | {
        "JAX_PLATFORMS": f"{accelerator.platform},cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SMOKE_TEST_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"no result within {SMOKE_TEST_SECONDS:g} seconds"
    except OSError as error:
        return f"it could not be started: {error.strerror}"
    if done.returncode == 0:
        return ""
    if done.returncode < 0:
        return f"it was ended by {signal.Signals(-done.returncode).name}"
    return _shorten(done.stderr) or f"exit code {done.returncode}"


def _shorten(message: str) -> str:
    """The last line, where Python puts the exception, in at most 200 characters."""
    return message.strip().rpartition("\n")[2].strip()[:200]


def smoke_test(name: str) -> None:
    """Compare operations that every forward pass needs with numpy's results, in a process of its own.

    Exits with a message if they differ; may abort.
    """
    accelerator = next(a for a in _ACCELERATORS if a.name == name)
    _keep_out(a for a in _ACCELERATORS if a is not accelerator)

    import jax
    import jax.numpy as jnp
    import numpy as np

    device = jax.devices(accelerator.platform)[0]

    @jax.jit
    def compute(table: jax.Array, ids: jax.Array, matrix: jax.Array, kept: jax.Array, start: jax.Array) -> dict:
        rows = jnp.take(table, ids, axis=0, mode="clip")
        product = jnp.einsum("ti,oi->to", rows, matrix, preferred_element_type=jnp.float32)
        written = jax.lax.dynamic_update_slice(kept, product, (start, 0))
        weights = jnp.exp(written - jnp.max(written, axis=-1, keepdims=True))
        softmax = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return {"gather": rows, "dot": product, "dynamic_update_slice": written, "softmax": softmax}

    random = np.random.default_rng(0)
    ids = np.array([3, 31, 0, 7], np.int32)
    for dtype in (np.float32, np.float16):
        table, matrix = (random.normal(size=(32, 64)).astype(dtype) for _ in range(2))
        kept = random.normal(size=(8, 32)).astype(np.float32)
        found = compute(*(jax.device_put(value, device) for value in (table, ids, matrix, kept, np.int32(2))))
        rows = table[ids].astype(np.float32)
        written = kept.copy()
        written[2:6] = rows @ matrix.astype(np.float32).T
        weights = np.exp(written - written.max(axis=-1, keepdims=True))
        softmax = weights / weights.sum(axis=-1, keepdims=True)
        expected = {"gather": rows, "dot": written[2:6], "dynamic_update_slice": written, "softmax": softmax}
        for operation, values in expected.items():
            # Wide enough for TensorFloat-32 and float16 products; what it is after is garbage.
            if not np.allclose(np.asarray(found[operation], np.float32), values, rtol=0.02, atol=0.05):
                sys.exit(f"wrong values from {operation} in {np.dtype(dtype).name}")


def _set_threads(asked: int | None, started: bool) -> int:
    """Have XLA's thread pool made with this many threads: it reads NPROC when the CPU backend starts."""
    given = os.environ.get("NPROC", "")
    pool = int(given) if given.isdecimal() and int(given) > 0 else None
    threads = asked or pool or physical_cores()
    if not started:
        os.environ["NPROC"] = str(threads)
    elif asked and asked != (pool := pool or len(_usable_cpus())):
        warnings.warn(
            f"jax has already started with {pool} CPU threads, and XLA keeps that number; "
            f"for {asked}, restart Python and open the session before jax is used",
            stacklevel=3,
        )
    return threads


def physical_cores(sys_folder: Path = Path("/sys")) -> int:
    """The cores this process may use; of a core's hyperthreads one counts, and on a Mac only the fast cores.

    Matrix products keep a core's arithmetic units busy from one thread. The affinity mask and a container's
    CPU quota are respected. `sys_folder` is where Linux describes them.
    """
    if sys.platform == "darwin":
        asked = ("hw.perflevel0.physicalcpu", "hw.physicalcpu")  # Intel Macs know only the second
        answer = subprocess.run(["sysctl", "-n", *asked], capture_output=True, text=True, check=False).stdout.split()
        return int(answer[0]) if answer else os.cpu_count() or 1
    cores = set()
    for cpu in _usable_cpus():
        siblings = sys_folder / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        cores.add(siblings.read_text() if siblings.is_file() else cpu)
    quota = sys_folder / "fs/cgroup/cpu.max"
    limit, _, period = quota.read_text().partition(" ") if quota.is_file() else ("max", "", "")
    return len(cores) if limit == "max" else max(1, min(len(cores), int(limit) // int(period)))


def _usable_cpus() -> Collection[int]:
    if sys.platform == "linux":
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)
