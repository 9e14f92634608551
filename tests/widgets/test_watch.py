"""What a session answers, watched: in Python and over HTTP, live, and in bounded memory."""

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import httpx
import numpy as np
import pytest

import irkit
from irkit.errors import OptionError
from irkit.observing import Asked
from irkit.results import Generation, Stats, Token
from irkit.widgets import watch
from irkit.widgets.watch import WatchView


@pytest.fixture(scope="module")
def tiny(tiny_path: Any) -> Iterator[irkit.Session]:
    with irkit.Session(tiny_path, num_ctx=1 << 20) as session:
        yield session


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def idle(view: WatchView) -> bool:
    return view._pump is None


class Page:
    """What the page is told, put together as the page does."""

    def __init__(self, view: WatchView) -> None:
        self.rows: dict[int, Any] = {}
        self.ids: list[int] = []
        self.shown = 0
        self.times: list[float] = []
        view.send = self.received  # pyright: ignore[reportAttributeAccessIssue]

    def received(self, message: dict[str, Any], buffers: Any = None) -> None:
        self.times.append(time.monotonic())
        if message["kind"] == "whole":
            self.shown, self.ids = message["id"], np.frombuffer(buffers[0], np.int32).tolist()
            self.messages, self.edits = message["messages"], message["edits"]
        else:
            self.rows |= {row["id"]: row for row in message["rows"]}
            self.rows = {id: row for id, row in self.rows.items() if id >= message["first"]}
            if message["more"] and message["more"]["id"] == self.shown:
                assert message["more"]["first"] == len(self.ids)
                self.ids += np.frombuffer(buffers[0], np.int32).tolist()


def test_an_answer_is_seen_while_it_is_made(tiny: irkit.Session) -> None:
    with_strength = [irkit.steer(np.ones(64), 0, 0.5)]
    view = tiny.watch()
    page = Page(view)
    endless: dict[str, Any] = {"logit_bias": {257: -1e4}}
    made = tiny.generate("hello", edits=with_strength, **endless)
    until(lambda: len(page.ids) > 3)
    assert page.rows[1]["live"]
    assert page.messages == [{"role": "text", "content": "hello"}]
    assert page.edits == [repr(with_strength[0])]
    view._handle_custom_msg({"kind": "stop", "id": 1}, [])
    assert made.wait().finish_reason == "cancelled"
    until(lambda: idle(view))
    assert page.ids == [token.id for token in made.tokens]
    assert not page.rows[1]["live"]
    assert "cancelled" in page.rows[1]["facts"]
    assert (view.answers[0].text, view.answers[0].prompt) == (made.text, "hello")
    view.close()
    tiny.generate("hello", num_predict=1).wait()
    assert len(view.answers) == 1


def test_messages_are_few(tiny: irkit.Session) -> None:
    view = tiny.watch()
    page = Page(view)
    several = tiny.generate_many(["hello"] * 8, num_predict=200, logit_bias={257: -1e4})
    for each in several:
        each.wait()
    until(lambda: idle(view) and len(view.answers) == 8)
    assert len(page.rows) == 8
    told = sorted(page.times)
    # However quick the answers: a beat apart, but for the whole of an answer that is shown when it is begun.
    quick = sum(later - earlier < 0.9 * watch.PERIOD for earlier, later in pairwise(told))
    assert quick <= 8
    view.close()


def test_what_is_kept_is_bounded(tiny: irkit.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MOST", 3)
    view = tiny.watch()
    page = Page(view)
    for _ in range(5):
        tiny.generate("hello", capture="z", num_predict=3, logit_bias={257: -1e4}).wait()
        until(lambda: idle(view))
    assert [seen.id for seen in view.answers] == [3, 4, 5]
    assert list(page.rows) == [3, 4, 5]
    assert all(token.captures is None for seen in view.answers for token in seen.tokens)
    monkeypatch.setattr(watch, "MOST_TOKENS", 5)
    tiny.generate("hello", num_predict=4, logit_bias={257: -1e4}).wait()
    until(lambda: idle(view))
    assert [seen.id for seen in view.answers] == [6]
    with pytest.raises(OptionError, match="no answer 3 here any more"):
        view.look_into(3, 0)
    view.close()


def test_requests_are_seen_with_who_asked(session: irkit.Session) -> None:
    view = session.watch()
    page = Page(view)
    messages = [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "Name a river."}]
    options = {"temperature": 0, "num_predict": 8}
    with session.serve(port=0) as server:
        body = {"model": server.model, "messages": messages, "options": options, "stream": False}
        said = httpx.post(f"{server.url}/api/chat", json=body, timeout=120).json()["message"]["content"]
    until(lambda: idle(view))
    (seen,) = view.answers
    assert seen.asked.by == page.rows[1]["by"] == "POST /api/chat"
    assert (seen.text, seen.prompt, page.messages) == (said, "Name a river.", messages)
    twin = view.twin()
    assert "POST /api/chat" in twin
    assert "Name a river." in twin
    assert "<script" not in twin
    # Another page, or this one loaded again, asks for all of it.
    again = Page(view)
    view._handle_custom_msg({"kind": "state"}, [])
    assert (again.rows, again.ids) == (page.rows, [token.id for token in seen.tokens])
    # Each token can be looked into, by what the model read before it.
    view._handle_custom_msg({"kind": "open", "id": 1, "position": 2}, [])
    until(lambda: view._inspector.box.children or view.problem)
    assert view.problem == ""
    attention, lens, _ = view._inspector.box.children[1].children
    assert attention.info["queries"] == [len(seen.asked.generation.prompt) + 1]
    assert lens.followed == seen.tokens[2].text
    view._handle_custom_msg({"kind": "open", "id": 1, "position": 99}, [])
    until(lambda: view.problem)
    assert "there is no token 99" in view.problem
    view.close()


def test_what_nobody_expected_is_shown(tiny: irkit.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    view = tiny.watch()
    tiny.generate("hello", num_predict=2, logit_bias={257: -1e4}).wait()
    until(lambda: idle(view))
    monkeypatch.setattr(view._inspector, "show", lambda *_: 1 // 0)
    view._handle_custom_msg({"kind": "open", "id": 1, "position": 1}, [])
    until(lambda: view.problem == "ZeroDivisionError: integer division or modulo by zero")
    monkeypatch.undo()
    view._handle_custom_msg({"kind": "open", "id": 1, "position": 1}, [])
    until(lambda: view._inspector.box.children and not view.problem)
    monkeypatch.setattr(watch, "_row", lambda _: {}["id"])
    tiny.generate("hello", num_predict=2).wait()
    until(lambda: view.problem == "KeyError: 'id'")
    assert idle(view)
    view.close()


def test_an_answer_that_ends_within_a_character_is_seen_whole() -> None:
    made = Generation()
    seen = watch.Seen(1, Asked("hello", None, made, "tiny"))
    made._put(Token(5, "ab", -1.0))
    watch._look(seen)
    assert (seen.text, seen.live) == ("ab", True)
    made._finish("cancelled", Stats(), tail="\ufffd")
    watch._look(seen)
    assert (seen.text, seen.live) == ("ab\ufffd", False)
