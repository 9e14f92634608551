"""The routes that llama-server and vLLM have."""

import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from irkit import hub
from irkit.server import create_app

MODEL = {"model": "smollm2"}
TEXT = "Hello <|im_end|> 5€"


def test_tokens_there_and_back(client, session):
    plain = client.post("/tokenize", json=MODEL | {"content": TEXT, "parse_special": False}).json()["tokens"]
    assert plain == session.tokenize(TEXT, add_special=False)
    special = client.post("/tokenize", json=MODEL | {"content": TEXT}).json()
    assert special["tokens"] == session.tokenize(TEXT, add_special=False, parse_special=True)
    assert special["count"] == len(special["tokens"]) < len(plain)
    assert client.post("/detokenize", json=MODEL | {"tokens": special["tokens"]}).json()["content"] == TEXT
    vllm = {"prompt": TEXT, "add_special_tokens": False, "model": "smollm2"}
    assert client.post("/tokenize", json=vllm).json()["tokens"] == special["tokens"]


def test_pieces_are_text_or_bytes(client):
    pieces = client.post("/tokenize", json=MODEL | {"content": "a 🦙", "with_pieces": True}).json()["tokens"]
    assert pieces[0]["piece"] == "a"
    assert any(isinstance(piece["piece"], list) for piece in pieces)
    whole = [p["piece"].encode() if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces]
    assert b"".join(whole).decode() == "a 🦙"


def test_a_conversation_is_laid_out_as_the_model_reads_it(client, session):
    messages = [{"role": "user", "content": "Hi"}]
    text = client.post("/apply-template", json=MODEL | {"messages": messages}).json()["prompt"]
    assert text == session.render(messages)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    info = client.get("/tokenizer_info?model=smollm2").json()
    assert info["eos_token"] == "<|im_end|>"
    assert "<|im_start|>" in info["chat_template"]


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/tokenize", {}, 400, '"content" is missing'),
        ("/tokenize", {"content": 3}, 400, "valid string"),
        ("/tokenize", {"content": "a", "model": "nosuchmodel"}, 404, "not found"),
        ("/detokenize", {"tokens": [99999]}, 400, "99999"),
        ("/apply-template", {"messages": []}, 400, "must not be empty"),
        ("/apply-template", {"messages": "Hi", "tools": [{"name": "x"}]}, 400, "does not support tools"),
    ],
)
def test_bad_requests(client, path, body, status, words):
    reply = client.post(path, json=MODEL | body)
    assert reply.status_code == status
    assert words in reply.json()["error"]


def test_the_model_is_the_one_that_is_held(tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRKIT_HOME", str(tmp_path))
    with TestClient(create_app(), base_url="http://localhost") as client:
        none = client.post("/tokenize", json={"content": "he"})
        assert (none.status_code, "none yet" in none.json()["error"]) == (400, True)
        hub.add(tiny_path, "one")
        assert client.post("/tokenize", json={"content": "he"}).json()["count"] == 1
        hub.add(tiny_path, "other")
        assert client.post("/tokenize", json={"content": "he"}).status_code == 200
        assert client.post("/tokenize", json={"model": "other", "content": "he"}).status_code == 200
        several = client.post("/tokenize", json={"content": "he"})
        assert (several.status_code, "one, other" in several.json()["error"]) == (400, True)


def test_the_page_of_all_routes_needs_no_network(client):
    page = client.get("/docs").text
    used = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(used) >= 3
    for path in used:
        assert path.startswith("/")
        assert client.get(path).status_code == 200
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/api/chat", "/tokenize", "/metrics"} <= paths.keys()
