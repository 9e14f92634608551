"""`irkit ps` and `irkit stop`, against a server that speaks Ollama's API, and one of ours."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from irkit import hub
from irkit.cli import remote
from irkit.errors import OptionError

IRKIT = [sys.executable, "-c", "from irkit.cli import main; main()"]


def irkit_(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*IRKIT, *words], capture_output=True, text=True, timeout=60)


class Ollama(BaseHTTPRequestHandler):
    """Answers as Ollama does; `Ollama.asked` holds what it was asked."""

    asked: list[tuple[str, Any, str | None]]
    reply: tuple[int, bytes] | None

    def do_GET(self) -> None:
        soon = datetime.now(UTC) + timedelta(minutes=4, seconds=1)
        one = {"name": "smollm2:latest", "model": "smollm2:latest", "size": 98_400_000, "context_length": 4096}
        forever = {"name": "other\x1b[31m", "size": 1, "expires_at": "2318-01-01T00:00:00.123456789+01:00"}
        self._answer({"models": [one | {"expires_at": soon.isoformat()}, forever]}, None)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["model"] == "nosuch":
            self.reply = 404, b'{"error": "model \'nosuch\' not found"}'
        self._answer({"model": asked["model"], "done": True, "done_reason": "unload"}, asked)

    def _answer(self, told: Any, asked: Any) -> None:
        self.asked.append((self.path, asked, self.headers["Authorization"]))
        status, body = self.reply or (200, json.dumps(told).encode())
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def ollama(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Ollama]]:
    handler = type("Handler", (Ollama,), {"asked": [], "reply": None})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setenv("IRKIT_HOST", f"127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")  # which knows nothing of this machine's servers
        monkeypatch.delenv("IRKIT_API_KEY", raising=False)
        yield handler
        server.shutdown()


def test_ps_lists_what_a_server_holds(ollama, monkeypatch):
    heading, one, other = irkit_("ps").stdout.splitlines()
    assert heading.split() == ["NAME", "SIZE", "CONTEXT", "UNTIL"]
    assert one.split() == ["smollm2:latest", "98.4", "MB", "4096", "in", "4", "min"]
    assert other.split() == ["other", "[31m", "1", "bytes", "never"]  # no control character reaches the terminal
    monkeypatch.setenv("IRKIT_API_KEY", "secret")
    assert json.loads(irkit_("ps", "--json").stdout)[0]["name"] == "smollm2:latest"
    assert [asked[2] for asked in ollama.asked] == [None, "Bearer secret"]


def test_stop_lets_go_of_models(ollama):
    done = irkit_("stop", "smollm2", "other")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [(path, asked["model"], asked["keep_alive"]) for path, asked, _ in ollama.asked] == [
        ("/api/generate", "smollm2", 0),
        ("/api/generate", "other", 0),
    ]
    done = irkit_("stop", "nosuch")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.endswith("model 'nosuch' not found\n")


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((200, b"<html>"), "is no server of models (status 200)"),
        ((200, b'{"models": 3}'), "is no server of models"),
        ((401, b'{"error": "a key is needed"}'), "a key is needed"),
        ((500, b"[]"), "is no server of models (status 500)"),
    ],
)
def test_what_is_no_server_of_models_is_one_line(ollama, reply, message):
    ollama.reply = reply
    done = irkit_("ps")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert message in done.stderr


def test_no_server_at_all(monkeypatch):
    monkeypatch.setenv("IRKIT_HOST", "127.0.0.1:1")
    done = irkit_("ps")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "irkit: no server answers at http://127.0.0.1:1; irkit serve starts one, IRKIT_HOST names another\n"
    )


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("", "http://127.0.0.1:11434"),
        ("box", "http://box:11434"),
        ("box:8000", "http://box:8000"),
        (":8000", "http://127.0.0.1:8000"),
        ("0.0.0.0:8000", "http://127.0.0.1:8000"),
        ("http://box/", "http://box:11434"),
        ("https://box", "https://box:443"),
        ("[::1]:9", "http://[::1]:9"),
    ],
)
def test_irkit_host_may_leave_things_out(monkeypatch, given, address):
    monkeypatch.setenv("IRKIT_HOST", given)
    assert remote.address() == address


@pytest.mark.parametrize("given", ["box:port", "box:99999", "ftp://box", "http://box/path", "http://me:it@box", "[::1"])
def test_irkit_host_that_is_no_address(monkeypatch, given):
    monkeypatch.setenv("IRKIT_HOST", given)
    with pytest.raises(OptionError, match=r"IRKIT_HOST is .*, and can be HOST"):
        remote.address()


@pytest.mark.parametrize(
    ("seconds", "words"), [(-5, "now"), (30, "in 30 s"), (299, "in 5 min"), (7300, "in 2 h"), (1e6, "in 12 days")]
)
def test_until(seconds, words):
    assert remote.until((datetime.now(UTC) + timedelta(seconds=seconds + 0.4)).isoformat()) == words
    assert remote.until(None) == remote.until("soon") == ""


@pytest.fixture
def serving(tmp_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server of ours, with one model registered."""
    monkeypatch.setenv("IRKIT_HOME", str(tmp_path))
    hub.add(tiny_path, "tiny")
    with subprocess.Popen([*IRKIT, "serve", "--port", "0"], stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        monkeypatch.setenv("IRKIT_HOST", server.stderr.readline().split()[-1])
        yield
        server.terminate()


def test_a_server_of_ours_that_asks_for_a_key(monkeypatch, serving):
    monkeypatch.setenv("IRKIT_API_KEY", "secret")  # a server that asks for none does not mind
    assert irkit_("ps").returncode == 0
    with subprocess.Popen([*IRKIT, "serve", "--port", "0"], stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        monkeypatch.setenv("IRKIT_HOST", server.stderr.readline().split()[-1])
        assert irkit_("ps", "--json").stdout == "[]\n"
        assert irkit_("stop", "tiny").returncode == 0
        monkeypatch.setenv("IRKIT_API_KEY", "wrong")
        done = irkit_("ps")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "a key is needed" in done.stderr
        server.terminate()


def test_stop_and_a_server_of_ours(serving):
    assert irkit_("stop", "tiny").returncode == 0
    done = irkit_("stop", "nosuch")
    assert (done.returncode, done.stderr.partition(": ")[2].partition(": ")[2]) == (1, "model 'nosuch' not found\n")
