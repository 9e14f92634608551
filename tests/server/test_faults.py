"""What goes wrong with a real server and the real model: then every slot is free, and the next answer is right."""

import json
import os
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from real import QUESTION, SERVE, Server, eventually, serving

from irkit import hub

PARALLEL, QUEUE = 2, 4
ENDLESS = {
    "model": "smollm2",
    "prompt": "1, 2, 3, 4, 5,",
    "raw": True,
    "options": {"temperature": 0, "num_predict": 4000},
}


@pytest.fixture(scope="module")
def running(model_path: Path) -> Iterator[Server]:
    with serving("--parallel", str(PARALLEL), "--max-queue", str(QUEUE)) as server:
        yield server


@pytest.fixture(scope="module")
def right(running: Server) -> str:
    """What the server answers when nothing is wrong."""
    answer = running.ask()
    assert "Paris" in answer
    return answer


@pytest.fixture
def server(running: Server, right: str) -> Iterator[Server]:
    """The server; after the test it is as it was."""
    yield running
    eventually(running.free)
    assert running.ask() == right
    assert running.process.poll() is None
    assert running.gauge("models") == 1


def connect(server: Server, path: str, body: Any, *, buffer: int = 0) -> socket.socket:
    """A connection on which a request was sent; `buffer` is how many bytes it takes in before they are read."""
    address, content = urlsplit(server.url), json.dumps(body).encode()
    connection = socket.socket()
    if buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.connect((address.hostname, address.port))
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("path", ["/api/generate", "/v1/completions", "/api/respond"])
@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_leave_while_their_prompt_is_read(server: Server, path: str, stream: bool) -> None:
    text = f"{path} {stream} " + "one two three " * 1500  # thousands of tokens: seconds
    body = {"model": "smollm2", "stream": stream, "messages" if path == "/api/respond" else "prompt": text}
    before = server.cancelled()
    connections = [connect(server, path, body) for _ in range(PARALLEL)]
    eventually(lambda: server.gauge("slots_busy") == PARALLEL)
    for connection in connections:
        connection.close()
    eventually(lambda: server.cancelled() == before + PARALLEL, 30)


def test_clients_that_leave_in_the_middle_of_their_streams_or_while_they_wait(server: Server) -> None:
    before = server.cancelled()
    made = [connect(server, "/api/generate", ENDLESS) for _ in range(PARALLEL)]
    for connection in made:
        received = b""
        while b'"done":false' not in received:
            received += connection.recv(4096)
    waiting = [connect(server, "/api/generate", ENDLESS) for _ in range(QUEUE)]
    eventually(lambda: server.gauge("queue") == QUEUE)
    for connection in (*waiting, *made):
        connection.close()
    eventually(lambda: server.cancelled() == before + PARALLEL + QUEUE, 30)


def test_slow_readers_hold_up_nobody_and_lose_nothing(server: Server) -> None:
    count = 120
    options = {"num_predict": count, "temperature": 0, "repeat_penalty": 1.0, "num_ctx": 1024}
    body = ENDLESS | {"options": options, "logprobs": True, "top_logprobs": 20}
    whole = server.post("/api/generate", body).text.splitlines()
    memory = server.gauge("memory_bytes")
    # More clients than may be made at once; each answer is far larger than what the sockets take in.
    slow = [connect(server, "/api/generate", body, buffer=4096) for _ in range(PARALLEL + QUEUE)]
    try:
        eventually(server.free, 120)  # nobody has read a byte, and the engine is free for others
        assert server.ask()
        assert server.gauge("memory_bytes") - memory < 300e6
        for connection in slow:
            connection.settimeout(60)
            received = b""
            while part := connection.recv(1 << 16):
                received += part
            assert len(received) > 150_000
            lines = [json.loads(line) for line in received.splitlines() if line.startswith(b"{")]
            assert [line["response"] for line in lines] == [json.loads(line)["response"] for line in whole]
            assert lines[-1]["eval_count"] == count
    finally:
        for connection in slow:
            connection.close()


def test_a_flood_is_refused_beyond_the_limit_and_all_else_is_answered(server: Server, right: str) -> None:
    def ask(number: int) -> tuple[int, str]:
        reply = server.post(
            "/api/generate", QUESTION | {"options": {"temperature": 0, "num_predict": 8, "seed": number}}
        )
        assert reply.status_code in (200, 503)
        assert (reply.status_code == 503) == ("retry-after" in reply.headers)
        return reply.status_code, reply.json().get("response", "")

    with ThreadPoolExecutor(40) as pool:
        # What is being made meanwhile keeps the slots taken.
        busy = [connect(server, "/api/generate", ENDLESS) for _ in range(PARALLEL)]
        eventually(lambda: server.gauge("slots_busy") == PARALLEL)
        asked = [pool.submit(ask, number) for number in range(40)]
        eventually(lambda: sum(future.done() for future in asked) >= 40 - QUEUE)
        for connection in busy:
            connection.close()
        found = [future.result() for future in asked]
    assert Counter(status for status, _ in found) == {200: QUEUE, 503: 40 - QUEUE}
    assert {text for status, text in found if status == 200} == {right}


BAD = {
    "no body": b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n",
    "no length": b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no host": b"POST /api/generate HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}",
    "no http": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
    "a line of 1 MB": b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a header of 1 MB": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n",
    "a negative length": b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n{}",
    "two lengths": b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "bad chunks": b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n{}\r\n",
    "cut": b'POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n{"model": "smol',
}


@pytest.mark.parametrize("request_", BAD.values(), ids=BAD)
def test_requests_that_are_none(server: Server, request_: bytes) -> None:
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        with suppress(OSError):
            connection.sendall(request_)
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        with suppress(OSError):
            while part := connection.recv(1 << 16):
                answer += part
    assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4"))


NO_BODIES = {
    "deep": b'{"model": "smollm2", "prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "150 deep": b'{"options": ' * 150 + b"1" + b"}" * 150,
    "bytes": b"\xff\xfe{}",
    "surrogate": b'{"model": "\\udfff"}',
    "digits": b"9" * 20_000,
    "too large a number": b'{"seed": 1e999}',
    "null": b"null",
    "form": b"model=smollm2&prompt=hello",
}


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat", "/v1/chat/completions", "/v1/embeddings", "/api/score"])
def test_bodies_that_are_none(server: Server, path: str) -> None:
    for name, content in NO_BODIES.items():
        for kind in ("application/json", "multipart/form-data; boundary=x", "application/xml"):
            reply = httpx.post(server.url + path, content=content, headers={"content-type": kind}, timeout=60)
            assert reply.status_code == 400, name
            assert reply.json()["error"]


def test_many_connections_that_say_nothing(server: Server, right: str) -> None:
    address = urlsplit(server.url)
    silent = [socket.create_connection((address.hostname, address.port)) for _ in range(200)]
    try:
        for connection in silent[::2]:
            connection.sendall(b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000000\r\n\r\n{")
        assert server.ask() == right
    finally:
        for connection in silent:
            connection.close()


def test_killed_and_started_again(model_path: Path, right: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in (hub.home() / "manifests").rglob("*.json")}
    with serving() as server:
        port = server.url.rpartition(":")[2]
        with httpx.stream("POST", f"{server.url}/api/generate", json=ENDLESS, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(server.process.pid, signal.SIGKILL)
            with pytest.raises(httpx.TransportError):
                list(lines)
        server.process.wait()
    with subprocess.Popen([*SERVE[:-1], port], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            assert process.stderr.readline() == f"irkit serves on http://127.0.0.1:{port}\n"
            again = Server(process, server.url)
            assert again.ask() == right
            assert again.free()
        finally:
            process.kill()
    assert {path: path.stat().st_mtime_ns for path in (hub.home() / "manifests").rglob("*.json")} == before
