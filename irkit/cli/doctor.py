"""What `irkit doctor` looks at: everything that irkit needs here, what is wrong with it, and how to mend it."""

import importlib.util
import logging
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil

import irkit
from irkit import hub
from irkit.cli import remote
from irkit.errors import IrkitError, ModelFileError, UnsupportedModelError
from irkit.hub import registry, stores
from irkit.trace import size

_LOW = 1 << 30
"""Bytes of memory and of disk below which even small models will fail."""
_SHOWN = ("IRKIT_", "JAX_", "XLA_", "NPROC", "HF_HOME", "HF_HUB", "HF_ENDPOINT", "CUDA_VISIBLE_DEVICES", "NO_COLOR")
_SECRET = ("KEY", "TOKEN")
_NOTEBOOK = ("ipywidgets", "anywidget", "matplotlib", "pandas")
_FRONTENDS = ("jupyterlab", "notebook")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Literal["ok", "note", "broken"]
    """`note` says that something could be had, or better; irkit works without it."""
    found: str
    mend: str = ""
    """What to do about it."""


_Look = Callable[[], Iterator[Check]]


def examine(looks: Sequence[_Look] = ()) -> Iterator[Check]:
    """Look at one thing after the other, at all if not told at which; what cannot even be looked at is broken."""
    logging.getLogger("irkit").addHandler(logging.NullHandler())  # what it would say is said here
    every = _versions, _environment, _backend, _kernels, _memory, _disk, _models, _stores, _notebook, _server
    for look in looks or every:
        name = look.__name__.removeprefix("_")
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                yield from look()
            for warning in said:
                if issubclass(warning.category, UserWarning):
                    yield Check(name, "broken", str(warning.message))
        except IrkitError as error:
            yield Check(name, "broken", str(error))
        except Exception as error:
            yield Check(name, "broken", f"{type(error).__name__}: {error}")


def _versions() -> Iterator[Check]:
    python = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield Check("versions", "ok", f"irkit {irkit.__version__}, jax {metadata.version('jax')}, {python}")


def _environment() -> Iterator[Check]:
    for name, value in sorted(os.environ.items()):
        if name.startswith(_SHOWN):
            yield Check("environment", "ok", f"{name}={'(set)' if name.endswith(_SECRET) else value}")


def _backend() -> Iterator[Check]:
    import jax
    import numpy as np

    from irkit.engine import backends

    selected = backends.select()
    matrix = np.arange(256, dtype=np.float32).reshape(16, 16) % 7
    product = jax.jit(lambda x: x @ x)(jax.device_put(matrix, selected.device))
    if not np.array_equal(np.asarray(product), matrix @ matrix):
        yield Check("backend", "broken", f"{selected.line}: a product of matrices is wrong", "reinstall jax")
        return
    yield Check("backend", "ok", selected.line.partition(";")[0])
    if selected.name == "cpu" and not any(_version(name) for name in ("jax-cuda12-plugin", "jax-cuda13-plugin")):
        if any(os.path.exists(path) for path in backends._NVIDIA_DEVICES):
            yield Check("backend", "note", "an NVIDIA GPU is here, and not used", "pip install 'irkit[cuda]'")
        elif sys.platform == "darwin" and platform.machine() == "arm64":
            yield Check("backend", "note", "Apple's GPU is here, and not used", "pip install 'irkit[mps]'")


def _kernels() -> Iterator[Check]:
    from irkit.engine import backends
    from irkit.kernels.cpu import library

    if backends.select().name != "cpu":
        return
    found = library.describe()
    if library.register():
        yield Check("kernels", "ok", found)
    elif os.environ.get("IRKIT_KERNELS") == "xla":
        yield Check("kernels", "note", found, "unset IRKIT_KERNELS to compute several times as fast")
    else:
        mend = "install a C++ compiler, then irkit again, to compute several times as fast"
        yield Check("kernels", "broken", found, mend)


def _memory() -> Iterator[Check]:
    memory = psutil.virtual_memory()
    found = f"{size(memory.available)} free of {size(memory.total)}"
    if memory.available < _LOW:
        yield Check("memory", "broken", found, "close other programs")
        return
    yield Check("memory", "ok", found)
    for model in hub.models():
        if model.size > memory.available:
            mend = "close other programs, or take a smaller quantization"
            yield Check("memory", "note", f"{model.name} has {size(model.size)}, more than is free", mend)


def _disk() -> Iterator[Check]:
    home = hub.home()
    there = next(folder for folder in (home, *home.parents) if folder.exists())
    elsewhere = "set IRKIT_HOME to a folder that can be written to"
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"irkit")
    except OSError as error:
        yield Check("disk", "broken", f"{home}: {error.strerror}", elsewhere)
        return
    free = shutil.disk_usage(there).free
    status, mend = ("broken", "delete something, or set IRKIT_HOME") if free < _LOW else ("ok", "")
    yield Check("disk", status, f"{size(free)} free for models in {home}", mend)


def _models() -> Iterator[Check]:
    from irkit import gguf

    models = hub.models()  # which warns of damaged manifests
    for model in models:
        mend = f"irkit rm {model.name}, and pull or add it again"
        if not model.path.is_file():
            yield Check("models", "broken", f"{model.name}: its file {model.path} is gone", mend)
        elif not registry.is_whole(model):
            yield Check("models", "broken", f"{model.name}: {model.path} has changed since it was added", mend)
        else:
            try:
                with gguf.open(model.path):
                    pass
            except IrkitError as error:
                yield Check("models", "broken", f"{model.name}: {error}", mend)
    if models:
        yield Check("models", "ok", f"{len(models)}, {size(sum(model.size for model in models))}")
    else:
        yield Check("models", "note", "there are none yet", "irkit pull smollm2")


def _stores() -> Iterator[Check]:
    folders = stores.folders()
    if not folders:
        yield Check("stores", "ok", "the models of other programs are left alone (IRKIT_STORES=0)")
    seen = set[str]()
    for folder in folders:
        first, where = folder.store not in seen, f"{folder.path} ({folder.variable})".removesuffix(" ()")
        seen.add(folder.store)
        try:
            os.scandir(folder.path).close()
        except FileNotFoundError:
            if folder.variable:
                yield Check(folder.store, "note", f"there is no folder {where}", f"mend or unset {folder.variable}")
            elif first:
                yield Check(folder.store, "ok", f"there is no folder {where}")
        except OSError as error:
            yield Check(folder.store, "note", f"{where}: {error.strerror}", _readable(folder.path))
        else:
            yield from _store(folder, where)


def _store(folder: stores.Folder, where: str) -> Iterator[Check]:
    """What another program has in a folder that is there."""
    run, others = 0, list[str]()
    for found in stores.examine(folder):
        if isinstance(found, stores.Damaged):
            yield Check(folder.store, "broken", f"{found.known_as}: {found.reason}", _mend(folder.store, found))
        elif reason := _refused(found):
            others.append(reason)
        else:
            run += 1
    beside = f", and {len(others)} that it cannot ({', '.join(sorted(set(others)))})" if others else ""
    yield Check(folder.store, "ok", f"{run} that irkit can run{beside}, in {where}")


def _refused(model: hub.Manifest) -> str:
    """What it is of a sound model file that irkit does not run; nothing where it can."""
    from irkit import families, gguf

    with gguf.open(model.path) as file:
        try:
            families.read_config(file)
        except (UnsupportedModelError, ModelFileError):
            return model.architecture
        return " ".join(sorted({tensor.format for tensor in file.tensors.values()} - gguf.QUANTS.keys()))


def _mend(store: str, found: stores.Damaged) -> str:
    if found.cause == "forbidden":
        return _readable(found.path)
    if store == "hf":
        return f"hf download {found.known_as} --force-download"
    again = f"ollama pull {found.known_as}" if store == "ollama" else "download it again in LM Studio"
    return again if found.cause == "gone" else f"delete {found.path}, then {again}"


def _readable(path: Path) -> str:
    return f"chmod -R a+rX {path}, as its owner"


def _notebook() -> Iterator[Check]:
    missing = [name for name in _NOTEBOOK if not importlib.util.find_spec(name)]
    if missing:
        mend = "for widgets, figures and tables in notebooks: pip install 'irkit[notebook]'"
        yield Check("notebook", "note", f"not installed: {', '.join(missing)}", mend)
    else:
        yield Check("notebook", "ok", ", ".join(f"{name} {metadata.version(name)}" for name in _NOTEBOOK))
    if not any(map(importlib.util.find_spec, _FRONTENDS)):
        yield Check("notebook", "note", "Jupyter is not installed beside irkit", "pip install jupyterlab")
    elif "ipywidgets" not in missing and not _version("jupyterlab-widgets"):
        yield Check("notebook", "broken", "JupyterLab cannot show widgets", "pip install jupyterlab-widgets")


def _server() -> Iterator[Check]:
    where = remote.address()
    try:
        names = [model["name"] for model in remote.running()]
    except IrkitError as error:
        yield Check("server", "note", str(error))
    else:
        yield Check("server", "ok", f"{where} holds {', '.join(names) or 'no model'}")


def _version(package: str) -> str | None:
    """The version of a package, if it is installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
