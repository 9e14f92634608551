"""A server beside a session, in the same process and on the same loaded model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import irkit
from irkit.observing import Asked

END = {"logit_bias": {257: -1e4}}
"""Keeps the tiny model from ending its answer."""


@pytest.fixture
def tiny(tiny_path: Path) -> Iterator[irkit.Session]:
    with irkit.Session(tiny_path, num_ctx=1 << 18) as session:
        yield session


def ask(url: str, model: str = "tiny", **options: Any) -> httpx.Response:
    body = {"model": model, "prompt": "hello", "raw": True, "stream": False, "options": END | options}
    return httpx.post(f"{url}/api/generate", json=body, timeout=60)


def test_requests_are_answered_by_the_loaded_model(tiny: irkit.Session) -> None:
    mine = tiny.generate("hello", temperature=0, num_predict=9, **END)  # pyright: ignore[reportArgumentType]
    with tiny.serve(port=0) as served:
        assert served.model == "tiny"
        assert repr(served) == f"<irkit serves tiny on {served.url}>"
        assert served.url in served._repr_html_()
        held = tiny.cache.ids
        made = ask(served.url, temperature=0, num_predict=9).json()
        assert made["response"] == mine.text
        assert ask(served.url, "Tiny:latest", num_predict=2).status_code == 200
        assert tiny.cache.ids == held  # the requests' caches are their own
        scored = httpx.post(f"{served.url}/api/score", json={"model": "tiny", "text": "hello"}).json()
        assert scored["result"]["tokens"][-1]["logprob"] == pytest.approx(tiny.score("hello").tokens[-1].logprob)
        assert ask(served.url, "another").status_code == 404
        for path in ("tags", "ps"):
            models = httpx.get(f"{served.url}/api/{path}", timeout=60).json()["models"]
            assert "tiny" in [model["name"] for model in models]
        shown = httpx.post(f"{served.url}/api/show", json={"model": "tiny"}, timeout=60).json()
        assert shown["model_info"]["llama.context_length"] == 512
        assert httpx.post(f"{served.url}/api/close", json={"model": "tiny"}).status_code == 200
        assert ask(served.url, num_predict=2).status_code == 200  # it was not the server's to close
    assert not served.running
    assert "stopped" in served._repr_html_()
    with pytest.raises(httpx.ConnectError):
        ask(served.url)


def test_asked_again_the_same_server_goes_on(tiny: irkit.Session) -> None:
    first = tiny.serve(port=0)
    assert tiny.serve(port=0) is first
    fork = tiny.fork()
    taken = fork.serve(port=0)
    assert taken is not first
    other = tiny.serve(port=0, budget=1)
    assert (first.running, other.running) == (False, True)
    with pytest.raises(irkit.errors.OptionError, match="cannot listen"):
        tiny.serve(port=int(taken.url.rpartition(":")[2]))
    with pytest.raises(irkit.errors.OptionError, match="prot"):
        tiny.serve(prot=1)
    fork.close()
    assert not taken.running


def test_closing_the_session_ends_the_server_and_its_streams(tiny: irkit.Session) -> None:
    served = tiny.serve(port=0)
    begun: list[Asked] = []
    tiny.observe(begun.append)
    body = {"model": "tiny", "prompt": "hello", "raw": True, "options": END}
    with httpx.stream("POST", f"{served.url}/api/generate", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        tiny.close()
        assert "cancelled" in list(lines)[-1]
    assert not served.running
    assert begun[0].generation.finish_reason == "cancelled"


def test_observers_learn_what_is_asked_and_by_whom(tiny: irkit.Session) -> None:
    seen: list[Asked] = []
    end = tiny.observe(seen.append)
    tiny.fork().generate([1, 2], num_predict=3, **END).wait()  # pyright: ignore[reportArgumentType]
    with tiny.serve(port=0) as served:
        messages = [{"role": "user", "content": "hello"}]
        body = {"model": "tiny", "messages": messages, "stream": False, "options": {"num_predict": 3}}
        httpx.post(f"{served.url}/api/chat", json=body, timeout=60)
        end()
        ask(served.url, num_predict=1)
    here, there = seen
    assert (here.by, there.by) == ("", "POST /api/chat")
    assert (here.words, there.words) == (tiny.detokenize([1, 2]), messages)
    assert there.options.num_predict == 3
    assert len(here.generation.tokens) == 3
    end()  # once more does nothing
