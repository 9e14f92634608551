"""The routes that llama-server and vLLM have."""

import re

import pytest

TEXT = "Hello <|im_end|> 5€"


def test_tokens_there_and_back(client, session):
    plain = client.post("/tokenize", json={"content": TEXT, "parse_special": False}).json()["tokens"]
    assert plain == session.tokenize(TEXT, add_special=False)
    special = client.post("/tokenize", json={"content": TEXT}).json()
    assert special["tokens"] == session.tokenize(TEXT, add_special=False, parse_special=True)
    assert special["count"] == len(special["tokens"]) < len(plain)
    assert client.post("/detokenize", json={"tokens": special["tokens"]}).json()["content"] == TEXT
    vllm = {"prompt": TEXT, "add_special_tokens": False, "model": "smollm2"}
    assert client.post("/tokenize", json=vllm).json()["tokens"] == special["tokens"]


def test_pieces_are_text_or_bytes(client):
    pieces = client.post("/tokenize", json={"content": "a 🦙", "with_pieces": True}).json()["tokens"]
    assert pieces[0]["piece"] == "a"
    assert any(isinstance(piece["piece"], list) for piece in pieces)
    whole = [p["piece"].encode() if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces]
    assert b"".join(whole).decode() == "a 🦙"


def test_a_conversation_is_laid_out_as_the_model_reads_it(client, session):
    messages = [{"role": "user", "content": "Hi"}]
    text = client.post("/apply-template", json={"messages": messages}).json()["prompt"]
    assert text == session.render(messages)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    info = client.get("/tokenizer_info").json()
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
    reply = client.post(path, json=body)
    assert reply.status_code == status
    assert words in reply.json()["error"]


def test_the_page_of_all_routes_needs_no_network(client):
    page = client.get("/docs").text
    used = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(used) >= 3
    for path in used:
        assert path.startswith("/")
        assert client.get(path).status_code == 200
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/api/chat", "/tokenize", "/metrics"} <= paths.keys()
