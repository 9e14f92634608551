import json
import logging
import math
from datetime import datetime
from typing import Any

import httpx
import pytest

from irkit.engine import Model
from irkit.errors import ContextFullError
from irkit.options import LoadOptions
from irkit.results import Generation, Token
from irkit.server.sessions import Sessions

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
        ({"options": {"top_k": "40"}}, 'option "top_k" must be of type integer'),
        ({"options": {"top_k": 1.5}}, 'option "top_k" must be of type integer'),
        ({"options": {"seed": True}}, 'option "seed" must be of type integer'),
        ({"options": {"num_ctx": "big"}}, 'option "num_ctx" must be of type integer'),
        ({"options": {"temperature": "hot"}}, 'option "temperature" must be of type float32'),
        ({"options": {"stop": 5}}, 'option "stop" must be of type array'),
        ({"options": {"stop": {"a": 1}}}, 'option "stop" must be of type array'),
        ({"options": {"stop": [5]}}, 'option "stop.0" must be a valid string'),
        ({"options": {"mirostat": "x"}}, 'option "mirostat" must be of type integer'),
        ({"options": {"num_gpu": "y"}}, 'option "num_gpu" must be of type integer'),
        ({"options": {"num_keep": 1.5}}, 'option "num_keep" must be of type integer'),
        ({"options": {"tfs_z": "1"}}, 'option "tfs_z" must be of type float32'),
        ({"options": {"use_mmap": 1}}, 'option "use_mmap" must be of type boolean'),
        ({"options": {"num_thread": "all"}}, 'option "num_thread" must be of type integer'),
        ({"options": {"temperature": -1}}, 'option "temperature" must be greater than or equal to 0'),
        ({"options": {"num_ctx": 1}}, 'option "num_ctx" must be greater than or equal to 8'),
        ({"options": [1]}, 'option "options" must be a valid dictionary'),
        ({"prompt": 3}, 'option "prompt" must be a valid string'),
        ({"logprobs": True, "top_logprobs": 21}, 'option "top_logprobs" must be less than or equal to 20'),
        ({"format": "xml"}, 'option "format'),
        ({"format": {"type": "nonsense"}}, "format"),
        ({"keep_alive": "soon"}, 'option "keep_alive": must be seconds, or a duration such as 10m or 1h30m'),
        ({"suffix": "x"}, "model 'smollm2' does not support insert"),
        ({"think": True}, "model 'smollm2' does not support thinking"),
        ({"think": "high"}, 'option "think": how much to think is not supported'),
        ({"raw": True, "system": "x"}, "raw mode does not support"),
        ({"template": "{{ range .Tools }}{{ . }}{{ end }}"}, "the template, a Go one, is beyond"),
        ({"template": "{% if %}"}, "template cannot be read"),
        ({"context": [1, -5]}, "token id -5 is outside the vocabulary"),
        ({"shift": True}, '"shift" is not supported'),
        ({"truncate": True}, '"truncate" is not supported'),
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


def test_a_template_and_a_context_of_the_request(client):
    prompt = {"options": {"num_predict": 3, "temperature": 0}, "stream": False, "prompt": "One, two,"}
    plain = ask(client, "/api/generate", raw=True, **prompt).json()
    for template in ("{{ .Prompt }}", "{{ messages[0].content }}"):
        assert ask(client, "/api/generate", template=template, **prompt).json()["response"] == plain["response"]
    assert "context" not in plain
    first = ask(client, "/api/generate", **prompt).json()
    assert len(first["context"]) == first["prompt_eval_count"] + first["eval_count"]
    second = ask(client, "/api/generate", **prompt | {"prompt": "And?", "context": first["context"]}).json()
    assert second["context"][: len(first["context"])] == first["context"]
    assert second["prompt_eval_count"] > len(first["context"])


@shapes
@pytest.mark.parametrize("stream", [True, False])
def test_format(client, path, stream):
    schema = {"type": "object", "properties": {"sky": {"enum": ["blue", "grey"]}}, "required": ["sky"]}
    schema["additionalProperties"] = False
    reply = ask(client, path, format=schema, stream=stream, options={"temperature": 0, "num_predict": 64})
    text = "".join(map(SHAPES[path][1], lines(reply) if stream else [reply.json()]))
    assert json.loads(text)["sky"] in ("blue", "grey")
    as_json = ask(client, path, format="json", stream=False, options={"temperature": 0, "num_predict": 256})
    assert SHAPES[path][1](as_json.json()).lstrip().startswith("{")


def test_unknown_options_are_reported_but_not_refused(client, caplog):
    options = {"num_predict": 1, "mirostat": 1, "tfs_z": 1.0, "num_gpu": 99, "temprature": 1, "seed": None}
    with caplog.at_level(logging.WARNING, "irkit.server"):
        reply = ask(client, "/api/generate", stream=False, options=options)
    assert reply.json()["eval_count"] == 1
    assert caplog.messages == ["unknown options, left out: temprature"]


def test_unknown_fields_are_reported_once_each(client, caplog):
    with caplog.at_level(logging.WARNING, "irkit.server"):
        for more in ({"promt": "a"}, {"promt": "b", "colour": 1, "think": None}, {"colour": 2}):
            assert client.post("/api/show", json={"model": "smollm2", **more}).status_code == 200
        assert client.post("/api/create", json={"from": "smollm2", "quantize": "q4_0"}).status_code == 400
    assert caplog.messages == ["unknown fields, left out: promt", "unknown fields, left out: colour"]


def test_not_every_name_that_is_sent_is_kept(client, monkeypatch, caplog):
    told = set[str]()
    monkeypatch.setattr("irkit.server.ollama.requests._told", told)
    monkeypatch.setattr("irkit.server.ollama.requests._MOST_TOLD", 2)
    with caplog.at_level(logging.WARNING, "irkit.server"):
        for number in range(4):
            client.post("/api/show", json={"model": "smollm2", f"x{number}" * 100: 1})
    assert [len(name) for name in told] == [80, 80]
    assert len(caplog.messages) == 2


def test_num_thread_is_how_many_threads_compute(client, monkeypatch):
    asked = []
    get = Sessions.get

    def seen(self, model, options, **more):
        asked.append(options.threads)
        return get(self, model, LoadOptions(), **more)  # whatever it is, the test takes no other weights

    monkeypatch.setattr(Sessions, "get", seen)
    for options in ({"num_thread": 3}, {"num_thread": 0}, {"num_thread": 3.0, "threads": 2}, {}):
        options |= {"num_predict": 1}
        assert ask(client, "/api/generate", stream=False, options=options).status_code == 200
    assert asked == [3, None, 2, None]
    assert client.post("/api/embed", json={"model": "smollm2", "input": "a", "options": {"num_thread": 2}}).is_success
    assert asked[-1] == 2
    reply = ask(client, "/api/generate", stream=False, options={"num_thread": 5000})
    assert reply.json()["error"].startswith('option "threads" must be less than or equal to 1024')


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
    long = one.json()["embeddings"][0]
    assert sum(x * x for x in long) > 2
    old = client.post("/api/embeddings", json={"model": "smollm2", "prompt": "a cat"}).json()
    assert old["embedding"] == pytest.approx(long, rel=1e-4, abs=1e-4)
    assert client.post("/api/embeddings", json={"model": "smollm2"}).json() == {"embedding": []}
    short = client.post("/api/embed", json={"model": "smollm2", "input": "a cat", "dimensions": 16}).json()
    (vector,) = short["embeddings"]
    assert vector == pytest.approx([x / math.sqrt(sum(y * y for y in first[:16])) for x in first[:16]], abs=1e-5)


def test_a_chat_that_does_not_fit_is_cut_by_turns_where_that_is_asked_for(client):
    system = {"role": "system", "content": "You are terse."}
    turns = [
        [{"role": "user", "content": f"{number} {'word ' * 20}"}, {"role": "assistant", "content": "ok " * 20}]
        for number in range(6)
    ]
    last = {"role": "user", "content": "Name three colours."}

    def chat(messages: list[Any], size: int, **more: Any) -> httpx.Response:
        options = ASK["options"] | {"num_ctx": size}
        return client.post("/api/chat", json=ASK | {"messages": messages, "options": options, "stream": False} | more)

    def said(*kept: list[Any]) -> list[Any]:
        return [system, *(message for turn in kept for message in turn), last]

    lengths = [chat(said(*turns[6 - n :]), 512).json()["prompt_eval_count"] for n in range(7)]
    for size, n in ((lengths[6] + 1, 6), (lengths[6], 5), (lengths[2] + 1, 2), (lengths[2], 1), (lengths[0] + 1, 0)):
        cut = chat(said(*turns), size, truncate=True).json()
        assert cut["prompt_eval_count"] == lengths[n]
        assert cut["message"] == chat(said(*turns[6 - n :]), size).json()["message"]
    for size, more in ((lengths[6], {}), (lengths[6], {"truncate": False}), (lengths[0], {"truncate": True})):
        reply = chat(said(*turns), size, **more)
        assert reply.status_code == 400
        assert f"the context holds {size}" in reply.json()["error"]


def test_what_embed_cannot_do(client):
    for body, words in [
        ({"dimensions": 577}, 'option "dimensions" must be 576 or less, got 577'),
        ({"dimensions": 0}, 'option "dimensions" must be greater than or equal to 1'),
        ({"input": "word " * 40}, "the context holds 16"),
    ]:
        reply = client.post("/api/embed", json={"model": "smollm2", "input": "x", "options": {"num_ctx": 16}} | body)
        assert reply.status_code == 400
        assert words in reply.json()["error"]
    cut = {"model": "smollm2", "input": "word " * 40, "options": {"num_ctx": 16}, "truncate": True}
    assert client.post("/api/embed", json=cut).json()["prompt_eval_count"] == 16


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
