"""The server asked for models under every name that clients of Ollama have for them."""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

import irkit
from irkit import hub


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What a registry of Ollama's kind and a Hugging Face hub serve; nothing else is on this machine."""
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "IRKIT_STORES"):
            monkeypatch.delenv(name, raising=False)
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("irkit.hub.ollama.HOST", address)
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HOME", str(tmp_path / "me"))
        monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
        monkeypatch.setenv("IRKIT_HOME", str(tmp_path / "irkit"))
        yield folder
        server.shutdown()


def put(manifest: Path, blobs: str, file: Path) -> None:
    """A model as Ollama keeps it: a manifest, and a file whose path begins as `blobs`."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    blob = Path(blobs + digest)
    for path in (manifest, blob):
        path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, blob)
    layer = {"mediaType": "application/vnd.ollama.image.model", "size": file.stat().st_size}
    manifest.write_text(json.dumps({"layers": [layer | {"digest": f"sha256:{digest}"}]}))


PLACED = (
    *("registry.ollama.ai/library/plain/1b", "registry.ollama.ai/me/placed/latest", "example.com/me/placed/latest"),
    *("hf.co/Someone/Tiny-GGUF/Q4_K_M", "hf.co/someone/other/latest"),
)
CACHED = (
    ".cache/huggingface/hub/models--Org--Cached/snapshots/1/Cached-Q8_0.gguf",
    ".lmstudio/models/maker/lm/L-F32.gguf",
)


@pytest.fixture
def everywhere(files: Path, tmp_path: Path, tiny_path: Path) -> None:
    """Models of every origin: fetched from either place, given a name, and of other programs."""
    for name in PLACED:
        put(tmp_path / "ollama/manifests" / name, f"{tmp_path}/ollama/blobs/sha256-", tiny_path)
    for kept in (*(tmp_path / "me" / path for path in CACHED), files / "org/repo/resolve/main/Small-Q4_0.gguf"):
        kept.parent.mkdir(parents=True)
        shutil.copy(tiny_path, kept)
    for name in ("someone/Fetched", "library/fetched"):
        put(files / f"v2/{name}/manifests/1b-Q4", f"{files}/v2/{name}/blobs/sha256:", tiny_path)
        hub.pull(f"{name}:1b-Q4", allow_private=True)
    hub.pull("hf.co/org/repo/Small-Q4_0.gguf")
    hub.create("me/own", "small-q4_0", system="Hm.")


NAMES = {
    "plain:1b": ["Plain:1B", "library/plain:1b", "registry.ollama.ai/library/plain:1b", "ollama.com/plain:1b"],
    "me/placed": [
        "me/placed:latest",
        "Me/Placed",
        "registry.ollama.ai/me/placed",
        "https://ollama.com/me/placed:latest",
    ],
    "me/placed:ollama": ["example.com/me/placed", "example.com/me/placed:latest"],
    "someone/tiny-gguf:q4_k_m": [
        *("hf.co/Someone/Tiny-GGUF:Q4_K_M", "hf.co/someone/tiny-gguf:q4_k_m", "huggingface.co/Someone/Tiny-GGUF"),
        *("hf.co/Someone/Tiny-GGUF:latest",),
    ],
    "someone/other": ["hf.co/someone/other", "hf.co/someone/other:latest"],
    "someone/fetched:1b-q4": ["someone/Fetched:1b-Q4", "registry.ollama.ai/someone/fetched:1b-q4"],
    "fetched:1b-q4": ["library/fetched:1b-q4", "registry.ollama.ai/library/fetched:1b-q4"],
    "small-q4_0": [
        *("hf.co/org/repo:Q4_0", "hf.co/Org/Repo:q4_0", "huggingface.co/org/repo", "hf.co/org/repo:latest"),
        *("hf.co/org/repo/Small-Q4_0.gguf", "hf.co/org/repo:Small-Q4_0.gguf", "small-q4_0:latest"),
    ],
    "cached-q8_0": ["hf.co/Org/Cached:Q8_0", "hf.co/org/cached", "Cached-Q8_0"],
    "l-f32": ["hf.co/maker/lm:f32"],
    "me/own": ["me/own:latest", "ollama.com/me/own"],
}


def running(client: httpx.Client) -> list[str]:
    return sorted(model["name"] for model in client.get("/api/ps").json()["models"])


@pytest.mark.usefixtures("everywhere")
def test_every_name_of_a_model_means_it(client: httpx.Client) -> None:
    assert {model["name"] for model in client.get("/api/tags").json()["models"]} == NAMES.keys()
    before = running(client)
    for name, others in NAMES.items():
        assert hub.find(name) is not None
        for asked in (name, *others):
            load = {"model": asked, "keep_alive": "1h", "stream": False}
            assert client.post("/api/generate", json=load).json()["done_reason"] == "load", asked
            assert running(client) == sorted([*before, name]), "one model, however it is called"
            shown = client.post("/api/show", json={"model": asked}).json()
            assert shown["modelfile"].startswith(f"FROM {name}\n")
            assert client.get(f"/v1/models/{asked}").json()["id"] == name
            assert hub.resolve(asked) == hub.resolve(name)
        answer = client.post("/v1/completions", json={"model": others[-1], "prompt": "hi", "max_tokens": 1})
        assert answer.json()["usage"]["completion_tokens"] == 1
        assert client.post("/api/generate", json={"model": others[0], "keep_alive": 0}).status_code == 200
        assert running(client) == before


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(
    ("name", "near"),
    [
        *(("nobody/nothing:7b", ""), ("hf.co/nobody/nothing:F16", ""), ("example.com/nobody/nothing", "")),
        *(("hf.co/org/repo:Q8_0", "small-q4_0"), ("hf.co/org/repo/x.gguf", "small-q4_0"), ("me/owned", "me/own")),
        *(("me-placed", "me/placed"), ("example.com/me/own", "me/own"), ("fetched", "fetched:1b-q4")),
        *(("hf.co/org/repo:Q4", "small-q4_0"), ("registry.ollama.ai/library/plain", "plain:1b")),
    ],
)
def test_what_is_not_there_is_not_found(client: httpx.Client, name: str, near: str) -> None:
    for path in ("/api/generate", "/api/show", "/api/delete", "/v1/completions"):
        method = "DELETE" if path == "/api/delete" else "POST"
        reply = client.request(method, path, json={"model": name, "prompt": "hi"})
        error = reply.json()["error"]
        said = error if isinstance(error, str) else error["message"]
        assert (reply.status_code, said.partition(";")[0]) == (404, f"model '{name}' not found")
        assert near in said.partition(";")[2]
        assert bool(near) == (";" in said)


@pytest.mark.parametrize("name", ["a/b/c", "../a", "/etc/passwd", "a//b", "a:b:c", "hf.co/a", "a/../b", "é", "a.gguf"])
def test_what_cannot_be_a_name_is_a_mistake(client: httpx.Client, name: str) -> None:
    for path in ("/api/generate", "/api/show", "/v1/completions"):
        reply = client.post(path, json={"model": name, "prompt": "hi"})
        assert reply.status_code == 400
        assert "cannot be a model's name" in reply.text


@pytest.mark.usefixtures("everywhere")
def test_names_with_a_namespace_are_made_and_removed(client: httpx.Client) -> None:
    hub.copy("small-q4_0", "me-x")
    source = {"source": "hf.co/org/repo:Q4_0", "destination": "Me/X:latest"}
    assert client.post("/api/copy", json=source).status_code == 200
    made = {"model": "library/me", "from": "registry.ollama.ai/me/placed", "system": "Other.", "stream": False}
    assert client.post("/api/create", json=made).json() == {"status": "success"}
    names = {model.name: model.system for model in hub.models()}
    assert {name: names.get(name) for name in ("me-x", "me/x", "me")} == {"me-x": None, "me/x": None, "me": "Other."}
    path = hub.resolve("small-q4_0")
    for name, left in [("me/x:latest", 200), ("hf.co/org/repo:Q4_0", 200), ("hf.co/org/repo:Q4_0", 404), ("me/x", 404)]:
        assert client.request("DELETE", "/api/delete", json={"model": name}).status_code == left
    assert {"me-x", "me/own"} <= {model.name for model in hub.models()}
    assert path.is_file(), "two copies have it"
    refused = client.request("DELETE", "/api/delete", json={"model": "registry.ollama.ai/library/plain:1b"})
    assert refused.status_code == 400
    assert "belongs to another program" in refused.json()["error"]


@pytest.mark.usefixtures("everywhere")
def test_no_file_is_opened_for_a_name(client: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "me" / "own"
    file.write_bytes(b"a secret")
    monkeypatch.chdir(tmp_path)
    body = {"model": "me/own", "prompt": "he", "raw": True, "stream": False, "options": {"num_predict": 1}}
    assert client.post("/api/generate", json=body).status_code == 200
    with pytest.raises(irkit.errors.ModelFileError):
        irkit.Session("me/own")


@pytest.mark.usefixtures("files")
def test_a_model_that_a_program_lends_has_these_names_too(tiny_path: Path) -> None:
    hub.create("me/own", tiny_path)
    with irkit.Session("ollama.com/me/own") as session, session.serve(port=0) as served:
        assert served.model == "me/own"
        with httpx.Client(base_url=served.url, timeout=60) as client:
            for name in ("me/own", "Me/Own:latest", "registry.ollama.ai/me/own"):
                body = {"model": name, "prompt": "he", "raw": True, "stream": False, "options": {"num_predict": 1}}
                assert client.post("/api/generate", json=body).status_code == 200
                assert running(client) == ["me/own"]
    with irkit.Session(tiny_path) as session, session.serve(port=0) as served:
        assert httpx.post(f"{served.url}/api/show", json={"model": "library/tiny"}, timeout=60).status_code == 200
        assert httpx.get(f"{served.url}/v1/models/tiny:latest", timeout=60).json()["id"] == "tiny"
