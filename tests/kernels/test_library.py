import _ctypes
import ctypes
import logging
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from irkit import Session
from irkit.errors import BackendError, OptionError
from irkit.kernels.cpu import library


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IRKIT_KERNELS", raising=False)
    for name in ("_load", "_unusable"):
        monkeypatch.setattr(library, name, cache(getattr(library, name).__wrapped__))


def in_new_process(code: str, **variables: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"from irkit.kernels.cpu import library\n{code}"],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_the_library_is_built_and_is_this_versions(caplog: pytest.LogCaptureFixture) -> None:
    found = library.load()
    assert found is not None, "the C++ did not build: pip install -v -e ."
    assert found is library.load()
    assert not caplog.records


def test_without_it_on_request(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("IRKIT_KERNELS", "xla")
    assert library.load() is None
    assert not library.register()
    assert library.instruction_set() == ""
    assert library.describe() == "xla (IRKIT_KERNELS=xla)"
    assert not caplog.records


@pytest.mark.parametrize("value", ["gpu", "CPU", " xla"])
def test_other_choices_are_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("IRKIT_KERNELS", value)
    for use in (library.load, library.register, library.describe):
        with pytest.raises(OptionError, match=f"IRKIT_KERNELS is '{value}', and can be cpu or xla"):
            use()


def missing(folder: Path) -> Path:
    return folder / "libirkit_kernels.so"


def no_library(folder: Path) -> Path:
    path = folder / "libirkit_kernels.so"
    path.write_bytes(b"\0" * 10_000)
    return path


def other_library(folder: Path) -> Path:
    return Path(_ctypes.__file__)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (missing, "the extension is not installed"),
        (no_library, "the extension cannot be loaded"),
        (other_library, "the extension cannot be loaded"),
    ],
)
def test_what_cannot_be_loaded(
    found, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "_PATH", found(tmp_path))
    assert library.load() is None
    assert library.load() is None
    assert not library.register()
    assert library.describe().startswith(f"xla ({reason}")
    (warning,) = caplog.records
    assert (warning.name, warning.levelno) == ("irkit", logging.WARNING)
    assert reason in warning.getMessage()
    assert "C++ compiler" in warning.getMessage()


def test_insisting_on_what_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRKIT_KERNELS", "cpu")
    assert library.load() is not None
    monkeypatch.setattr(library, "_load", cache(library._load.__wrapped__))
    monkeypatch.setattr(library, "_PATH", missing(tmp_path))
    for use in (library.load, library.register, library.describe):
        with pytest.raises(BackendError, match="IRKIT_KERNELS is cpu, but the extension is not installed"):
            use()


def test_a_library_of_another_version(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(library, "_ABI_VERSION", 0)
    assert library.load() is None
    assert library.describe() == "xla (the extension is of another version of irkit)"
    assert len(caplog.records) == 1


def test_handlers_are_registered_once() -> None:
    code = """
import jax, threading
registered, register = [], jax.ffi.register_ffi_target
def counting(name, *args, **options):
    registered.append(name)
    register(name, *args, **options)
jax.ffi.register_ffi_target = counting
threads = [threading.Thread(target=library.register) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(library.register(), len(registered), len(set(registered)), library.describe().split()[0])
"""
    usable, calls, handlers, kernels = in_new_process(code, IRKIT_KERNELS="cpu")
    assert (usable, kernels) == ("True", "cpu")
    assert calls == handlers != "0"


def test_a_jax_that_refuses_them_computes_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = ctypes.POINTER(ctypes.c_size_t)

    @ctypes.CFUNCTYPE(ctypes.c_void_p, words)
    def of_a_later_interface(frame) -> None:
        # XLA asks a handler for its version: call frame -> extension -> metadata -> major and minor version.
        extension = ctypes.cast(frame[1], words)
        version = ctypes.cast(extension[3] + 3 * 8, ctypes.POINTER(ctypes.c_int))
        version[0], version[1] = 99, 0

    def names() -> bytes:
        return b"irkit_later,irkit_never"

    fake = SimpleNamespace(irkit_handlers=names, irkit_later=of_a_later_interface)
    monkeypatch.setattr(library, "_load", lambda: (fake, ""))
    assert not library.register()
    assert "(99.0)" in library.describe()
    assert len(caplog.records) == 1
    assert jnp.arange(3).sum() == 3
    monkeypatch.setenv("IRKIT_KERNELS", "cpu")
    monkeypatch.setattr(library, "_unusable", cache(library._unusable.__wrapped__))
    with pytest.raises(BackendError, match=f"jax {jax.__version__} does not take the extension"):
        library.register()


def test_instruction_sets() -> None:
    show = "print(library.instruction_set())"
    (best,) = in_new_process(show)
    assert in_new_process(show, IRKIT_ISA="generic") == ["generic"]
    assert in_new_process(show, IRKIT_ISA="mmx") == [best]
    assert in_new_process(show, IRKIT_ISA=best) == [best]
    if sys.platform == "linux" and platform.machine() == "x86_64":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = set(next(line for line in lines if line.startswith("flags")).split())
        avx2 = {"avx2", "fma", "f16c"}
        avx512 = avx2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512vbmi"}
        assert best == ("avx512" if avx512 <= flags else "avx2" if avx2 <= flags else "generic")
        assert in_new_process(show, IRKIT_ISA="avx2") == ["avx2" if avx2 <= flags else best]
        assert in_new_process(show, IRKIT_ISA="neon") == [best]


def test_info_says_which_kernels_compute(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRKIT_KERNELS", "xla")
    assert Session(str(model_path), backend="cpu").info().kernels == "xla (IRKIT_KERNELS=xla)"
    assert Session(str(model_path), backend="cpu", precision="exact").info().kernels == "xla (IRKIT_KERNELS=xla)"
