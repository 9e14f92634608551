"""`irkit doctor`: what it says of a machine in order, and of one that is not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from irkit import hub
from irkit.cli import doctor

IRKIT = [sys.executable, "-c", "from irkit.cli import main; main()"]


def examined(**variables: str) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """The exit code, and the checks by name."""
    environment = os.environ | {"IRKIT_HOST": "127.0.0.1:1"} | variables
    done = subprocess.run([*IRKIT, "doctor", "--json"], capture_output=True, text=True, timeout=120, env=environment)
    assert done.stderr == ""
    checks: dict[str, list[dict[str, Any]]] = {}
    for check in json.loads(done.stdout):
        checks.setdefault(check["name"], []).append(check)
    return done.returncode, checks


@pytest.fixture
def home(tmp_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry with one model."""
    monkeypatch.setenv("IRKIT_HOME", str(tmp_path / "home"))
    hub.add(shutil.copy(tiny_path, tmp_path / "tiny.gguf"), "tiny")
    return tmp_path / "home"


def test_a_machine_in_order(home):
    code, checks = examined(IRKIT_API_KEY="hidden")
    assert code == 0
    assert {check["status"] for each in checks.values() for check in each} <= {"ok", "note"}
    assert checks["models"][0]["found"].startswith("1, ")
    assert checks["backend"][0]["found"].partition(":")[0] in ("CPU", "CUDA", "METAL", "MPS")
    said = [check["found"] for check in checks["environment"]]
    assert f"IRKIT_HOME={home}" in said
    assert "IRKIT_API_KEY=(set)" in said
    assert "no server answers" in checks["server"][0]["found"]


def test_as_text_what_is_broken_stands_with_its_remedy(home, tmp_path):
    (tmp_path / "tiny.gguf").unlink()
    environment = os.environ | {"IRKIT_HOST": "127.0.0.1:1"}
    done = subprocess.run([*IRKIT, "doctor"], capture_output=True, text=True, timeout=120, env=environment)
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    (at,) = [index for index, line in enumerate(lines) if line.startswith("broken")]
    assert f"tiny: its file {tmp_path / 'tiny.gguf'} is gone" in lines[at]
    assert lines[at + 1].strip() == "-> irkit rm tiny, and pull or add it again"


def broken(look: Any) -> list[str]:
    """What `look` finds broken, asked in this process."""
    return [check.found for check in doctor.examine([look]) if check.status == "broken"]


def test_models_that_changed_or_are_damaged(home, tmp_path):
    file = tmp_path / "tiny.gguf"
    assert broken(doctor._models) == []
    os.truncate(file, 1000)
    assert "has changed since it was added" in broken(doctor._models)[0]
    file.write_bytes(b"no model" * 1000)
    manifest = {"name": "tiny", "path": str(file), "size": 8000, "architecture": "llama", "parameters": 1}
    manifest |= {"quantization": "F32", "sha256": "", "added_at": "2026-11-24T00:00:00Z"}
    (home / "manifests" / "tiny.json").write_text(json.dumps(manifest))
    assert broken(doctor._models)[0].startswith(f"tiny: {file}")
    (home / "manifests" / "bad.json").write_text("{")
    assert any("bad.json is damaged" in found for found in broken(doctor._models))


def test_little_memory_or_disk_and_a_home_that_is_none(home, tmp_path, monkeypatch):
    assert broken(doctor._memory) == broken(doctor._disk) == []
    monkeypatch.setattr(doctor, "_LOW", 1 << 60)
    assert "free of" in broken(doctor._memory)[0]
    assert "free for models in" in broken(doctor._disk)[0]
    (tmp_path / "file").touch()
    monkeypatch.setenv("IRKIT_HOME", str(tmp_path / "file" / "home"))
    assert broken(doctor._disk)[0].startswith(f"{tmp_path / 'file' / 'home'}: ")


def test_what_is_not_installed_is_a_note(monkeypatch):
    find = doctor.importlib.util.find_spec
    missing = ("anywidget", "jupyterlab", "notebook")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    first, second = doctor.examine([doctor._notebook])
    assert (first.status, first.found) == ("note", "not installed: anywidget")
    assert "pip install 'irkit[notebook]'" in first.mend
    assert (second.status, second.mend) == ("note", "pip install jupyterlab")


@pytest.mark.parametrize(
    ("variables", "name", "status", "found"),
    [
        ({"IRKIT_KERNELS": "xla"}, "kernels", "note", "xla (IRKIT_KERNELS=xla)"),
        ({"IRKIT_KERNELS": "fast"}, "kernels", "broken", "IRKIT_KERNELS is 'fast', and can be cpu or xla"),
        ({"JAX_PLATFORMS": "tpu"}, "backend", "broken", "JAX_PLATFORMS is tpu, of which irkit knows none"),
    ],
)
def test_a_variable_that_is_in_the_way(home, variables, name, status, found):
    code, checks = examined(**variables)
    assert code == (status == "broken")
    check = checks[name][0]
    assert (check["status"], check["found"][: len(found)]) == (status, found)


def test_what_cannot_even_be_looked_at_is_broken():
    def _sky():
        raise RuntimeError("clouds")
        yield

    (check,) = doctor.examine([_sky])
    assert (check.name, check.status, check.found) == ("sky", "broken", "RuntimeError: clouds")
