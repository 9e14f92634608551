"""Models that other programs have: found under a name, run where they lie, and never touched."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import irkit
from irkit import hub
from irkit.errors import ModelNotFoundError, OptionError
from irkit.hub import stores


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of nobody's; each program's folder is in it."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "OLLAMA_MODELS", "IRKIT_STORES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    return tmp_path / "me"


def ollama(home: Path, file: Path, name: str, **layers: str | dict[str, Any]) -> Path:
    """Puts `file` where Ollama would, as HOST/NAMESPACE/MODEL/TAG; the manifest."""
    blobs, manifest = home / "blobs", home / "manifests" / name
    blobs.mkdir(parents=True, exist_ok=True)
    manifest.parent.mkdir(parents=True, exist_ok=True)

    def put(kind: str, content: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        (blobs / f"sha256-{digest}").write_bytes(content)
        return {
            "mediaType": f"application/vnd.ollama.image.{kind}",
            "digest": f"sha256:{digest}",
            "size": len(content),
        }

    texts = {kind: text if isinstance(text, str) else json.dumps(text) for kind, text in layers.items()}
    made = [put("model", file.read_bytes()), *(put(kind, text.encode()) for kind, text in texts.items())]
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": made}))
    return manifest


def hugging_face(home: Path, repo: str, *files: Path, commit: str = "c" * 40) -> Path:
    folder = home / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    (folder / "blobs").mkdir(exist_ok=True)
    for file in files:
        blob = folder / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def listed() -> dict[str, str | None]:
    return {model.name: model.source for model in hub.models()}


def contents(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_each_programs_models_are_listed_and_run_in_place(nowhere: Path, tiny_path: Path, tmp_path: Path) -> None:
    own = {"template": "{{ .System }}>{{ .Prompt }}", "system": "he", "params": {"temperature": 0, "num_predict": 3}}
    ollama(nowhere / ".ollama/models", tiny_path, "registry.ollama.ai/library/tiny/1b", **own, license="free")
    ollama(nowhere / ".ollama/models", tiny_path, "registry.ollama.ai/me/tiny/latest")
    other = tmp_path / "Other_Model-Q8.gguf"
    shutil.copy(tiny_path, other)
    studio = nowhere / ".lmstudio/models/Some One/Other-GGUF"
    studio.mkdir(parents=True)
    shutil.copy(other, studio)
    cached = tmp_path / "Cached.gguf"
    shutil.copy(tiny_path, cached)
    hugging_face(nowhere / ".cache/huggingface/hub", "org/repo", cached)
    before = contents(nowhere)

    assert listed() == {"tiny:1b": "ollama", "me/tiny": "ollama", "other_model-q8": "lmstudio", "cached": "hf"}
    assert set(listed()) <= set(hub.names())
    digest = hashlib.sha256(tiny_path.read_bytes()).hexdigest()
    found = {name: hub.find(name) for name in listed()}
    assert [found[name].sha256 for name in ("tiny:1b", "cached")] == [digest] * 2  # pyright: ignore[reportOptionalMemberAccess]
    for name in ("me/tiny", "other_model-q8", "Cached"):
        with irkit.Session(name) as session, irkit.Session(tiny_path) as plain:
            assert session.model.path.is_relative_to(nowhere)
            options: dict[str, Any] = {"temperature": 0, "num_predict": 4}
            assert session.generate("hello", **options).text == plain.generate("hello", **options).text
    with irkit.Session("tiny:1b") as session:
        assert (session.defaults.temperature, session.defaults.num_predict) == (0, 3)
        assert session.template.render([{"role": "user", "content": "hi"}]) == ">hi"
    made = hub.create("mine", "tiny:1b", system="other")
    assert made.path == found["tiny:1b"].path  # pyright: ignore[reportOptionalMemberAccess]
    for name in ("tiny:1b", "cached", "other_model-q8"):
        with pytest.raises(OptionError, match="belongs to another program"):
            hub.remove(name)
    hub.remove("mine")
    assert contents(nowhere) == before


def test_a_registered_model_hides_anothers_of_its_name_and_of_its_file(nowhere: Path, tiny_path: Path) -> None:
    ollama(nowhere / ".ollama/models", tiny_path, "registry.ollama.ai/library/tiny/latest")
    assert listed() == {"tiny": "ollama"}
    hub.add(tiny_path, "tiny")
    assert listed() == {"tiny": None}
    assert hub.resolve("tiny") == tiny_path
    hub.remove("tiny")
    assert listed() == {"tiny": "ollama"}


def test_the_same_name_twice_and_the_newest_of_the_cache(nowhere: Path, tiny_path: Path, tmp_path: Path) -> None:
    cache = nowhere / ".cache/huggingface/hub"
    old, new = tmp_path / "old" / "tiny.gguf", tmp_path / "new" / "tiny.gguf"
    for path, rows in ((old, b""), (new, b"\0" * 64)):
        path.parent.mkdir()
        path.write_bytes(tiny_path.read_bytes() + rows)
    os.utime(hugging_face(cache, "org/repo", old, commit="a" * 40) / "tiny.gguf", (1, 1))
    hugging_face(cache, "org/repo", new, commit="b" * 40)
    ollama(nowhere / ".ollama/models", tiny_path, "registry.ollama.ai/library/tiny/latest")
    assert listed() == {"tiny": "ollama", "tiny:hf": "hf"}
    assert hub.resolve("tiny:hf").stat().st_size == new.stat().st_size


def test_variables_say_where_and_whether(nowhere: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ollama(nowhere / "there", tiny_path, "registry.ollama.ai/library/there/latest")
    hugging_face(nowhere / "cache", "org/repo", tiny_path)
    assert listed() == {}
    monkeypatch.setenv("OLLAMA_MODELS", str(nowhere / "there"))
    monkeypatch.setenv("HF_HUB_CACHE", str(nowhere / "cache"))
    assert listed() == {"there": "ollama", "tiny": "hf"}
    monkeypatch.setenv("IRKIT_STORES", "0")
    assert listed() == {}
    with pytest.raises(ModelNotFoundError):
        hub.resolve("there")


def test_a_split_model_of_the_cache(nowhere: Path, tmp_path: Path, small_model: Callable[..., Path]) -> None:
    parts = [tmp_path / f"Split-0000{n}-of-00002.gguf" for n in (1, 2)]
    for part in parts:
        part.write_bytes(b"GGUF")
    hugging_face(nowhere / ".cache/huggingface/hub", "org/repo", *parts)
    assert list(stores.found()) == ["split"]
    assert listed() == {}, "it is damaged"


@pytest.mark.parametrize("damage", ["manifest", "digest", "blob", "layers", "image", "name", "adapter"])
def test_what_is_damaged_or_no_model_is_passed_over(nowhere: Path, tiny_path: Path, damage: str) -> None:
    folder = nowhere / ".ollama/models"
    ollama(folder, tiny_path, "registry.ollama.ai/library/sound/latest")
    manifest = ollama(folder, tiny_path, "registry.ollama.ai/library/other/latest")
    told = json.loads(manifest.read_text())
    match damage:
        case "manifest":
            manifest.write_bytes(b"\xff{" * 1000)
        case "digest":
            told["layers"][0]["digest"] = "sha256:../../../../etc/passwd"
            manifest.write_text(json.dumps(told))
        case "blob":
            told["layers"][0]["digest"] = f"sha256:{'0' * 64}"
            manifest.write_text(json.dumps(told))
        case "layers":
            manifest.write_text("{}")
        case "image":
            manifest.write_text("[" * 100_000)
        case "name":
            manifest.rename(manifest.with_name("la test\n"))
        case "adapter":
            told["layers"].append(told["layers"][0] | {"mediaType": "application/vnd.ollama.image.adapter"})
            manifest.write_text(json.dumps(told))
    assert listed() | {"other:la-test": ""} == {"sound": "ollama", "other:la-test": ""}
