"""The routes about models, over a registry of each test's own."""

import asyncio
import functools
import hashlib
import json
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from anyio import CapacityLimiter

from irkit import hub
from irkit.engine import Model
from irkit.errors import OptionError, PullError
from irkit.hub import registry
from irkit.options import ServeOptions, parse, seconds
from irkit.results import Generation, Stats
from irkit.server.ollama import jobs

GO = "{{ .System }}|{{ .Prompt }}|{{ .Response }}"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty registry."""
    monkeypatch.setenv("IRKIT_HOME", str(tmp_path))
    return tmp_path


def test_tags_and_delete(client, model_path):
    hub.add(model_path, "doomed")
    (tag,) = client.get("/api/tags").json()["models"]
    assert (tag["name"], tag["size"]) == ("doomed", model_path.stat().st_size)
    assert tag["details"]["family"] == "llama"
    assert tag["details"]["parameter_size"] == "134.5M"
    assert tag["details"]["quantization_level"] == "Q4_1"
    assert client.head("/api/tags").status_code == 200
    text = {"text": "hi", "model": "doomed"}
    assert client.post("/api/tokenize", json=text).status_code == 200
    gone = client.request("DELETE", "/api/delete", json={"model": "doomed:latest"})
    assert (gone.status_code, gone.content) == (200, b"")
    again = client.request("DELETE", "/api/delete", json={"name": "doomed"})
    assert (again.status_code, again.json()) == (404, {"error": "model 'doomed' not found"})
    assert client.post("/api/tokenize", json=text).status_code == 404
    assert client.get("/api/tags").json() == {"models": []}
    assert model_path.is_file()


def test_show(client, model_path):
    hub.create("pirate", model_path, system="Arr.", options={"temperature": 0.5, "stop": ["\n", "ye"], "num_ctx": 99})
    shown = client.post("/api/show", json={"model": "pirate:latest"}).json()
    assert shown == client.post("/api/show", json={"name": "pirate"}).json()
    info = shown["model_info"]
    assert info["general.architecture"] == "llama"
    assert info["llama.context_length"] == 8192
    assert info["general.parameter_count"] == 134515008
    assert info["tokenizer.ggml.tokens"] is None
    assert shown["capabilities"] == ["completion"]
    assert "<|im_start|>" in shown["template"]
    assert shown["system"] == "Arr."
    assert [line.split(maxsplit=1) for line in shown["parameters"].splitlines()] == [
        ["temperature", "0.5"], ["stop", '"\\n"'], ["stop", '"ye"'], ["num_ctx", "99"],
    ]  # fmt: skip
    assert shown["details"]["quantization_level"] == "Q4_1"
    assert "apache" in shown["license"]
    told = hub.read_modelfile(shown["modelfile"])
    assert (told.source, told.system, told.template) == ("pirate", "Arr.", shown["template"])
    verbose = client.post("/api/show", json={"model": "pirate", "verbose": True}).json()
    assert len(verbose["model_info"]["tokenizer.ggml.tokens"]) == 49152
    assert {"name": "token_embd.weight", "type": "Q8_0", "shape": [49152, 576]} in verbose["tensors"]
    for name in ("nosuch", "smollm2"):
        reply = client.post("/api/show", json={"model": name})
        assert (reply.status_code, reply.json()) == (404, {"error": f"model '{name}' not found"})


@pytest.mark.parametrize(
    ("template", "more", "able"),
    [
        ("{{ tools | tojson if tools }}<tool_call>", {}, ["tools"]),
        ("<tool_call>", {}, []),
        ("{{ tools | tojson if tools }}", {}, []),
        ("<think></think>", {}, ["thinking"]),
        ("", {"<fim_prefix>": 3, "<fim_suffix>": 3, "<fim_middle>": 3}, ["insert"]),
        ("", {"<fim_prefix>": 3, "<fim_suffix>": 3}, []),
    ],
)
def test_capabilities_are_those_that_there_are(client, small_model, template, more, able):
    hub.create("m", small_model(more=more), template=template or None)
    assert client.post("/api/show", json={"model": "m"}).json()["capabilities"] == ["completion", *able]


def test_ps_says_what_is_in_memory_and_for_how_long(client, tiny_path):
    hub.create("m", tiny_path, options={"num_ctx": 64})
    assert "m" not in [model["name"] for model in client.get("/api/ps").json()["models"]]
    for keep_alive, low, high in [("10m", 590, 900), (3600.5, 3590, 3900), (-1, 1e9, 1e10), ("-1s", 1e9, 1e10)]:
        before = datetime.now(UTC)
        client.post("/api/generate", json={"model": "m", "keep_alive": keep_alive})
        (shown,) = [model for model in client.get("/api/ps").json()["models"] if model["name"] == "m"]
        assert low < (datetime.fromisoformat(shown["expires_at"]) - before).total_seconds() < high
    assert (shown["context_length"], shown["size_vram"], shown["model"]) == (64, 0, "m")
    assert shown["size"] > 10_000
    assert shown["details"]["format"] == "gguf"
    client.post("/api/generate", json={"model": "m", "keep_alive": 0})
    assert "m" not in [model["name"] for model in client.get("/api/ps").json()["models"]]


def test_a_model_is_let_go_of_when_nobody_has_used_it(client, tiny_path, monkeypatch):
    hub.create("m", tiny_path)

    def held() -> bool:
        return "m" in [model["name"] for model in client.get("/api/ps").json()["models"]]

    # With a bias that keeps the model from ending its answer.
    options = {"num_predict": 2, "logit_bias": {257: -1e4}}
    body = {"model": "m", "prompt": "hello", "raw": True, "options": options, "stream": False}
    assert client.post("/api/generate", json=body | {"keep_alive": 0}).json()["eval_count"] == 2
    wait_until(lambda: not held())
    # A later request says how long; while an answer is made, the time does not begin.
    client.post("/api/generate", json=body | {"keep_alive": "1h"})
    pending = Generation()
    monkeypatch.setattr(Model, "generate", lambda *arguments, **options: pending)
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(client.post, "/api/generate", json=body | {"keep_alive": "1ms"})
        waited.wait(0.3)
        assert held()
        pending._finish("stop", Stats())
        assert reply.result().json()["done_reason"] == "stop"
    wait_until(lambda: not held())


waited = threading.Event()


def wait_until(condition) -> None:
    for _ in range(400):
        if condition():
            return
        waited.wait(0.05)
    raise AssertionError("it did not come about")


def statuses(reply: httpx.Response) -> list[str]:
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line)["status"] for line in reply.text.splitlines()]


def test_create_from_a_file_that_was_sent(client, tiny_path):
    content = tiny_path.read_bytes()
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert client.head(f"/api/blobs/{digest}").status_code == 404
    wrong = client.post(f"/api/blobs/{digest}", content=content[:100])
    assert wrong.status_code == 400
    assert "have the sha256" in wrong.json()["error"]
    assert client.head("/api/blobs/sha256:..").status_code == 400
    body = {"model": "Mine", "files": {"m.gguf": digest}, "system": "Hm.", "parameters": {"top_k": 3, "stop": ["x"]}}
    missing = client.post("/api/create", json=body)
    assert (missing.status_code, missing.json()) == (400, {"error": f"no file was sent as {digest}"})
    assert client.post(f"/api/blobs/{digest}", content=content).status_code == 201
    assert client.head(f"/api/blobs/{digest}").status_code == 200
    assert client.post(f"/api/blobs/{digest}", content=content).status_code == 200
    assert statuses(client.post("/api/create", json=body))[-1] == "success"
    made = hub.find("mine")
    assert made is not None
    assert (made.system, made.options, made.sha256) == ("Hm.", {"top_k": 3, "stop": ["x"]}, digest[7:])
    old = {"name": "older", "modelfile": f'FROM @{digest}\nPARAMETER top_k 4\nSYSTEM """Well."""', "stream": False}
    assert client.post("/api/create", json=old).json() == {"status": "success"}
    made = hub.find("older")
    assert made is not None
    assert (made.system, made.options) == ("Well.", {"top_k": 4})


def test_a_model_made_anew_is_the_new_one(client, tiny_path):
    hub.create("base", tiny_path)
    raw = {"model": "m", "prompt": "he", "raw": True, "stream": False, "options": {"logit_bias": {257: -1e4}}}
    for count in (1, 2):
        body = {"model": "m", "from": "base", "parameters": {"num_predict": count}, "template": GO}
        assert client.post("/api/create", json=body | {"stream": False}).json() == {"status": "success"}
        assert client.post("/api/generate", json=raw).json()["eval_count"] == count
    assert client.post("/api/copy", json={"source": "m", "destination": "n:latest"}).status_code == 200
    assert client.post("/api/generate", json=raw | {"model": "n"}).json()["eval_count"] == 2


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("create", {"model": "m"}, 400, "neither 'from' or 'files' was specified"),
        ("create", {"model": "m", "from": "nosuch"}, 404, "model 'nosuch' not found"),
        ("create", {"model": "m", "from": "/etc/passwd"}, 400, "cannot be a model's name"),
        ("create", {"model": "m", "modelfile": "FROM /etc/passwd"}, 400, "cannot be a model's name"),
        ("create", {"model": "m", "modelfile": "FROM @sha256:no"}, 400, "is no digest"),
        ("create", {"model": "m", "modelfile": "BE good"}, 400, "no instruction 'BE'"),
        ("create", {"model": "m", "files": {"a": "x", "b": "y"}}, 400, "must be one GGUF file"),
        ("create", {"model": "../m", "from": "base"}, 400, "cannot be a model's name"),
        ("create", {"model": "m", "from": "base", "parameters": {"temprature": 1}}, 400, "did you mean temperature"),
        ("create", {"model": "m", "from": "base", "template": "{{ range .Tools }}{{ . }}{{ end }}"}, 400, "a Go one"),
        ("create", {"model": "m", "from": "base", "quantize": "q4_0"}, 400, '"quantize" is not supported'),
        ("create", {"model": "m", "from": "base", "adapters": {"a": "b"}}, 400, '"adapters" is not supported'),
        ("copy", {"source": "nosuch", "destination": "m"}, 404, "model 'nosuch' not found"),
        ("copy", {"source": "base", "destination": "a/b/c"}, 400, "cannot be a model's name"),
        ("pull", {"model": "no such"}, 400, "cannot be pulled"),
        ("pull", {"model": "https://192.168.0.1/m.gguf"}, 502, "private"),
        ("pull", {"model": "hf.co/a/b/c.gguf"}, 502, "could not be fetched"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_what_cannot_be_made_or_fetched(client, tiny_path, monkeypatch, path, body, status, words, stream):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    hub.create("base", tiny_path)
    reply = client.post(f"/api/{path}", json=body | {"stream": stream})
    assert reply.status_code == status
    assert words in reply.json()["error"]
    assert [model.name for model in hub.models()] == ["base"]


@pytest.fixture
def address(tiny_path, tmp_path, monkeypatch) -> Iterator[str]:
    """What a model can be pulled as, from a hub on this machine."""
    file = tmp_path / "hub/org/repo/resolve/main/Small-Q4_0.gguf"
    file.parent.mkdir(parents=True)
    file.symlink_to(tiny_path)
    handler = functools.partial(Quiet, directory=tmp_path / "hub")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield "hf.co/org/repo/Small-Q4_0.gguf"
        server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def test_pull_says_how_far_it_is(client, address, tiny_path, monkeypatch):
    monkeypatch.setattr(jobs, "REPORT_SECONDS", 0)
    told = [json.loads(line) for line in client.post("/api/pull", json={"model": address}).text.splitlines()]
    assert told[0] == {"status": "pulling manifest"}
    assert told[-1] == {"status": "success"}
    steps = [line for line in told if "completed" in line]
    assert [line["completed"] for line in steps] == sorted(line["completed"] for line in steps)
    assert steps[-1]["completed"] == steps[-1]["total"] == tiny_path.stat().st_size
    assert len({line["digest"] for line in steps}) == 1
    assert client.post("/api/pull", json={"model": address, "stream": False}).json() == {"status": "success"}
    assert registry.models()[0].name == "small-q4_0"
    # It is known by what it was pulled as, too.
    for name in ("hf.co/org/repo:Q4_0", "hf.co/Org/repo", address, "small-q4_0"):
        body = {"model": name, "prompt": "he", "raw": True, "stream": False, "options": {"num_predict": 1}}
        assert client.post("/api/generate", json=body).json()["eval_count"] == 1
    assert client.post("/api/generate", json={"model": "hf.co/org/repo:Q8_0"}).status_code == 404


def test_a_pull_that_nobody_waits_for_ends() -> None:
    async def ask() -> list[str]:
        job = jobs.Job()

        def work(job: jobs.Job) -> None:
            job.progress(1, 10, "m")
            job.cancel()
            job.progress(2, 10, "m")

        async def end(_: None) -> None:
            raise AssertionError("it did not end early")

        said = []

        async def listen() -> None:
            async for line in job.lines(work, end, CapacityLimiter(1)):
                said.append(line["status"])  # noqa: PERF401

        with pytest.raises(PullError, match="has left"):
            await listen()
        assert job.done
        return said

    assert asyncio.run(ask()) == ["pulling manifest", "pulling m"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(5, 5), ("5", 5), (0, 0), ("0s", 0), ("5m", 300), ("1h30m", 5400), ("1.5h", 5400), ("300ms", 0.3), (-1, math.inf)],
)
def test_times(value, expected):
    assert seconds(value) == pytest.approx(expected)
    assert seconds("-1m") == math.inf


@pytest.mark.parametrize("value", ["", "soon", "5 m", "1d", "nan", "m", "1h-5m"])
def test_what_is_no_time(value):
    with pytest.raises(OptionError, match='option "keep_alive": must be seconds, or a duration'):
        parse(ServeOptions, {"keep_alive": value})
