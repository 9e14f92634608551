import json
import logging
import math
from datetime import datetime
from typing import Any

import httpx
import pytest

from irkit import hub
from irkit.engine import Model
from irkit.errors import ContextFullError
from irkit.results import Generation, Token

ASK: dict[str, Any] = {"model": "smollm2", "options": {"seed": 7, "temperature": 0.7, "num_predict": 8}}
SHAPES = {
    "/api/generate": ({"prompt": "Name three colours."}, lambda reply: reply["response"]),
    "/api/chat": (
        {"messages": [{"role": "user", "content": "Name three colours."}]},
        lambda reply: reply["message"]["content"],
    ),
}
shapes = pytest.mark.parametrize("path", SHAPES)


def ask(client: httpx.Client, path: str, **more: Any) -> httpx.Response:
    return client.post(path, json=ASK | SHAPES[path][0] | more)


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.text.endswith("\n")
    return [json.loads(line) for line in response.text.removesuffix("\n").split("\n")]


@shapes
def test_the_same_seed_gives_the_same_text_streamed_or_not(client, path):
    text_of = SHAPES[path][1]
    *pieces, last = lines(ask(client, path))
    whole = ask(client, path, stream=False).json()
    assert len(pieces) > 1
    assert "".join(map(text_of, pieces)) == text_of(whole) != ""
    assert text_of(last) == ""
    assert [piece["done"] for piece in pieces] == [False] * len(pieces)
    assert last["done"] is whole["done"] is True


@shapes
def test_the_last_object_has_counts_and_times(client, path):
    reply = ask(client, path, stream=False).json()
    assert (reply["model"], reply["done_reason"], reply["eval_count"]) == ("smollm2", "length", 8)
    assert reply["prompt_eval_count"] > 8
    assert 0 < reply["eval_duration"] < reply["total_duration"]
    assert 0 < reply["prompt_eval_duration"] < reply["total_duration"] < 120e9
    assert reply["load_duration"] >= 0
    assert datetime.fromisoformat(reply["created_at"]).tzinfo


def test_generate_uses_the_chat_template_unless_raw(client):
    templated = ask(client, "/api/generate", stream=False).json()
    conversation = ask(client, "/api/chat", stream=False).json()
    raw = ask(client, "/api/generate", stream=False, raw=True).json()
    assert templated["response"] == conversation["message"]["content"] != raw["response"]
    assert templated["prompt_eval_count"] == conversation["prompt_eval_count"] > raw["prompt_eval_count"]
    told = ask(client, "/api/generate", stream=False, system="You are a very helpful pirate.").json()
    assert told["prompt_eval_count"] != templated["prompt_eval_count"]


def test_a_stop_string_ends_the_answer_before_it(client):
    options = {"num_predict": 12, "temperature": 0, "stop": " five"}
    reply = ask(client, "/api/generate", stream=False, raw=True, prompt="One, two, three,", options=options)
    assert reply.json()["done_reason"] == "stop"
    assert reply.json()["response"] == " four,"


@shapes
def test_logprobs_of_each_token(client, path):
    plain = ask(client, path, stream=False).json()
    assert "logprobs" not in plain
    reply = ask(client, path, stream=False, logprobs=True, top_logprobs=3).json()
    assert SHAPES[path][1](reply) == SHAPES[path][1](plain)
    assert len(reply["logprobs"]) == 8
    for entry in reply["logprobs"]:
        assert entry.keys() == {"token", "logprob", "bytes", "top_logprobs"}
        assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"]
        tops = [top["logprob"] for top in entry["top_logprobs"]]
        assert len(tops) == 3
        assert tops == sorted(tops, reverse=True)
        assert entry["logprob"] <= tops[0] + 1e-6 <= 1e-6
    streamed = [entry for line in lines(ask(client, path, logprobs=True)) for entry in line.get("logprobs", ())]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in reply["logprobs"]]
    assert [entry["top_logprobs"] for entry in streamed] == [[]] * 8


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"options": {"top_k": "many"}}, 'option "top_k" must be a valid integer'),
        ({"options": {"temperature": -1}}, 'option "temperature" must be greater than or equal to 0'),
        ({"options": {"num_ctx": 1}}, 'option "num_ctx" must be greater than or equal to 8'),
        ({"options": [1]}, 'option "options" must be a valid dictionary'),
        ({"prompt": 3}, 'option "prompt" must be a valid string'),
        ({"logprobs": True, "top_logprobs": 21}, 'option "top_logprobs" must be less than or equal to 20'),
        ({"format": "json"}, '"format" is not supported'),
        ({"images": ["aGk="]}, '"images" is not supported'),
        ({"model": "../../etc/passwd"}, "cannot be a model's name"),
        ({"model": ""}, "cannot be a model's name"),
        ({"options": {"num_ctx": 8}}, "the context holds 8"),
    ],
)
def test_bad_input_is_400_and_says_what(client, body, words):
    reply = ask(client, "/api/generate", **body)
    assert reply.status_code == 400
    assert words in reply.json()["error"]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hi", 'option "messages" must be a valid list'),
        ([1], 'option "messages.0" must be a valid dictionary'),
        ([{"content": "hi"}], "role"),
        ([{"role": "user"}], "content: is missing"),
        ([{"role": "user", "content": 5}], "content"),
        ([{"role": "user", "content": "x", "images": ["aGk="]}], "images are not supported"),
    ],
)
def test_a_bad_message_is_400_and_says_what(client, messages, words):
    reply = ask(client, "/api/chat", messages=messages)
    assert reply.status_code == 400
    assert words in reply.json()["error"]


def test_unknown_options_are_reported_but_not_refused(client, caplog):
    options = {"num_predict": 1, "mirostat": 1, "tfs_z": 1.0, "num_gpu": 99, "temprature": 1, "seed": None}
    with caplog.at_level(logging.WARNING, "irkit.server"):
        reply = ask(client, "/api/generate", stream=False, options=options)
    assert reply.json()["eval_count"] == 1
    assert caplog.messages == ["unknown options, left out: temprature"]


def test_what_ollamas_clients_send_besides_is_accepted(client):
    # ollama-python 0.6 sends these on every chat.
    more = {"tools": [], "think": None, "format": "", "keep_alive": "5m", "options": {"num_predict": 1}}
    assert ask(client, "/api/chat", stream=False, **more).status_code == 200


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat", "/api/embed", "/api/tokenize"])
def test_a_model_that_is_not_there(client, path):
    reply = client.post(path, json={"model": "nosuchmodel"} | ({"text": "x"} if path == "/api/tokenize" else {}))
    assert (reply.status_code, reply.json()) == (404, {"error": "model 'nosuchmodel' not found"})


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat"])
def test_an_empty_prompt_loads_and_unloads(client, path):
    loaded = client.post(path, json={"model": "smollm2"}).json()
    assert (loaded["done"], loaded["done_reason"]) == (True, "load")
    assert SHAPES[path][1](loaded) == ""
    unloaded = client.post(path, json={"model": "smollm2", "keep_alive": 0}).json()
    assert (unloaded["done"], unloaded["done_reason"]) == (True, "unload")
    assert ask(client, path, stream=False).json()["eval_count"] == 8


def test_embed(client):
    reply = client.post("/api/embed", json={"model": "smollm2", "input": ["a cat", "a dog", "a cat"]}).json()
    first, second, third = reply["embeddings"]
    assert len(first) == 576
    assert math.isclose(sum(x * x for x in first), 1, rel_tol=1e-4)
    assert first == pytest.approx(third, abs=1e-5)
    assert first != pytest.approx(second, abs=1e-3)
    assert reply["prompt_eval_count"] == 6
    assert reply["total_duration"] > 0
    one = client.post("/api/embed", json={"model": "smollm2", "input": "a cat", "options": {"normalize": False}})
    assert sum(x * x for x in one.json()["embeddings"][0]) > 2


def test_tags_and_delete(client, model_path, tmp_path, monkeypatch):
    monkeypatch.setenv("IRKIT_HOME", str(tmp_path))
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


def fails(tokens: int) -> Generation:
    generation = Generation()
    for _ in range(tokens):
        generation._put(Token(id=1, text="word ", logprob=-1.0))
    generation._fail(ContextFullError("the cupboard is full"))
    return generation


@pytest.mark.parametrize("stream", [True, False])
def test_an_error_before_the_first_byte_has_a_status(client, monkeypatch, stream):
    monkeypatch.setattr(Model, "generate", lambda *arguments, **options: fails(0))
    reply = ask(client, "/api/chat", stream=stream)
    assert (reply.status_code, reply.json()) == (400, {"error": "the cupboard is full"})


@pytest.mark.parametrize("path", ["/api/chat", "/api/respond"])
def test_an_error_after_the_first_byte_ends_the_stream(client, monkeypatch, path):
    monkeypatch.setattr(Model, "generate", lambda *arguments, **options: fails(2))
    reply = client.post(path, json={"model": "smollm2", **SHAPES["/api/chat"][0]})
    assert reply.status_code == 200
    *pieces, last = lines(reply)
    assert len(pieces) == 2
    assert last == {"error": "the cupboard is full"}
