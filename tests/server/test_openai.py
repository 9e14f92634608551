"""OpenAI's API as its own client sees it, and what that client does not show."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi.testclient import TestClient
from pydantic import BaseModel

import irkit
from irkit import hub
from irkit.engine import Model
from irkit.errors import BusyError, ContextFullError
from irkit.options import ServeOptions
from irkit.results import Generation, Token
from irkit.server import create_app
from irkit.server.places import Places
from irkit.tokenizer import from_gguf

CHAT: dict[str, Any] = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "Name three colours."}],
    "max_tokens": 8,
    "temperature": 0.7,
    "seed": 7,
}
TEXT: dict[str, Any] = {"model": "smollm2", "prompt": "One, two, three,", "max_tokens": 6, "temperature": 0}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Paris", "Rome"]}},
        },
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
TEMPLATE = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>
' }}{% endfor %}{% for tool in tools or [] %}{{ tool | tojson }} <tool_call>{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% if enable_thinking is not defined or enable_thinking %}{{ '<think>
' }}{% else %}{{ '<think></think>
' }}{% endif %}{% endif %}"""


@pytest.fixture(scope="module")
def api(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as api:
        yield api


@pytest.fixture
def tooled(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model whose template has a place for tools, and opens the thinking."""
    monkeypatch.setenv("IRKIT_HOME", str(tmp_path))
    return hub.create("tooled", model_path, template=TEMPLATE).name


def events(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    *parts, rest = response.text.split("\n\n")
    assert rest == ""
    return [part.removeprefix("data: ") if part == "data: [DONE]" else json.loads(part[6:]) for part in parts]


def test_models(api):
    assert "smollm2" in [model.id for model in api.models.list()]
    assert api.models.retrieve("smollm2").created > 1.7e9
    with pytest.raises(openai.NotFoundError) as caught:
        api.models.retrieve("nosuch")
    assert caught.value.code == "model_not_found"


def test_a_model_that_a_program_serves_is_listed(tiny_path):
    with irkit.Session(tiny_path) as session, session.serve(port=0) as served:
        listed = httpx.get(f"{served.url}/v1/models").json()["data"]
        assert [model["id"] for model in listed].count("tiny") == 1
        assert httpx.get(f"{served.url}/v1/models/tiny").json()["id"] == "tiny"
    with irkit.Session("smollm2") as session, session.serve(port=0) as served:
        listed = httpx.get(f"{served.url}/v1/models").json()["data"]
        assert [model["id"] for model in listed].count("smollm2") == 1


def test_chat_streams_what_it_says_whole(client):
    more = {"logprobs": True, "top_logprobs": 2, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, end = events(client.post("/v1/chat/completions", json=CHAT | more))
    whole = client.post("/v1/chat/completions", json=CHAT | more | {"stream": False}).json()
    assert end == "[DONE]"
    first, *pieces, last, counts = chunks
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert {chunk["id"] for chunk in chunks} == {first["id"]}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "length")
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    message = whole["choices"][0]["message"]
    assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces) == message["content"] != ""
    entries = [entry for piece in pieces for entry in piece["choices"][0]["logprobs"]["content"]]
    assert entries == whole["choices"][0]["logprobs"]["content"]
    assert len(entries) == 8
    assert all(
        bytes(entry["bytes"]).decode() == entry["token"] and len(entry["top_logprobs"]) == 2 for entry in entries
    )
    assert (counts["choices"], whole["object"]) == ([], "chat.completion")
    usage = whole["usage"]
    assert usage["completion_tokens"] == counts["usage"]["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1


def test_several_answers_are_those_of_the_next_seeds(api):
    several = api.chat.completions.create(**CHAT, n=3)
    texts = [choice.message.content for choice in several.choices]
    assert len({*texts}) > 1
    alone = [api.chat.completions.create(**CHAT | {"seed": 7 + i}) for i in range(3)]
    assert texts == [answer.choices[0].message.content for answer in alone]
    assert several.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert several.usage.completion_tokens == 24
    streamed = ["", "", ""]
    for chunk in api.chat.completions.create(**CHAT, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_several_answers_read_the_prompt_once(client, made):
    fresh = [{"role": "user", "content": "Which of these have I not asked yet?"}]
    client.post("/v1/chat/completions", json=CHAT | {"messages": fresh, "n": 3})
    reading, *answers = [generation.stats for generation in made]
    assert reading.cached_tokens < reading.prompt_tokens - 1
    assert [stats.cached_tokens for stats in answers] == [reading.prompt_tokens - 1] * 3


def test_log_probabilities_of_the_prompt(api, session):
    choice = api.completions.create(**TEXT | {"max_tokens": 2}, echo=True, logprobs=3).choices[0]
    scored = session.score(TEXT["prompt"], top_logprobs=3).tokens
    found = choice.logprobs
    assert choice.text.startswith(TEXT["prompt"])
    assert "".join(found.tokens) == choice.text
    assert found.tokens[: len(scored)] == [token.text for token in scored]
    assert found.token_logprobs[0] is found.top_logprobs[0] is None
    assert found.token_logprobs[1 : len(scored)] == pytest.approx([token.logprob for token in scored[1:]], abs=1e-6)
    assert [choice.text[start:].startswith(token) for start, token in zip(found.text_offset, found.tokens, strict=True)]
    assert found.text_offset[len(scored)] == len(TEXT["prompt"])
    for token, tops in zip(scored[1:], found.top_logprobs[1:], strict=False):
        assert max(tops.values()) == pytest.approx(token.top[0].logprob)
        assert tops[token.text] == pytest.approx(token.logprob)


def test_scoring_alone_makes_nothing(api, made):
    reply = api.completions.create(**TEXT | {"max_tokens": 0}, echo=True, logprobs=0)
    assert (reply.choices[0].text, made) == (TEXT["prompt"], [])
    assert (reply.usage.completion_tokens, reply.usage.prompt_tokens) == (0, len(reply.choices[0].logprobs.tokens))


def test_a_scored_prompt_is_not_read_again(client, api, made):
    prompt = "The quick brown fox, the lazy dog and the prompt that is scored"
    plain = api.completions.create(**TEXT | {"prompt": prompt})
    client.post("/api/reset", json={"model": "smollm2"})
    scored = api.completions.create(**TEXT | {"prompt": prompt}, echo=True, logprobs=1)
    assert scored.choices[0].text == prompt + plain.choices[0].text
    assert made[-1].stats.cached_tokens == made[-1].stats.prompt_tokens - 1
    assert scored.usage.prompt_tokens_details.cached_tokens == 0


def test_prompts_are_texts_or_token_ids_and_may_be_several(api, model_path):
    tokenizer = from_gguf(model_path)
    ids = [tokenizer.encode(text) for text in ("One, two, three,", "Red, green,")]
    by_ids = api.completions.create(**TEXT | {"prompt": ids}, n=2, echo=True)
    by_text = api.completions.create(**TEXT | {"prompt": ["One, two, three,", "Red, green,"]}, n=2, echo=True)
    texts = [choice.text for choice in by_ids.choices]
    assert [choice.index for choice in by_ids.choices] == [0, 1, 2, 3]
    assert texts == [choice.text for choice in by_text.choices]
    assert texts[0] == texts[1]
    assert texts[2].startswith("Red, green,")
    one = api.completions.create(**TEXT | {"prompt": ids[0]})
    assert by_ids.choices[0].text == "One, two, three," + one.choices[0].text


def test_completions_stream_what_they_say_whole(client):
    more = {"stream": True, "echo": True, "logprobs": 1, "prompt": ["One, two, three,", "It is €5"]}
    *chunks, end = events(client.post("/v1/completions", json=TEXT | more))
    whole = client.post("/v1/completions", json=TEXT | more | {"stream": False}).json()
    assert end == "[DONE]"
    for choice in whole["choices"]:
        pieces = [piece for chunk in chunks for piece in chunk["choices"] if piece["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        tokens = [token for piece in pieces if piece["logprobs"] for token in piece["logprobs"]["tokens"]]
        assert tokens == choice["logprobs"]["tokens"]
        assert [piece["finish_reason"] for piece in pieces][-2:] == [None, "length"]


def test_a_suffix_is_what_comes_after_the_gap(api, session, monkeypatch):
    tokenizer = session.model.tokenizer  # the server's too: the model is opened once
    monkeypatch.setattr(tokenizer, "_vocabulary", replace(tokenizer._vocabulary, fill_in_middle=(3, 4, 5)))
    around = api.completions.create(**TEXT, suffix="five")
    ids = tokenizer.encode_around(TEXT["prompt"], "five")
    assert around.choices[0].text == session.generate(ids, num_predict=6, temperature=0).text
    assert around.usage.prompt_tokens == len(ids)
    with pytest.raises(openai.BadRequestError, match='without "echo"'):
        api.completions.create(**TEXT, suffix="five", echo=True)


def test_without_max_tokens_a_completion_ends_where_openais_does(api):
    reply = api.completions.create(model="smollm2", prompt="a", temperature=0, logit_bias={"0": -100, "2": -100})
    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (16, "length")


def test_what_is_left_out_is_the_models_own(client, made, tooled, model_path):
    hub.create("calm", model_path, options={"temperature": 0, "num_predict": 3})
    body = {"model": "calm", "messages": CHAT["messages"]}
    first, second = (client.post("/v1/chat/completions", json=body).json() for _ in range(2))
    assert first["choices"][0]["message"] == second["choices"][0]["message"]
    client.post("/v1/completions", json={"model": "calm", "prompt": "One, two,"})
    assert [generation.stats.tokens for generation in made] == [3, 3, 3]


def test_stop_bias_and_options_of_irkit(api):
    stopped = api.completions.create(**TEXT | {"max_tokens": 12}, stop=[" six", "x"])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (" four, five,", "stop")
    (banned,) = from_gguf(hub.ensure("smollm2")).encode(" four")
    other = api.completions.create(**TEXT, logit_bias={str(banned): -100})
    assert not other.choices[0].text.startswith(" four")
    loud = TEXT | {"temperature": 1.0, "seed": 3}
    calm = api.completions.create(**loud, extra_body={"top_k": 1})
    assert calm.choices[0].text == api.completions.create(**TEXT).choices[0].text
    assert api.completions.create(**loud).choices[0].text != calm.choices[0].text


def test_embeddings(api, session):
    reply = api.embeddings.create(model="smollm2", input=["a cat", "a dog"])
    want = session.embed(["a cat", "a dog"])
    for item, vector in zip(reply.data, want, strict=True):
        assert item.embedding == pytest.approx(vector.tolist(), abs=1e-6)
    assert reply.usage.prompt_tokens == 4
    ids = api.embeddings.create(model="smollm2", input=session.tokenize("a cat"), encoding_format="float")
    assert ids.data[0].embedding == pytest.approx(want[0].tolist(), abs=1e-5)
    assert api.embeddings.create(model="smollm2", input="a", dimensions=576).data[0].index == 0
    with pytest.raises(openai.BadRequestError, match="must be 576"):
        api.embeddings.create(model="smollm2", input="a", dimensions=64)


class City(BaseModel):
    name: str
    country: str


def test_an_answer_of_a_given_form(api):
    about = CHAT | {"messages": [{"role": "user", "content": "Where is Rome?"}], "max_tokens": 80}
    parsed = api.chat.completions.parse(**about, response_format=City).choices[0].message.parsed
    assert isinstance(parsed, City)
    plain, formed = (
        api.chat.completions.create(**CHAT, response_format={"type": kind}) for kind in ("text", "json_object")
    )
    assert formed.choices[0].message.content.startswith("{")
    assert not plain.choices[0].message.content.startswith("{")


def test_a_tool_that_must_be_called(api, tooled):
    asked = CHAT | {"model": tooled, "tools": [TIME, WEATHER], "max_tokens": 60}
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        answer = api.chat.completions.create(**asked, tool_choice=choice).choices[0]
        (call,) = answer.message.tool_calls
        assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
        if call.function.name == "weather":
            assert json.loads(call.function.arguments) in [{"city": "Paris"}, {"city": "Rome"}]
    assert call.function.name == "weather"
    whole = api.chat.completions.create(**asked, tool_choice="none")
    assert whole.choices[0].message.tool_calls is None


def says(text: str) -> Generation:
    generation = Generation()
    for start in range(0, len(text), 3):
        generation._put(Token(id=1, text=text[start : start + 3], logprob=-1.0))
    generation._finish("stop", irkit.results.Stats(tokens=5))
    return generation


def test_calls_and_thoughts_are_told_apart_from_text(api, tooled, monkeypatch):
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    text = f"I should look.\n</think>\n\nOne moment. {call}\n{call}"
    monkeypatch.setattr(Model, "generate", lambda *arguments, **options: says(text))
    asked = CHAT | {"model": tooled, "tools": [WEATHER]}
    whole = api.chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content.strip() == "One moment."
    assert whole.message.reasoning_content.strip() == "I should look."
    assert [call.function.arguments for call in whole.message.tool_calls] == ['{"city": "Rome"}'] * 2
    with api.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0].message
    assert streamed.content == whole.message.content
    assert [call.function.name for call in streamed.tool_calls] == ["weather"] * 2
    assert len({call.id for call in streamed.tool_calls}) == 2
    single = api.chat.completions.create(**asked, parallel_tool_calls=False).choices[0].message
    assert len(single.tool_calls) == 1


def test_a_conversation_with_calls_goes_on(api, tooled):
    called = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        *CHAT["messages"],
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    assert api.chat.completions.create(**CHAT | {"model": tooled, "messages": messages, "tools": [WEATHER]}).choices
    bad = {**called, "function": {"name": "weather", "arguments": "{"}}
    with pytest.raises(openai.BadRequestError, match="not JSON"):
        api.chat.completions.create(**CHAT | {"messages": [messages[1], messages[2] | {"tool_calls": [bad]}]})


def test_thinking_is_apart_and_can_be_left_out(api, tooled):
    asked = CHAT | {"model": tooled}
    thought = api.chat.completions.create(**asked).choices[0].message
    assert (thought.content, bool(thought.reasoning_content)) == ("", True)
    for more in ({"reasoning_effort": "none"}, {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}):
        said = api.chat.completions.create(**asked, **more).choices[0].message
        assert said.content
        assert not hasattr(said, "reasoning_content")
    formed = api.chat.completions.create(**asked, response_format={"type": "json_object"}).choices[0].message
    assert formed.content.startswith("{")
    with pytest.raises(openai.BadRequestError, match="no thinking before"):
        api.chat.completions.create(**asked, response_format={"type": "json_object"}, reasoning_effort="low")
    with pytest.raises(openai.BadRequestError, match="does not support thinking"):
        api.chat.completions.create(**CHAT, reasoning_effort="high")


def test_captures(client):
    more = {"capture": {"names": "resid_post", "layers": -1, "reduce": "norm"}, "capture_format": "json"}
    edits = [{"op": "scale", "name": "resid_post", "factor": 1.0}]
    whole = client.post("/v1/chat/completions", json=CHAT | more | {"edits": edits}).json()["choices"][0]
    assert len(whole["captures"]) == 8
    (value,) = whole["captures"][0]["arrays"].values()
    assert value["values"][0][0] > 0
    *chunks, _ = events(client.post("/v1/completions", json=TEXT | more | {"stream": True}))
    assert sum("captures" in chunk["choices"][0] for chunk in chunks) == 6
    reply = client.post("/v1/completions", json=TEXT | {"capture": "nothing"})
    assert (reply.status_code, "nothing" in reply.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "words"),
    [
        ("chat/completions", {"model": "nosuchmodel"}, 404, None, "'nosuchmodel' not found"),
        ("chat/completions", {"model": None}, 400, "model", '"model" is missing'),
        ("chat/completions", {"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ("chat/completions", {"temprature": 1}, 400, "temprature", "did you mean temperature?"),
        ("chat/completions", {"max_completion_tokens": -7}, 400, "max_completion_tokens", "-1"),
        ("chat/completions", {"messages": []}, 400, None, "must not be empty"),
        ("chat/completions", {"n": 129}, 400, "n", "less than or equal to 128"),
        ("chat/completions", {"tools": [WEATHER]}, 400, "tools", "does not support tools"),
        ("chat/completions", {"tools": [{}]}, 400, "tools", "functions"),
        ("chat/completions", {"tool_choice": "required"}, 400, "tool_choice", "not among"),
        ("chat/completions", {"functions": [{}]}, 400, "functions", "not supported"),
        ("chat/completions", {"modalities": ["audio"]}, 400, "modalities", "'text'"),
        ("chat/completions", {"response_format": {"type": "json_schema"}}, 400, "response_format", "schema"),
        ("chat/completions", {"response_format": {"type": "json_object"}, "format": 3}, 400, "format", "schema"),
        ("chat/completions", {"chat_template_kwargs": {"x": True}}, 400, None, "enable_thinking"),
        ("chat/completions", {"num_ctx": 8}, 400, None, "the context holds 8"),
        ("completions", {"best_of": 3}, 400, "best_of", "not supported"),
        ("completions", {"suffix": "end"}, 400, "suffix", "does not support filling in"),
        ("completions", {"echo": True, "logprobs": 0, "edits": [{}]}, 400, "edits", "leave out"),
        ("completions", {"prompt": []}, 400, "prompt", "answers at once"),
        ("completions", {"prompt": ["a"] * 65, "n": 2}, 400, "prompt", "answers at once"),
        ("completions", {"prompt": [1, 99999]}, 400, None, "outside the vocabulary"),
        ("completions", {"logprobs": 21}, 400, "logprobs", "less than or equal to 20"),
        ("embeddings", {"input": []}, 400, "input", "must be a text"),
        ("embeddings", {"input": ["a", ""]}, 400, "input", "none that is empty"),
        ("embeddings", {"input": "a", "encoding_format": "hex"}, 400, "encoding_format", "'float' or 'base64'"),
    ],
)
def test_bad_requests(client, path, body, status, param, words):
    good = {"chat/completions": CHAT, "completions": TEXT, "embeddings": {"model": "smollm2", "input": "a"}}[path]
    reply = client.post(f"/v1/{path}", json=good | body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert words in error["message"]


def test_images_are_refused(api):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
    with pytest.raises(openai.BadRequestError, match='content of type "image_url" is not supported'):
        api.chat.completions.create(**CHAT | {"messages": [{"role": "user", "content": [image]}]})


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/none", 404), ("GET", "/v1/completions", 405)])
def test_errors_beside_the_routes_have_the_same_shape(client, method, path, status):
    reply = client.request(method, path)
    assert reply.status_code == status
    assert reply.json()["error"].keys() == {"message", "type", "param", "code"}


def test_errors_of_others_have_the_same_shape(client, monkeypatch):
    locked = TestClient(create_app(ServeOptions(api_key="secret")), base_url="http://localhost")
    refused = locked.get("/v1/models")
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    assert locked.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200

    def full(self):
        raise BusyError("the server is busy")

    monkeypatch.setattr(Places, "admit", full)
    busy = client.post("/v1/chat/completions", json=CHAT)
    assert (busy.status_code, busy.json()["error"]["type"]) == (503, "server_error")


def test_a_full_context_has_openais_code(client):
    reply = client.post("/v1/completions", json=TEXT | {"num_ctx": 8, "prompt": "word " * 20})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")


def fails(tokens: int) -> Generation:
    generation = Generation()
    for _ in range(tokens):
        generation._put(Token(id=1, text="word ", logprob=-1.0))
    generation._fail(ContextFullError("the cupboard is full"))
    return generation


def test_an_error_in_the_middle_of_a_stream_reaches_the_client(api, monkeypatch):
    monkeypatch.setattr(Model, "generate", lambda *arguments, **options: fails(2))
    with pytest.raises(openai.APIError, match="the cupboard is full") as caught:
        list(api.chat.completions.create(**CHAT, stream=True))
    assert caught.value.code == "context_length_exceeded"
    monkeypatch.setattr(Model, "generate", lambda *arguments, **options: fails(0))
    with pytest.raises(openai.BadRequestError, match="the cupboard is full"):
        api.chat.completions.create(**CHAT, stream=True)


def test_a_client_that_leaves_ends_all_its_answers(api, made):
    with api.chat.completions.create(**CHAT | {"max_tokens": 4000, "n": 3}, stream=True) as stream:
        next(iter(stream))
    for generation in made:
        assert generation.wait_for(30)
    assert [generation.finish_reason for generation in made[1:]] == ["cancelled"] * 3


def test_the_asynchronous_client(url):
    async def both() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as api:
            stream = await api.chat.completions.create(**CHAT, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            several = [api.chat.completions.create(**CHAT) for _ in range(3)]
            return [text, *(reply.choices[0].message.content for reply in await asyncio.gather(*several))]

    assert len({*asyncio.run(both())}) == 1
