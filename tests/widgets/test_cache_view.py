"""The cache view's Python side: what it shows of a cache, and what its buttons do to it."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import irkit
from irkit import view
from irkit.errors import OptionError
from irkit.widgets.cache import CacheWidget

PROMPT = [1 + n % 200 for n in range(30)]


@pytest.fixture(scope="module")
def tiny(tiny_path: Any) -> Iterator[irkit.Session]:
    with irkit.Session(tiny_path) as session:
        yield session


@pytest.fixture
def shown(tiny: irkit.Session) -> Iterator[CacheWidget]:
    tiny.reset()
    tiny.generate(PROMPT, temperature=0, num_predict=1).wait()
    made = view.cache(tiny)
    yield made
    made.close()


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def press(shown: CacheWidget, **message: Any) -> None:
    """What a button does, to its end."""
    before = shown.info["version"], len(shown.listed), shown.problem
    shown._handle_custom_msg(message, [])
    until(lambda: (shown.info["version"], len(shown.listed), shown.problem) != before and not shown.busy)


def lengths(shown: CacheWidget, monkeypatch: pytest.MonkeyPatch, **message: Any) -> list[Any]:
    sent: list[Any] = []
    monkeypatch.setattr(shown, "send", lambda message, buffers=None: sent.append((message, buffers)))
    shown._handle_custom_msg({"kind": "lengths", "version": shown.info["version"], **message}, [])
    return sent


def test_it_shows_what_is_held(shown: CacheWidget, tiny: irkit.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    info = shown.info
    assert info["ids"] == PROMPT
    assert (info["layers"], info["heads"], info["n_ctx"], info["capacity"]) == (2, 2, 512, 512)
    assert (info["size"], info["kind"]) == (irkit.trace.size(tiny.cache.nbytes), "clean")
    keys = np.stack([tiny.cache.keys(layer) for layer in range(2)])
    ((message, (buffer,)),) = lengths(shown, monkeypatch, part="keys", head=1)
    assert (message["part"], message["head"]) == ("keys", 1)
    found = np.frombuffer(buffer, np.float32).reshape(2, 30)
    np.testing.assert_allclose(found, np.linalg.norm(keys[:, 1], axis=-1), rtol=1e-3)
    ((_, (buffer,)),) = lengths(shown, monkeypatch, part="values", head=-1)
    values = np.stack([np.linalg.norm(tiny.cache.values(layer), axis=-1).mean(0) for layer in range(2)])
    np.testing.assert_allclose(np.frombuffer(buffer, np.float32).reshape(2, 30), values, rtol=1e-3)
    for nonsense in ({"part": "queries", "head": 0}, {"part": "keys", "head": 2}, {"part": "keys", "head": "x"}):
        assert lengths(shown, monkeypatch, **nonsense) == []
    assert lengths(shown, monkeypatch, part="keys", head=0, version=0) == []


def test_looking_leaves_nothing_shared(shown: CacheWidget, tiny: irkit.Session) -> None:
    assert not tiny._cache.shared  # or the next answer would copy it
    shown.refresh()
    assert not tiny._cache.shared


def test_its_buttons(shown: CacheWidget, tiny: irkit.Session) -> None:
    press(shown, kind="fork", position=20)
    fork = shown.forks[1]
    assert list(fork.ids) == PROMPT[:20]
    assert shown.listed[0]["tokens"] == 20
    assert shown.listed[0]["memory"] == "shared with the cache"
    assert fork.shares_memory(tiny.cache)
    press(shown, kind="rewind", position=25)
    assert list(tiny.cache.ids) == shown.info["ids"] == PROMPT[:25]
    press(shown, kind="drop", first=12, last=10)
    assert list(tiny.cache.ids) == shown.info["ids"] == PROMPT[:10] + PROMPT[13:25]
    assert shown.info["kind"] == "dropped"
    assert not fork.shares_memory(tiny.cache)  # dropping wrote to the one
    assert shown.listed[0]["memory"] == irkit.trace.size(fork.nbytes)
    press(shown, kind="put_back", number=1)
    assert list(tiny.cache.ids) == PROMPT[:20]
    assert shown.info["kind"] == "clean"
    with tiny.fork(shown.forks[1]) as other:
        answer = other.continue_from(alternative=70, temperature=0, num_predict=2).wait()
        assert answer.stats.cached_tokens == 20
        assert list(tiny.cache.ids) == PROMPT[:20]
    press(shown, kind="forget", number=1)
    assert shown.forks == {}


def test_it_follows_the_session_and_not_others(shown: CacheWidget, tiny: irkit.Session) -> None:
    version = shown.info["version"]
    tiny.pooled().generate([5, 6, 7], num_predict=2).wait()
    tiny.generate([*PROMPT, 70], temperature=0, num_predict=3).wait()
    until(lambda: len(shown.info["ids"]) == 33)
    assert shown.info["version"] == version + 1
    shown.position = 32
    shown.rewind(10)
    assert shown.position == 9
    shown.close()
    tiny.generate(PROMPT, num_predict=1).wait()
    time.sleep(0.05)
    assert len(shown.info["ids"]) == 10


def test_an_empty_cache_and_one_alone(tiny: irkit.Session) -> None:
    tiny.reset()
    empty = tiny.cache.view()
    assert (empty.info["ids"], empty.info["capacity"]) == ([], 0)
    assert "0 of 512 tokens" in empty.twin()
    tiny.generate(PROMPT, num_predict=1).wait()
    assert empty.info["ids"] == []
    press(empty, kind="refresh")
    assert empty.info["ids"] == PROMPT
    alone = tiny.cache.fork().view(position=3)
    alone.rewind(4)
    assert len(tiny.cache) == 30
    assert alone.info["ids"] == PROMPT[:4]
    fork = alone.fork()
    assert list(fork.ids) == PROMPT[:4]
    for each in (empty, alone):
        each.close()


def test_what_cannot_be_is_said(shown: CacheWidget, tiny: irkit.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="there is no 'laier' to choose"):
        view.cache(tiny, laier=1)
    with pytest.raises(OptionError, match="layer: there is no 2"):
        view.cache(tiny, layer=2)
    with pytest.raises(OptionError, match="position: there is no 31"):
        shown.rewind(31)
    with pytest.raises(OptionError, match="there is no fork 7"):
        shown.put_back(7)
    press(shown, kind="drop", first=40, last=50)
    assert "positions: there is no 40" in shown.problem
    monkeypatch.setattr(shown, "put_back", lambda number: {}[number])
    press(shown, kind="put_back", number=3)
    assert shown.problem == "KeyError: 3"


def test_the_twin_is_html_without_script(session: irkit.Session) -> None:
    session.generate("The capital of France is", temperature=0, num_predict=4).wait()
    shown = session.cache.view()
    shown.fork(3)
    twin = shown.twin()
    assert "The capital of France is Paris" in twin
    assert "fork 1: 3 tokens, shared with the cache" in twin
    assert 'src="data:image/png;base64,' in twin
    assert "<script" not in twin
    shown.close()
