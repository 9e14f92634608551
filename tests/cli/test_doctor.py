"""`irkit doctor`: what it says of a machine in order, and of one that is not."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
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


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home in which other programs may have models; anybody may enter it."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "OLLAMA_MODELS", "IRKIT_STORES"):
        monkeypatch.delenv(name, raising=False)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        monkeypatch.setenv("HOME", folder)
        yield Path(folder)


def ollama(folder: Path, name: str, content: bytes, template: str = "") -> dict[str, Path]:
    """Puts a model where Ollama would; the files of its layers."""
    manifest, blobs, layers = folder / "manifests" / name, dict[str, Path](), []
    manifest.parent.mkdir(parents=True, exist_ok=True)
    (folder / "blobs").mkdir(exist_ok=True)
    for kind, data in {"model": content, "template": template.encode()}.items():
        digest = hashlib.sha256(data).hexdigest()
        blobs[kind] = folder / "blobs" / f"sha256-{digest}"
        blobs[kind].write_bytes(data)
        media_type = f"application/vnd.ollama.image.{kind}"
        layers.append({"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)})
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return blobs


def cached(folder: Path, file: Path) -> Path:
    """Puts a model where the Hugging Face cache would; its blob."""
    snapshot, blob = folder / "models--org--repo" / "snapshots" / ("c" * 40), folder / "models--org--repo" / "blob"
    snapshot.mkdir(parents=True)
    shutil.copy(file, blob)
    (snapshot / file.name).symlink_to(blob)
    return blob


def looked_at() -> list[tuple[str, str, str, str]]:
    checks = doctor.examine([doctor._stores])
    return [(each.name, each.status, each.found, each.mend) for each in checks if "/usr/share" not in each.found]


def test_each_programs_folder_is_named_with_what_irkit_can_run(others, tiny_path, monkeypatch):
    studio, cache = others / ".lmstudio/models", others / ".cache/huggingface/hub"
    nothing = [("ollama", others / ".ollama/models"), ("lmstudio", studio), ("hf", cache)]
    assert looked_at() == [(name, "ok", f"there is no folder {folder}", "") for name, folder in nothing]
    ollama(others / "there", "registry.ollama.ai/library/tiny/1b", tiny_path.read_bytes())
    ollama(others / "there", "registry.ollama.ai/me/tiny/latest", tiny_path.read_bytes())
    (studio / "me/other").mkdir(parents=True)
    shutil.copy(tiny_path, studio / "me/other")
    for architecture in ("qwen2", "clip"):  # the second is no model by itself
        writer = gguf.GGUFWriter(studio / f"me/other/{architecture}.gguf", architecture)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    cached(others / "hf/hub", tiny_path)
    monkeypatch.setenv("OLLAMA_MODELS", str(others / "there"))
    monkeypatch.setenv("HF_HOME", str(others / "hf"))
    assert looked_at() == [
        ("ollama", "ok", f"2 that irkit can run, in {others}/there (OLLAMA_MODELS)", ""),
        ("lmstudio", "ok", f"1 that irkit can run, and 1 that it cannot (qwen2), in {studio}", ""),
        ("hf", "ok", f"1 that irkit can run, in {others}/hf/hub (HF_HOME)", ""),
    ]
    monkeypatch.setenv("OLLAMA_MODELS", str(others / "nowhere"))
    name, status, found, mend = looked_at()[0]
    assert (name, status, mend) == ("ollama", "note", "mend or unset OLLAMA_MODELS")
    assert found == f"there is no folder {others}/nowhere (OLLAMA_MODELS)"
    monkeypatch.setenv("IRKIT_STORES", "0")
    assert looked_at() == [("stores", "ok", "the models of other programs are left alone (IRKIT_STORES=0)", "")]


def test_models_of_other_programs_that_cannot_be_read(home, others, tiny_path, monkeypatch):
    folder, content = others / ".ollama/models", tiny_path.read_bytes()
    cut = ollama(folder, "registry.ollama.ai/library/cut/latest", content)["model"]
    gone = ollama(folder, "registry.ollama.ai/me/gone/1b", content + bytes(64))["model"]
    half = ollama(folder, "hf.co/me/half/Q8_0", content + bytes(128), template="half")["template"]
    ollama(folder, "registry.ollama.ai/library/bad/latest", content)
    blob = cached(others / ".cache/huggingface/hub", tiny_path)
    for path in (gone, half, blob):
        path.unlink()
    os.truncate(cut, len(content) - 1000)
    manifest = folder / "manifests/registry.ollama.ai/library/bad/latest"
    manifest.write_text("{")

    told = [(name, found, mend) for name, status, found, mend in looked_at() if status == "broken"]
    assert {(found.partition(": ")[0], mend) for _, found, mend in told} == {
        ("cut:latest", f"delete {cut}, then ollama pull cut:latest"),
        ("me/gone:1b", "ollama pull me/gone:1b"),
        ("hf.co/me/half:Q8_0", "ollama pull hf.co/me/half:Q8_0"),
        ("bad:latest", f"delete {manifest}, then ollama pull bad:latest"),
        ("org/repo tiny.gguf", "hf download org/repo tiny.gguf --force-download"),
    }
    said = dict(found.split(": ", 1) for _, found, _ in told)
    assert said["cut:latest"].startswith(f"{cut}: ")
    assert said["me/gone:1b"] == f"its file {gone} is gone"
    assert said["bad:latest"].startswith(f"its manifest {manifest} is damaged: ")
    assert f"1 that irkit can run, in {folder}" in [found for _, _, found, _ in looked_at()]

    listed = subprocess.run([*IRKIT, "list"], capture_output=True, text=True, timeout=120)
    assert listed.stderr == "irkit: 5 of other programs cannot be read; irkit doctor says why\n"
    run = subprocess.run([*IRKIT, "info", "me/gone:1b"], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == f"irkit: me/gone:1b belongs to another program, and cannot be read: its file {gone} is gone\n"
    code, checks = examined()
    assert (code, {check["status"] for check in checks["ollama"]}) == (1, {"broken", "ok"})


@pytest.fixture
def nobody() -> Iterator[Callable[[], None]]:
    """To be called to be somebody whom permissions bind, for the rest of the test."""
    mine = os.geteuid()
    yield lambda: None if mine else os.seteuid(65534)
    os.seteuid(mine)


def test_models_that_may_not_be_read(others, tiny_path, nobody):
    folder = others / ".ollama/models"
    blob = ollama(folder, "registry.ollama.ai/library/tiny/latest", tiny_path.read_bytes())["model"]
    studio = others / ".lmstudio/models"
    studio.mkdir(parents=True)
    blob.chmod(0)
    studio.chmod(0)
    nobody()
    first, second, third, _ = looked_at()
    assert first == (
        "ollama",
        "broken",
        f"tiny:latest: there is no permission to read {blob}",
        f"chmod -R a+rX {blob}, as its owner",
    )
    assert second == ("ollama", "ok", f"0 that irkit can run, in {folder}", "")
    assert third == ("lmstudio", "note", f"{studio}: Permission denied", f"chmod -R a+rX {studio}, as its owner")


def test_of_many_large_models_only_the_beginning_is_read(others, tiny_path):
    for number in range(40):
        content = tiny_path.read_bytes() + bytes(number)
        os.truncate(ollama(others / ".ollama/models", f"h/n/m{number}/1", content)["model"], 64 << 30)
    began = time.monotonic()
    assert looked_at()[0][2].startswith("40 that irkit can run")
    assert time.monotonic() - began < 60  # to read all of them takes many minutes


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
