"""Large replies are written beside the loop, and let it go on."""

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from irkit import hub
from irkit.server import create_app, replies

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=30)
LARGE = {
    "rows": np.random.default_rng(0).normal(size=(100, 100, 100)).tolist(),
    "row": list(range(1_000_000)),
    "text": 'a"é😀\n' * 1_000_000,
    "tokens": [{"id": n, "text": "a", "top": [{"id": n, "logprob": -1.5}] * 20} for n in range(5000)],
}
CAPTURES = {"capture": "resid_post", "capture_format": "json"}
MESSAGES = [{"role": "user", "content": "hi"}]
ASKS: list[tuple[str, dict[str, Any]]] = [
    ("/api/trace", {"texts": "hi", "format": "json"}),
    ("/api/trace", {"texts": "hi"}),
    ("/api/score", {"text": "hi"}),
    ("/api/respond", {"messages": "hi", "num_predict": 2, "stream": False}),
    ("/api/respond", {"messages": "hi", "num_predict": 2, **CAPTURES}),
    ("/api/generate", {"prompt": "hi", "options": {"num_predict": 2}, "stream": False, **CAPTURES}),
    ("/api/chat", {"messages": MESSAGES, "options": {"num_predict": 2}, **CAPTURES}),
    ("/api/embed", {"input": ["hi", "there"]}),
    ("/api/embeddings", {"prompt": "hi"}),
    ("/api/show", {"verbose": True}),
    ("/v1/embeddings", {"input": ["hi", "there"]}),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, "stream": True, **CAPTURES}),
    ("/v1/completions", {"prompt": "hi", "max_tokens": 2, "echo": True, "logprobs": 2}),
    ("/tokenize", {"content": "hi", "with_pieces": True}),
    ("/detokenize", {"tokens": [72, 105]}),
]


@pytest.mark.parametrize("size", [1, 3])
@given(value=VALUES)
def test_what_is_written_in_parts_is_what_json_writes(size: int, value: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replies, "_PART", size)
        found = b"".join(replies.parts(value)).decode()
    assert found == json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@pytest.mark.parametrize("kind", LARGE)
def test_no_part_is_large(kind: str) -> None:
    """Nothing else runs while one is written, in whichever thread."""
    parts = [*replies.parts({"model": "tiny", "result": [LARGE[kind]]})]
    assert max(map(len, parts)) < 1 << 18
    assert json.loads(b"".join(parts))["result"] == [LARGE[kind]]


@pytest.fixture(scope="module")
def app(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    folder, compiled = tmp_path_factory.mktemp("home"), hub.home() / "programs"
    compiled.mkdir(parents=True, exist_ok=True)
    (folder / "programs").symlink_to(compiled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IRKIT_HOME", str(folder))
        hub.add(tiny_path, "tiny")
        app = create_app()
        yield app
        asyncio.run(app.state.sessions.close())


@pytest.mark.parametrize(("path", "body"), ASKS, ids=lambda value: value if isinstance(value, str) else "")
def test_the_server_answers_others_while_a_large_reply_is_written(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    parts, begun, go = replies.parts, threading.Event(), threading.Event()
    monkeypatch.setattr(replies, "_PART", 1)  # all is large

    async def both() -> httpx.Response:
        loop = threading.current_thread()

        def waits(value: Any) -> Iterator[bytes]:
            assert threading.current_thread() is not loop
            begun.set()
            assert go.wait(60)
            yield from parts(value)

        monkeypatch.setattr(replies, "parts", waits)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=120) as client:
            asking = asyncio.create_task(client.post(path, json={"model": "tiny", **body}))
            while not (begun.is_set() or asking.done()):
                await asyncio.sleep(0.001)
            assert not asking.done()
            assert (await client.get("/api/health")).json() == {"status": "ok"}
            go.set()
            return await asking

    reply = asyncio.run(both())
    assert reply.status_code == 200
    for line in reply.text.splitlines():
        if text := line.removeprefix("data: ").replace("[DONE]", ""):
            assert "error" not in json.loads(text)
