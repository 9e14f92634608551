"""Thinking and calls of tools, in the answers of models that are made to give them."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import ollama
import pytest
from langchain_ollama import ChatOllama

from irkit import hub
from irkit.session import Session

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
        },
    }
]
TEMPLATE = """{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}
{%- if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{% if m.reasoning_content %}({{ m.reasoning_content }})
{%- endif %}{% if m.name %}[{{ m.name }}]{% endif %}
{% endfor %}{{ START }}"""
FORMS = {
    "hermes": ("<|hermes|>", "<tool_call></tool_call>"),
    "mistral": ("<|mistral|>", "[TOOL_CALLS]"),
    "llama": ("<|llama|>", '<|python_tag|>"parameters"'),
    "thinks": ("<|thinks|>", "<think></think>"),
    "opened": ("[THINK]", "[/THINK]"),
    "stubborn": ("</think>", "<think>"),
    "plain": ("<|plain|>", "<tool_call>"),
}
"""What the prompt of each model ends with, and what its template has in it."""
SAYINGS = {
    "<|hermes|>": [
        "Let me", " see.", "<tool_call>", '\n{"name": "add", "arg', 'uments": {"a": 1, "b": 2}}', "\n</tool_call>"
    ],
    "<|mistral|>": ["[TOOL_CALLS]", '[{"name": "add", ', '"arguments": {"a": 1, "b": 2}}]'],
    "<|llama|>": ["<|python_tag|>", '{"name": "add", "para', 'meters": {"a": 1, "b": 2}}'],
    "<|thinks|>": ["<think>", "\nHm", ", two.", "\n</think>", "\n\nIt is ", "two."],
    "[THINK]": ["\nHm, ", "four.\n", "[/THINK]", "\nIt is four."],
    "</think>": ["<thi", "nk>Hm", "</thi", "nk>", " No."],
    "<|plain|>": ["<tool", "s> are ", "fine."],
}  # fmt: skip
CALL = {"name": "add", "arguments": {"a": 1, "b": 2}}
ASK: list[dict[str, Any]] = [{"role": "user", "content": "One and one?"}]


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory: pytest.TempPathFactory, write_sayings) -> Iterator[None]:
    """A registry of models, one for each saying."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IRKIT_HOME", str(folder))
        control = ("[TOOL_CALLS]", "<|python_tag|>", "<think>", "[/THINK]")
        path = write_sayings(folder / "sayings.gguf", SAYINGS, control)
        for name, (start, form) in FORMS.items():
            hub.create(name, path, template=TEMPLATE.replace("START", f"'{start}'") + f"{{#- {form} -#}}")
        yield


def chat(client: httpx.Client, model: str, **more: Any) -> dict[str, Any]:
    """The whole answer, which is the same streamed or not."""
    body = {"model": model, "messages": ASK, **more}
    reply = client.post("/api/chat", json=body | {"stream": False})
    assert reply.status_code == 200, reply.text
    whole = reply.json()["message"]
    *pieces, last = map(json.loads, client.post("/api/chat", json=body).text.splitlines())
    assert last["message"] == {"role": "assistant", "content": ""}
    assert last["done_reason"] == "stop"
    messages = [piece["message"] for piece in pieces]
    streamed: dict[str, Any] = {"role": "assistant", "content": "".join(m["content"] for m in messages)}
    if thinking := "".join(m.get("thinking", "") for m in messages):
        streamed["thinking"] = thinking
    if calls := [call for m in messages for call in m.get("tool_calls", ())]:
        streamed["tool_calls"] = calls
    for call in [*whole.get("tool_calls", ()), *streamed.get("tool_calls", ())]:
        assert call.pop("id").startswith("call_")
    assert streamed == whole
    return whole


@pytest.mark.parametrize(("model", "said"), [("hermes", "Let me see."), ("mistral", ""), ("llama", "")])
def test_calls_of_tools(client, model, said):
    answer = chat(client, model, tools=TOOLS)
    assert answer == {"role": "assistant", "content": said, "tool_calls": [{"function": CALL}]}


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def test_clients_see_the_calls_and_the_thinking(url):
    answer = ollama.Client(url).chat("hermes", ASK, tools=[add])
    assert answer.message.content == "Let me see."
    calls = [(call.function.name, call.function.arguments) for call in answer.message.tool_calls or ()]
    assert calls == [("add", {"a": 1, "b": 2})]
    assert ollama.Client(url).chat("thinks", ASK, think=True).message.thinking == "Hm, two."
    said = ChatOllama(model="mistral", base_url=url).bind_tools([add]).invoke("One and one?")
    assert [(call["name"], call["args"]) for call in said.tool_calls] == [("add", {"a": 1, "b": 2})]
    thought = ChatOllama(model="thinks", base_url=url, reasoning=True).invoke("One and one?")
    assert thought.additional_kwargs["reasoning_content"] == "Hm, two."
    assert thought.content == "It is two."


def test_without_tools_a_call_is_text(client):
    assert chat(client, "hermes")["content"] == "".join(SAYINGS["<|hermes|>"])
    assert chat(client, "hermes", tools=[])["content"] == "".join(SAYINGS["<|hermes|>"])


def test_text_that_only_looks_like_a_call(client):
    assert chat(client, "plain", tools=TOOLS)["content"] == "<tools> are fine."


@pytest.mark.parametrize(
    ("model", "thought", "said"), [("thinks", "Hm, two.", "It is two."), ("opened", "Hm, four.", "It is four.")]
)
def test_thinking_is_told_from_the_answer(client, model, thought, said):
    for think in ({}, {"think": True}):
        assert chat(client, model, **think) == {"role": "assistant", "content": said, "thinking": thought}
    body = {"model": model, "prompt": "One and one?", "stream": False}
    reply = client.post("/api/generate", json=body).json()
    assert (reply["response"], reply["thinking"]) == (said, thought)
    *pieces, last = map(json.loads, client.post("/api/generate", json=body | {"stream": True}).text.splitlines())
    assert "".join(piece["response"] for piece in pieces) == said
    assert "".join(piece.get("thinking", "") for piece in pieces) == thought
    assert last["response"] == ""


def test_not_to_think_is_an_empty_thought_in_the_prompt():
    with Session("thinks") as session, Session("opened") as opened:
        for asked, thought in ((session, "<think>\n\n</think>\n\n"), (opened, "[THINK]\n\n[/THINK]\n\n")):
            prompt = asked.detokenize(asked.respond("Hi", think=False, num_predict=0).prompt)
            assert prompt.endswith(thought)
        assert session.respond("Hi", num_predict=0).prompt != session.respond("Hi", think=False, num_predict=0).prompt


def test_an_answer_of_a_given_form_is_not_thought_about(monkeypatch, client):
    told: list[Any] = []
    respond = Session.respond

    def watched(self, *arguments, **options):
        told.append(options["think"])
        return respond(self, *arguments, **options)

    monkeypatch.setattr(Session, "respond", watched)
    body = {"model": "thinks", "messages": ASK, "format": "json", "stream": False, "options": {"num_predict": 2}}
    for asked in (body, body | {"format": ""}, body | {"format": "", "think": True}):
        assert client.post("/api/chat", json=asked).status_code == 200
    assert told == [False, None, True]


def test_one_that_thinks_though_it_was_not_to_is_not_heard(client):
    assert chat(client, "stubborn") == {"role": "assistant", "content": "No.", "thinking": "Hm"}
    assert chat(client, "stubborn", think=False) == {"role": "assistant", "content": "No."}


def test_what_a_template_is_given_of_earlier_turns():
    with Session("hermes") as session:
        turn = {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}], "reasoning_content": "Hm."}
        prompt = session.detokenize(session.respond([*ASK, turn], TOOLS, num_predict=0).prompt)
        assert '"name": "add", "description"' in prompt
        assert f"assistant: {json.dumps([{'function': CALL}])}(Hm.)" in prompt


def test_ollamas_names_are_those_of_templates(client, monkeypatch):
    seen: list[Any] = []
    respond = Session.respond

    def watched(self, messages, *arguments, **options):
        seen.extend(messages)
        return respond(self, messages, *arguments, **options)

    monkeypatch.setattr(Session, "respond", watched)
    turns = [
        {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": [{"function": CALL}], "images": None},
        {"role": "tool", "content": "3", "tool_name": "add"},
    ]
    chat(client, "hermes", messages=[*ASK, *turns], tools=TOOLS)
    assert seen[1:3] == [
        {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [{"function": CALL}]},
        {"role": "tool", "content": "3", "name": "add"},
    ]


@pytest.mark.parametrize(
    ("model", "body", "words"),
    [
        ("thinks", {"tools": TOOLS}, "model 'thinks' does not support tools"),
        ("hermes", {"think": True}, "model 'hermes' does not support thinking"),
        ("hermes", {"tools": [1]}, 'option "tools.0"'),
        ("opened", {"think": True, "format": "json"}, '"think" does not go with "format"'),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_what_a_model_cannot_do_is_said(client, model, body, words, stream):
    if model == "thinks":
        hub.create("thinks", "thinks", template="{% for m in messages %}{{ m.content }}{% endfor %}{#- </think> -#}")
    reply = client.post("/api/chat", json={"model": model, "messages": ASK, "stream": stream, **body})
    assert reply.status_code == 400
    assert words in reply.json()["error"]


def test_what_fills_a_gap(client, write_model, tmp_path):
    tokens = {"<fim_prefix>": 3, "<fim_suffix>": 3, "<fim_middle>": 3}
    hub.create("fills", write_model(tmp_path / "fills.gguf", more=tokens))
    with Session("fills") as session:
        tokenizer = session.model.tokenizer
        ids = tokenizer.encode_around("he", "!")
        assert tokenizer.decode(ids, skip_special=False) == "<fim_prefix>he<fim_suffix>!<fim_middle>"
        want = session.generate(ids, temperature=0, num_predict=3).text
    body = {"model": "fills", "prompt": "he", "suffix": "!", "stream": False}
    reply = client.post("/api/generate", json=body | {"options": {"temperature": 0, "num_predict": 3}}).json()
    assert (reply["prompt_eval_count"], reply["response"]) == (5, want)
