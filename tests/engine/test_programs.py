"""Compiled programs: kept on disk, loaded from there, and made anew where that fails."""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irkit.engine import programs

TRACED: list[int] = []


def scaled(x: jax.Array, *, by: float) -> jax.Array:
    TRACED.append(1)
    return x * by + jnp.sum(x)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IRKIT_HOME", str(tmp_path))
    TRACED.clear()
    return tmp_path / "programs"


def get(by: float = 2.0, size: int = 3, **options: Any) -> list[float]:
    x = np.arange(size, dtype=np.float32)
    program = programs.load_or_compile(scaled, (x,), device=jax.devices("cpu")[0], by=by, **options)
    return np.asarray(program(x)).tolist()


def test_a_program_is_traced_once_and_then_loaded(folder: Path) -> None:
    assert get() == [3.0, 5.0, 7.0]
    assert get() == [3.0, 5.0, 7.0]
    assert len(TRACED) == 1
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    ("variable", "value"),
    [("XLA_FLAGS", "--xla_cpu_enable_fast_math=false"), ("IRKIT_KERNELS", "xla"), ("IRKIT_ISA", "generic")],
)
def test_what_differs_is_another_program(
    folder: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    assert get(by=2.0) != get(by=3.0)
    assert len(get(size=4)) == 4
    monkeypatch.setenv(variable, value)
    programs._surroundings.cache_clear()
    try:
        get()
    finally:
        programs._surroundings.cache_clear()
    assert len(TRACED) == len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("damage", [b"", b"not a pickle", None])
def test_a_damaged_file_is_compiled_again(folder: Path, damage: bytes | None) -> None:
    get()
    (kept,) = folder.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert get() == [3.0, 5.0, 7.0]
    assert len(TRACED) == 2
    assert get() == [3.0, 5.0, 7.0]
    assert len(TRACED) == 2  # it was written anew


def test_without_a_place_to_keep_them_programs_still_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("a file where the folder should be")
    with caplog.at_level(logging.DEBUG, "irkit"):
        assert get() == [3.0, 5.0, 7.0]
    assert "not kept" in caplog.text


def test_a_full_disk_leaves_nothing_half_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert get() == [3.0, 5.0, 7.0]
    assert list(folder.iterdir()) == []


def test_only_the_programs_used_last_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "MOST_KEPT", 3)
    folder.mkdir()
    (folder / "gone").symlink_to(folder / "nowhere")  # listed, but not there any more
    for by in (1.0, 2.0, 3.0, 1.0, 4.0):
        get(by=by)
    assert len(list(folder.iterdir())) == 3
    assert not (folder / "gone").is_symlink()
    TRACED.clear()
    get(by=1.0)
    assert not TRACED  # used lately, so it stayed
    get(by=2.0)
    assert TRACED
