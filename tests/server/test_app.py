import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from irkit.errors import ModelFileError
from irkit.results import Generation
from irkit.server import requests
from irkit.session import Session

LONG = {"model": "smollm2", "messages": "Count to one thousand.", "num_predict": 2000, "top_k": 1}


def test_small_routes(client):
    assert client.get("/").text == "Ollama is running"
    assert client.head("/").status_code == 200
    assert client.get("/api/health").json() == {"status": "ok"}
    version = client.get("/api/version").json()["version"]
    assert tuple(map(int, version.split("."))) >= (0, 6, 4)
    assert client.head("/api/version").content == b""


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/api/nothing", 404), ("GET", "/api/tokenize", 405), ("PUT", "/api/chat", 405), ("POST", "/", 405)],
)
def test_http_errors_have_the_shape_of_the_others(client, method, path, status):
    reply = client.request(method, path)
    assert reply.status_code == status
    assert list(reply.json()) == ["error"]


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat", "/api/embed", "/api/tokenize", "/api/close"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no body"),
        (b"{", "not valid JSON"),
        (b'{"model": "smollm2", "text": "\xff"}', "not valid JSON"),
        (b'{"model": "\\ud800"}', "not valid JSON"),
        (b'{"options": {"temperature": NaN}}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b'{"model": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b'"smollm2"', "JSON object"),
        (b'{"model": {}}', 'option "model" must be a valid string'),
    ],
    ids=["empty", "cut", "utf8", "surrogate", "nan", "deep", "deeper", "digits", "string", "object"],
)
def test_bad_bodies(client, path, content, words):
    reply = client.post(path, content=content)
    assert reply.status_code == 400
    assert words in reply.json()["error"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["model", "text", "ids", "add_special", "options"]) | st.text(), inner)
        ),
        max_leaves=8,
    )
)
def test_whatever_json_is_sent_the_answer_is_400_or_404(client, body):
    for path in ("/api/tokenize", "/api/chat"):
        reply = client.post(path, content=json.dumps(body))
        assert reply.status_code in (400, 404)
        assert reply.json()["error"]


def test_too_large_a_body_is_413(client, monkeypatch):
    monkeypatch.setattr(requests, "MAX_BODY", 1000)
    reply = client.post("/api/tokenize", json={"model": "smollm2", "text": "a" * 1000})
    assert reply.status_code == 413
    assert "1000 bytes" in reply.json()["error"]


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", None])
def test_the_content_type_does_not_matter(client, kind):
    headers = {"content-type": kind} if kind else {}
    content = b'{"model": "smollm2", "text": "hello"}'
    assert client.post("/api/tokenize", content=content, headers=headers).status_code == 200


def test_verbs(client):
    ids = client.post("/api/tokenize", json={"model": "smollm2", "text": "Hello, world"}).json()["result"]
    back = client.post("/api/detokenize", json={"model": "smollm2", "ids": ids}).json()
    assert back == {"model": "smollm2", "result": "Hello, world"}
    score = client.post("/api/score", json={"model": "smollm2", "text": ids, "top_logprobs": 2}).json()["result"]
    assert [token["id"] for token in score["tokens"]] == ids
    assert score["total"] < 0 < score["perplexity"]
    assert [len(token["top"]) for token in score["tokens"]] == [0] + [2] * (len(ids) - 1)
    info = client.post("/api/info", json={"model": "smollm2", "num_ctx": 64}).json()["result"]
    assert (info["n_ctx"], info["d_model"]) == (64, 576)
    assert client.post("/api/reset", json={"model": "smollm2"}).json() == {"model": "smollm2", "result": None}


def test_respond_streams_tokens_and_then_the_result(client):
    body = {"model": "smollm2", "messages": "Hi!", "temperature": 0, "num_predict": 5, "top_logprobs": 1}
    *tokens, last = map(json.loads, client.post("/api/respond", json=body).text.splitlines())
    whole = client.post("/api/respond", json=body | {"stream": False}).json()
    assert len(tokens) == 5
    assert last["result"]["text"] == whole["result"]["text"] == "".join(token["text"] for token in tokens)
    assert [token["id"] for token in whole["result"]["tokens"]] == [token["id"] for token in tokens]
    assert last["result"]["finish_reason"] == "length"
    assert last["result"]["stats"]["tokens"] == 5


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"txt": "a"}, 'unknown option "txt"; did you mean text?'),
        ({"text": "a", "add_specials": True}, 'unknown option "add_specials"; did you mean add_special'),
        ({}, 'option "text" is missing'),
        ({"text": "a", "threads": 0}, 'option "threads" must be greater than or equal to 1, got 0'),
        ({"text": "a", "backend": "abacus"}, "option \"backend\" must be 'cpu', 'metal', 'mps' or 'cuda'"),
    ],
)
def test_a_mistake_in_a_field_is_named(client, body, words):
    reply = client.post("/api/tokenize", json={"model": "smollm2", **body})
    assert reply.status_code == 400
    assert words in reply.json()["error"]


def test_a_token_outside_the_vocabulary(client):
    for path, name in (("/api/detokenize", "ids"), ("/api/score", "text")):
        for token in (-1, 49152, 1 << 40):
            reply = client.post(path, json={"model": "smollm2", name: [1, token]})
            assert reply.status_code == 400
            assert str(token) in reply.json()["error"]


def stops(generation: Generation) -> None:
    deadline = time.monotonic() + 10
    while not generation.done:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert generation.finish_reason == "cancelled"
    count = generation.stats.tokens
    assert count < LONG["num_predict"]
    time.sleep(0.3)
    assert len(generation.tokens) <= count


def test_a_client_that_leaves_the_stream_ends_the_answer(client, made):
    with client.stream("POST", "/api/respond", json=LONG) as response:
        next(response.iter_lines())
        assert not made[0].done
    stops(made[0])


def test_a_client_that_leaves_while_it_waits_ends_the_answer(url, made):
    content = json.dumps(LONG | {"stream": False}).encode()
    address = urlsplit(url)
    with socket.create_connection((address.hostname or "", address.port or 0)) as connection:
        head = f"POST /api/respond HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        while not (made and made[0].partial_text):
            time.sleep(0.01)
    stops(made[0])


def test_close_ends_what_is_running(client, made):
    with client.stream("POST", "/api/respond", json=LONG) as response:
        lines = response.iter_lines()
        next(lines)
        assert client.post("/api/close", json={"model": "smollm2"}).status_code == 200
        assert json.loads([*lines][-1])["result"]["finish_reason"] == "cancelled"


def test_first_requests_at_the_same_time_open_one_session(url, monkeypatch):
    opened = []
    begin = Session.__init__

    def counted(self, *arguments, **options):
        opened.append(options["num_ctx"])
        time.sleep(0.2)
        begin(self, *arguments, **options)

    monkeypatch.setattr(Session, "__init__", counted)
    body = {"model": "smollm2", "text": "hi", "num_ctx": 123}
    with ThreadPoolExecutor(8) as pool:
        replies = pool.map(lambda _: httpx.post(f"{url}/api/tokenize", json=body, timeout=60), range(8))
        assert [reply.status_code for reply in replies] == [200] * 8
    assert opened == [123]


def raising(error: Exception):
    def open_session(*arguments, **options):
        raise error

    return open_session


def test_opening_is_tried_again_after_a_failure(client, monkeypatch):
    body = {"model": "smollm2", "text": "hi", "num_ctx": 321}
    with monkeypatch.context() as patch:
        patch.setattr(Session, "__init__", raising(ModelFileError("the file is damaged")))
        reply = client.post("/api/tokenize", json=body)
        assert (reply.status_code, reply.json()) == (500, {"error": "the file is damaged"})
    assert client.post("/api/tokenize", json=body).status_code == 200


def test_what_nobody_expected_is_logged_and_not_told(url, monkeypatch, caplog):
    monkeypatch.setattr(Session, "__init__", raising(ZeroDivisionError("a secret")))
    reply = httpx.post(f"{url}/api/tokenize", json={"model": "smollm2", "text": "hi", "num_ctx": 99})
    assert (reply.status_code, reply.json()) == (500, {"error": "internal error"})
    deadline = time.monotonic() + 10
    while "a secret" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_many_streams_hold_up_nothing_else(client, url, made):
    leave = threading.Event()

    def stream() -> None:
        with httpx.stream("POST", f"{url}/api/respond", json=LONG, timeout=60) as response:
            leave.wait(60)
            response.close()

    with ThreadPoolExecutor(80) as pool:
        waiting = [pool.submit(stream) for _ in range(80)]
        try:
            while len(made) < 80:
                time.sleep(0.01)
            began = time.monotonic()
            assert client.get("/api/health").status_code == 200
            assert client.post("/api/tokenize", json={"model": "smollm2", "text": "hi"}).status_code == 200
            assert time.monotonic() - began < 30  # half of what the answers wait for their clients
        finally:
            leave.set()
            for generation in made:
                generation.cancel()
            for future in waiting:
                future.exception()
