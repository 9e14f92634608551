"""How much the server takes on: places, turns, memory; and what a client that leaves gives back."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, copy_context
from pathlib import Path
from typing import Any

import httpx
import pytest

import irkit
from irkit import hub
from irkit.engine.runtime import Runtime
from irkit.engine.worker import DEVICE, MOST
from irkit.errors import BudgetError, BusyError
from irkit.observing import Asker
from irkit.options import LoadOptions, ServeOptions
from irkit.server import places
from irkit.server.places import PLACE, Place
from irkit.server.sessions import Sessions

END = {"logit_bias": {257: -1e4}}
"""Keeps the tiny model from ending its answer."""
ENDLESS = {"model": "tiny", "prompt": "hello", "raw": True, "stream": False, "options": END}


@pytest.fixture
def tiny(tiny_path: Path) -> Iterator[irkit.Session]:
    with irkit.Session(tiny_path, num_ctx=1 << 18) as session:
        session.generate("hello", num_predict=1).wait()
        yield session
    DEVICE.most = MOST


def eventually(condition: Callable[[], Any]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def idle() -> bool:
    return not (DEVICE._open or DEVICE._running or DEVICE._waiting)


def test_beyond_the_queue_requests_are_refused_and_what_is_cancelled_makes_room(tiny: irkit.Session) -> None:
    served = tiny.serve(port=0, parallel=1, max_queue=1)
    begun = []
    tiny.observe(begun.append)

    def ask(path: str = "/api/generate", **more: Any) -> httpx.Response:
        return httpx.post(served.url + path, json=ENDLESS | more, timeout=60)

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(ask) for _ in range(2)]
        eventually(lambda: len(begun) == 2 and len(DEVICE._running) == 1)
        for path in ("/api/generate", "/api/embed"):
            refused = ask(path)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
            assert "busy" in refused.json()["error"]
        # What computes nothing is answered, and so is who asks how the server is.
        assert httpx.post(f"{served.url}/api/tokenize", json={"model": "tiny", "text": "hi"}).status_code == 200
        assert httpx.get(f"{served.url}/api/health").status_code == 200
        begun[1].generation.cancel()  # as if its client had left
        eventually(lambda: begun[1].generation.done)
        running.append(pool.submit(ask, options=END | {"num_predict": 1}))
        eventually(lambda: len(begun) == 3)
        begun[0].generation.cancel()
        assert [future.result().status_code for future in running] == [500, 500, 200]
    assert ask(options={"num_predict": 1}).status_code == 200
    eventually(idle)


@pytest.mark.parametrize("path", ["/api/generate", "/api/score", "/api/embed", "/api/trace", "/api/lens"])
def test_a_client_that_leaves_frees_the_engine_within_a_chunk(
    tiny: irkit.Session, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    served = tiny.serve(port=0)
    reads, first = [], threading.Event()

    def slowly(name: str) -> Callable[..., Any]:
        read = getattr(Runtime, name)

        def reading(*words: Any) -> Any:
            reads.append(name)
            first.set()
            time.sleep(0.2)
            return read(*words)

        return reading

    text = "ab " * 3000  # dozens of chunks
    bodies: dict[str, dict[str, Any]] = {
        "/api/generate": {"prompt": text, "raw": True},
        "/api/score": {"text": text},
        "/api/embed": {"input": [text]},
        "/api/trace": {"texts": text, "names": ["resid_post"], "reduce": "last", "logits": "none"},
        "/api/lens": {"text": text[:300]},
    }
    body = bodies[path] | {"model": "tiny"}
    if path in ("/api/trace", "/api/lens"):  # which compile what they read with
        assert httpx.post(served.url + path, json=body, timeout=60).status_code == 200
    for name in ("read", "score", "pool", "lens", *(["trace"] if path == "/api/trace" else [])):
        monkeypatch.setattr(Runtime, name, slowly(name))

    def ask() -> None:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(served.url + path, json=body, timeout=httpx.Timeout(60, read=0.5))

    asking = threading.Thread(target=ask)
    asking.start()
    assert first.wait(30)
    asking.join()
    gone = len(reads)
    eventually(idle)
    assert 1 <= gone <= len(reads) <= gone + 2
    answer = httpx.post(f"{served.url}/api/generate", json=ENDLESS | {"options": {"num_predict": 2}}, timeout=60)
    assert answer.status_code == 200


def test_the_bodies_of_all_requests_together_have_a_limit(client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "MOST_BYTES", 1000)
    reply = client.post("/api/tokenize", json={"model": "smollm2", "text": "a" * 1000})
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "2")
    assert client.post("/api/tokenize", json={"model": "smollm2", "text": "a"}).status_code == 200


@pytest.fixture
def three(tmp_path: Path, write_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> int:
    """Models a, b and c, and the bytes that the weights of each take in memory."""
    monkeypatch.setenv("IRKIT_HOME", str(tmp_path / "home"))
    for name in "abc":
        hub.add(write_model(tmp_path / f"{name}.gguf"), name)
    with irkit.Session("a") as session:
        loaded = session.model.load().result().nbytes
        assert loaded == pytest.approx(session.model.nbytes, rel=0.1)
    return loaded


def test_models_used_last_stay_in_memory(three: int) -> None:
    async def scenario() -> None:
        sessions, plain = Sessions(ServeOptions(memory=int(2.5 * three))), LoadOptions()

        def here() -> list[str]:
            return [name for name, _ in sessions._opened]

        first = await sessions.get("a", plain)
        model = weakref.ref(first.model)
        (await sessions.get("b", plain)).model.load().result()
        assert here() == ["a", "b"]
        await sessions.get("a", plain)
        await sessions.get("c", plain)
        assert here() == ["a", "c"]
        await sessions.get("b", plain, computes=False)
        assert here() == ["a", "c", "b"]  # nothing of it is in memory yet
        await sessions.get("b", plain)
        assert here() == ["c", "b"]
        assert first._model is None
        del first
        DEVICE.submit(lambda: None).result()
        assert model() is None, "its memory is free"
        await sessions.close()

    asyncio.run(scenario())


def test_an_answer_is_freed_where_the_context_of_its_request_is_kept(tiny: irkit.Session) -> None:
    """As a thread does that has computed something for it, until it computes something else."""
    served = tiny.serve(port=0)
    contexts, answers = list[Context](), list[weakref.ref[Any]]()
    tiny.observe(lambda asked: (contexts.append(copy_context()), answers.append(weakref.ref(asked.generation))))
    for stream in (True, False):
        body = ENDLESS | {"options": END | {"num_predict": 3}, "stream": stream}
        assert httpx.post(f"{served.url}/api/generate", json=body).status_code == 200
    eventually(idle)
    DEVICE.submit(lambda: None).result()
    eventually(lambda: (gc.collect(), [answer() for answer in answers])[1] == [None, None])
    assert all(context[PLACE] for context in contexts)


def test_a_model_in_use_stays_and_the_next_waits_for_it(three: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        sessions, plain = Sessions(ServeOptions(memory=int(1.5 * three))), LoadOptions()

        async def use(name: str, until: asyncio.Event, begun: asyncio.Event) -> str:
            place = Place(Asker())
            PLACE.set(place)
            sessions.places.take(place)
            try:
                session = await sessions.get(name, plain)
                begun.set()
                await until.wait()
                return session.generate([1, 2], num_predict=3).text
            finally:
                sessions.places.leave(place)

        go, (first, second) = asyncio.Event(), (asyncio.Event(), asyncio.Event())
        using = asyncio.create_task(use("a", go, first))
        await first.wait()
        with monkeypatch.context() as patch:
            patch.setattr("irkit.server.sessions.PATIENCE", 0.05)
            with pytest.raises(BusyError, match="no room in memory for b"):
                await sessions.get("b", plain)
        waiting = asyncio.create_task(use("b", go, second))
        await asyncio.sleep(0.05)
        assert not second.is_set()
        go.set()
        assert await using
        assert await waiting
        assert [name for name, _ in sessions._opened] == ["b"]
        await sessions.close()

    asyncio.run(scenario())


def test_a_model_that_is_too_large_and_one_that_was_lent(three: int) -> None:
    async def scenario() -> None:
        sessions, plain = Sessions(ServeOptions(memory=int(1.5 * three))), LoadOptions()
        with irkit.Session("a") as mine:
            lent = sessions.lend(mine)
            assert (await sessions.get(lent, plain)).model is mine.model
            with pytest.raises(BudgetError, match=r"with b, .* would be taken; .* --memory"):
                await sessions.get("b", plain)
            assert mine.generate([1, 2], num_predict=1).wait()

    asyncio.run(scenario())


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_when_a_model_is_let_go_of_is_known_in_its_last_moment(three: int, loop: str) -> None:
    async def scenario() -> None:
        sessions = Sessions(ServeOptions())
        (await sessions.get("a", LoadOptions(), keep_alive=0.0001)).model.load().result()
        sessions._left(("a", LoadOptions()))
        (running,) = sessions.running()
        assert running.expires < 1
        await sessions.close()

    pytest.importorskip(loop).run(scenario())
