"""Ollama's own clients, and LangChain's, against the running server on the real model."""

import asyncio
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ollama
import pytest
from langchain_ollama import ChatOllama, OllamaEmbeddings

from irkit import hub

OPTIONS: dict[str, Any] = {"temperature": 0, "num_predict": 6, "seed": 1}
MESSAGES = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Iterator[None]:
    """A registry of its own, with the real model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IRKIT_HOME", str(tmp_path_factory.mktemp("home")))
        hub.add(model_path, "smollm2")
        yield


@pytest.fixture(scope="module")
def python(url: str) -> ollama.Client:
    return ollama.Client(url)


def test_chat_and_generate(python: ollama.Client) -> None:
    whole = python.chat("smollm2", MESSAGES, options=OPTIONS)
    assert (whole.done, whole.done_reason, whole.eval_count) == (True, "length", 6)
    assert whole.message.role == "assistant"
    pieces = [*python.chat("smollm2", MESSAGES, options=OPTIONS, stream=True)]
    assert "".join(piece.message.content or "" for piece in pieces) == whole.message.content != ""
    assert pieces[-1].done
    answer = python.generate("smollm2", "Name three colours.", options=OPTIONS, logprobs=True, top_logprobs=2)
    assert answer.response == whole.message.content
    assert len(answer.logprobs or ()) == 6
    streamed = [*python.generate("smollm2", "Name three colours.", options=OPTIONS, stream=True, keep_alive="2m")]
    assert "".join(piece.response or "" for piece in streamed) == answer.response
    assert streamed[-1].context
    more = python.generate("smollm2", "And?", context=streamed[-1].context, options=OPTIONS)
    assert (more.prompt_eval_count or 0) > len(streamed[-1].context)


def test_format(python: ollama.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    answer = python.chat("smollm2", MESSAGES, format=schema, options=OPTIONS | {"num_predict": 40})
    assert json.loads(answer.message.content or "")["colour"] in ("red", "blue")


def test_embed(python: ollama.Client) -> None:
    several = python.embed("smollm2", ["a cat", "a dog"])
    assert [len(vector) for vector in several.embeddings] == [576, 576]
    assert len(python.embeddings("smollm2", "a cat").embedding) == 576


def test_models_come_and_go(python: ollama.Client, model_path: Path) -> None:
    digest = python.create_blob(model_path)
    assert python.create("made", files={"m.gguf": digest}, system="Be brief.").status == "success"
    steps = [*python.create("pirate", from_="made", parameters={"num_predict": 2}, stream=True)]
    assert steps[-1].status == "success"
    assert python.copy("pirate", "captain").status == "success"
    assert {model.model for model in python.list().models} == {"smollm2", "made", "pirate", "captain"}
    shown = python.show("captain")
    assert shown.capabilities == ["completion"]
    assert (shown.modelinfo or {})["llama.context_length"] == 8192
    assert shown.parameters == f"{'num_predict':<30} 2"
    assert python.generate("captain", "Hi").eval_count == 2
    running = {model.model: model for model in python.ps().models}
    assert running["captain"].context_length == 8192
    assert running["captain"].expires_at is not None
    for name in ("made", "pirate", "captain"):
        assert python.delete(name).status == "success"
    assert python.pull("smollm2").status == "success"
    assert [step.status for step in python.pull("smollm2", stream=True)][-1] == "success"


def test_errors(python: ollama.Client) -> None:
    for call, status, words in [
        (lambda: python.chat("nosuch", MESSAGES), 404, "model 'nosuch' not found"),
        (lambda: [*python.chat("nosuch", MESSAGES, stream=True)], 404, "model 'nosuch' not found"),
        (lambda: python.chat("smollm2", MESSAGES, options={"top_k": "x"}), 400, "must be of type integer"),
        (lambda: python.chat("smollm2", MESSAGES, tools=[add]), 400, "does not support tools"),
        (lambda: python.chat("smollm2", MESSAGES, think=True), 400, "does not support thinking"),
        (lambda: python.generate("smollm2", "a", suffix="b"), 400, "does not support insert"),
        (lambda: python.show("nosuch"), 404, "not found"),
        (lambda: python.delete("nosuch"), 404, "not found"),
        (lambda: python.copy("nosuch", "x"), 404, "not found"),
        (lambda: [*python.pull("no such", stream=True)], 400, "cannot be pulled"),
    ]:
        with pytest.raises(ollama.ResponseError, match=words) as caught:
            call()
        assert caught.value.status_code == status


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def test_the_asynchronous_client(url: str, python: ollama.Client) -> None:
    async def ask() -> tuple[str, str, list[str]]:
        client = ollama.AsyncClient(url)
        whole = await client.chat("smollm2", MESSAGES, options=OPTIONS)
        pieces = await client.generate("smollm2", "Name three colours.", options=OPTIONS, stream=True)
        text = "".join([piece.response or "" async for piece in pieces])
        assert (await client.show("smollm2")).capabilities == ["completion"]
        assert len((await client.embed("smollm2", "a cat")).embeddings[0]) == 576
        names = [model.model or "" for model in (await client.ps()).models]
        with pytest.raises(ollama.ResponseError, match="not found"):
            await client.generate("nosuch", "x")
        # One that goes away in the middle, and the next is answered as if nothing had been.
        async for _ in await client.generate("smollm2", "Count to one thousand.", stream=True):
            break
        return whole.message.content or "", text, names

    whole, text, names = asyncio.run(ask())
    assert whole == text == python.chat("smollm2", MESSAGES, options=OPTIONS).message.content
    assert "smollm2" in names


def test_langchain(url: str) -> None:
    model = ChatOllama(model="smollm2", base_url=url, temperature=0, num_predict=6, seed=1, validate_model_on_init=True)
    answer = model.invoke("Name three colours.")
    assert answer.response_metadata["done_reason"] == "length"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 6
    assert "".join(str(piece.content) for piece in model.stream("Name three colours.")) == answer.content != ""
    embeddings = OllamaEmbeddings(model="smollm2", base_url=url)
    (first, second), query = embeddings.embed_documents(["a cat", "a dog"]), embeddings.embed_query("a cat")
    assert query == pytest.approx(first, abs=1e-5)
    assert query != pytest.approx(second, abs=1e-3)
    with pytest.raises(ollama.ResponseError, match="not found"):
        ChatOllama(model="nosuch", base_url=url).invoke("Hi")


NODE = """
import { Ollama } from 'ollama'
const ollama = new Ollama({ host: process.argv[2] })
const ask = { model: 'smollm2', messages: [{ role: 'user', content: 'Name three colours.' }],
              options: { temperature: 0, num_predict: 6, seed: 1 } }
const whole = await ollama.chat(ask)
let text = ''
for await (const piece of await ollama.chat({ ...ask, stream: true })) text += piece.message.content
const shown = await ollama.show({ model: 'smollm2' })
const { embeddings } = await ollama.embed({ model: 'smollm2', input: 'a cat' })
let error
try { await ollama.chat({ ...ask, model: 'nosuch' }) } catch (caught) { error = caught.message }
for await (const step of await ollama.create({ model: 'made', from: 'smollm2', system: 'Hm.', stream: true })) {}
await ollama.copy({ source: 'made', destination: 'copied' })
const models = (await ollama.list()).models.map(model => model.name)
await ollama.delete({ model: 'made' })
await ollama.delete({ model: 'copied' })
const pulled = await ollama.pull({ model: 'smollm2' })
const running = (await ollama.ps()).models.map(model => model.name)
console.log(JSON.stringify([whole.message.content === text, text, shown.capabilities, embeddings[0].length, error,
                            models, pulled.status, running.includes('smollm2')]))
"""


@pytest.mark.slow
def test_the_javascript_client(url: str, tmp_path: Path) -> None:
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "ollama"], cwd=tmp_path, check=True, timeout=200)
    script = tmp_path / "ask.mjs"
    script.write_text(NODE)
    done = subprocess.run(["node", script, url], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    same, text, capabilities, length, error, models, status, running = json.loads(done.stdout)
    assert (same, capabilities, length, status, running) == (True, ["completion"], 576, "success", True)
    assert text
    assert error == "model 'nosuch' not found"
    assert sorted(models) == ["copied", "made", "smollm2"]
