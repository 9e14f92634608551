import asyncio
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from irkit.options import ServeOptions
from irkit.server import create_app
from irkit.server.security import is_local, is_loopback

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
LOCAL = [
    *("localhost", "localhost:11434", "LOCALHOST", "127.0.0.1", "127.0.0.1:80", "[::1]", "[::1]:11434"),
    *("nas.local", "nas.local:11434", "host.docker.internal:11434", "app.localhost", "192.168.1.7", "10.0.0.1:1"),
]
FOREIGN = [
    *("", "evil.example", "evil.example:11434", "localhost.evil.example", "notlocalhost", "8.8.8.8", "local"),
    *("127.0.0.1.evil.example", "[2001:4860:4860::8888]", "evil.example:127.0.0.1", "xn--local", "0x7f000001"),
]


@pytest.mark.parametrize("host", LOCAL)
def test_local_hosts_are_served(client, host):
    assert client.get("/api/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", FOREIGN)
def test_other_hosts_are_refused(client, host):
    reply = client.get("/api/health", headers={"host": host})
    assert (reply.status_code, list(reply.json())) == (403, ["error"])


@given(st.text())
def test_any_host_header_is_judged(host):
    assert is_local(host) in (True, False)


def test_loopback():
    assert [
        h
        for h in ("127.0.0.1", "::1", "localhost", "127.9.9.9", "0.0.0.0", "::", "8.8.8.8", "nas.local")
        if is_loopback(h)
    ] == ["127.0.0.1", "::1", "localhost", "127.9.9.9"]


def ask(options: ServeOptions, method: str, path: str, **how: Any) -> httpx.Response:
    """What a server with these options answers, which is reached as http://localhost:11434."""
    return request(create_app(options), method, path, **how)


def request(app: FastAPI, method: str, path: str, **how: Any) -> httpx.Response:
    async def asking() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:11434") as client:
            return await client.request(method, path, **how)

    return asyncio.run(asking())


@pytest.mark.parametrize(("host", "expected"), [("127.0.0.1", 403), ("0.0.0.0", 200)])
def test_only_a_server_for_this_machine_alone_is_picky(host, expected):
    reply = ask(ServeOptions(host=host), "GET", "/api/health", headers={"host": "my.server.example"})
    assert reply.status_code == expected


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost:3000", True),
        ("https://127.0.0.1", True),
        ("http://[::1]:5173", True),
        ("app://obsidian.md", True),
        ("tauri://localhost", True),
        ("vscode-webview://abc", True),
        ("https://evil.example", False),
        ("http://localhost.evil.example", False),
        ("http://localhost:3000.evil.example", False),
        ("null", False),
    ],
)
def test_origins(client, origin, allowed):
    headers = {"origin": origin, "access-control-request-method": "POST"}
    reply = client.options("/api/chat", headers=headers)
    assert (reply.headers.get("access-control-allow-origin") == origin) is allowed
    assert ("access-control-allow-origin" in client.get("/api/tags", headers=headers).headers) is allowed


@pytest.mark.parametrize("path", ["/api/close", "/api/generate", "/api/respond", "/api/delete", "/v1/completions"])
@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost.evil.example"])
def test_a_page_elsewhere_can_ask_for_nothing_even_without_asking_first(client, path, origin):
    """A POST of plain text needs no preflight: the browser sends it, and keeps only the answer from the page."""
    headers = {"origin": origin, "content-type": "text/plain;charset=UTF-8"}
    reply = client.post(path, content=b'{"model": "smollm2"}', headers=headers)
    assert (reply.status_code, list(reply.json())) == (403, ["error"])
    assert isinstance(reply.json()["error"], dict) is path.startswith("/v1/")


def test_pages_of_this_machine_of_the_server_itself_and_of_those_allowed_can():
    def status(origin: str, *origins: str) -> int:
        return ask(ServeOptions(origins=origins), "GET", "/api/tags", headers={"origin": origin}).status_code

    assert status("http://localhost:3000") == status("http://localhost:11434") == 200
    assert status("https://chat.example") == 403
    assert status("https://chat.example", "https://chat.example/") == 200
    assert status("https://chat.example.evil.example", "https://chat.example") == 403
    assert status("https://chat-example", "https://chat.example") == 403
    assert status("https://any.example", "*") == 200


KEY = "sk-0123"


@pytest.mark.parametrize("path", ["/api/tags", "/api/version", "/api/generate", "/docs", "/openapi.json", "/nothing"])
@pytest.mark.parametrize(
    "given", [None, "", KEY, "Bearer", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer sk-012", "Bearer \u00e9"]
)
def test_without_the_key_nothing_is_answered(path, given):
    headers = {} if given is None else {"authorization": given.encode("latin-1")}
    reply = ask(ServeOptions(api_key=KEY), "POST" if path == "/api/generate" else "GET", path, headers=headers)
    assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert list(reply.json()) == ["error"]


def test_with_the_key_everything_is(monkeypatch):
    def status(path: str, key: str | None, **options: Any) -> int:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return ask(ServeOptions(**options), "GET", path, headers=headers).status_code

    assert status("/api/tags", KEY, api_key=KEY) == 200
    assert status("/", None, api_key=KEY) == status("/api/health", None, api_key=KEY) == 200
    assert status("/api/tags", None) == 200
    monkeypatch.setenv("IRKIT_API_KEY", "from-outside")
    assert [status("/api/tags", key) for key in (None, KEY, "from-outside")] == [401, 401, 200]
    assert status("/api/tags", KEY, api_key=KEY) == 200
    assert KEY not in repr(ServeOptions(api_key=KEY))


def test_a_page_may_ask_first_without_the_key():
    headers = {"origin": "http://localhost:3000", "access-control-request-method": "POST"}
    reply = ask(ServeOptions(api_key=KEY), "OPTIONS", "/api/chat", headers=headers)
    assert reply.status_code == 200
    refused = ask(ServeOptions(api_key=KEY), "POST", "/api/chat", headers={"origin": "http://localhost:3000"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "http://localhost:3000"  # so that it learns why


@pytest.mark.parametrize(
    ("words", "warns"), [([], False), (["--host", "0.0.0.0"], True), (["--host", "0.0.0.0", "--api-key", KEY], False)]
)
def test_a_server_that_everybody_reaches_warns_without_a_key(words, warns):
    code = "from irkit.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "--port", "0", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        assert process.stderr.readline().startswith("irkit serves on http://")
        said = process.stderr.readline() if warns else ""
        process.terminate()
        said += process.stderr.read()
    assert ("warning: whoever can reach this address" in said) is warns
    assert KEY not in said


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
@pytest.mark.parametrize(("key", "status", "named"), [(None, 403, 200), ("", 403, 200), (KEY, 401, 401)])
def test_no_page_reaches_replicas_by_a_name_of_its_own(monkeypatch, capsys, key, status, named):
    """Ray's proxy looks at no names, and a page's origin is that of the name it was reached by."""
    pytest.importorskip("ray")
    monkeypatch.syspath_prepend(EXAMPLES)
    if key is None:
        monkeypatch.delenv("IRKIT_API_KEY", raising=False)
    else:
        monkeypatch.setenv("IRKIT_API_KEY", key)
    build = importlib.import_module("replicas").build

    def reply(host: str, **headers: str) -> httpx.Response:
        headers |= {"host": host, "origin": f"http://{host}"}
        return request(build(), "GET", "/api/tags", headers=headers)

    assert reply("evil.example:8000").status_code == status
    assert ("warning: whoever can reach this address" in capsys.readouterr().err) is (not key)
    assert {reply(host).status_code for host in ("localhost:8000", "127.0.0.1:8000", "10.0.0.1:8000")} == {named}
    if key:
        assert reply("my.server.example", authorization=f"Bearer {KEY}").status_code == 200


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "..", "/etc/passwd", "a/../b", "a\\b", "~", "x\0y", "a" * 5000, "file.gguf"]
)
@pytest.mark.parametrize("path", ["/api/generate", "/api/delete", "/api/tokenize", "/api/close"])
def test_names_open_no_files(client, path, name):
    method = "DELETE" if path == "/api/delete" else "POST"
    reply = client.request(method, path, json={"model": name, "text": "a"} if "token" in path else {"model": name})
    assert reply.status_code in (400, 404)
    assert len(reply.json()["error"]) < 300


@pytest.mark.parametrize(
    "options",
    [
        *({"repeat_penalty": value} for value in (0, -1, 1e300, "x")),
        *({"presence_penalty": 3}, {"frequency_penalty": -2.1}, {"repeat_last_n": -2}, {"repeat_last_n": 1 << 40}),
        *({"num_predict": 1 << 60}, {"num_predict": -2}, {"seed": 1 << 64}, {"temperature": -1}, {"top_p": 1.01}),
        *(
            {"stop": ["x"] * 65},
            {"stop": ["x" * 1001]},
            {"stop": [""]},
            {"logit_bias": {"49152": 1}},
            {"num_ctx": 1 << 40},
        ),
        *(
            {"logit_bias": {"1": 1e300}},
            {"top_k": 1 << 40},
            {"min_p": -0.1},
            {"num_ctx": 0},
            {"num_ctx": 1 << 40},
            {"num_predict": 1.5},
        ),
    ],
    ids=str,
)
def test_what_no_engine_can_do_is_refused_by_name(client, options):
    body = {"model": "smollm2", "prompt": "a", "stream": False, "options": options}
    reply = client.post("/api/generate", json=body)
    assert reply.status_code == 400
    assert next(iter(options)) in reply.json()["error"]


@pytest.mark.parametrize("penalty", [0.1, 10])
def test_the_strongest_penalties_compute(client, penalty):
    options = {"repeat_penalty": penalty, "presence_penalty": -2, "frequency_penalty": 2, "repeat_last_n": -1}
    body = {"model": "smollm2", "prompt": "a a a", "stream": False, "options": options | {"num_predict": 8}}
    assert client.post("/api/generate", json=body).json()["eval_count"] >= 1
