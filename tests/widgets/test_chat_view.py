"""The chat's Python side, on the real model: it is told what its page would tell it, and what it tells is looked at."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import irkit
from irkit.errors import OptionError
from irkit.widgets import answer, base
from irkit.widgets.chat import Chat

PATIENCE = 120


class Page(list[tuple[dict[str, Any], list[bytes]]]):
    """What a page would have been told by one chat, and what it tells it."""

    def __init__(self, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
        self._chat = chat
        monkeypatch.setattr(chat, "send", lambda message, buffers=None: self.append((message, list(buffers or ()))))

    def tell(self, **message: Any) -> None:
        self._chat._handle_custom_msg(message, [])

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [message for message, _ in self if message["kind"] == kind]


@pytest.fixture
def chat(session: irkit.Session) -> Iterator[Chat]:
    made = Chat(session, options=session._generate_options({"temperature": 0, "num_predict": 24}))
    yield made
    made.close()


def begin_endless(chat: Chat) -> None:
    """Ask for an answer that goes on until it is stopped, and wait until it is under way."""
    ends = dict.fromkeys(chat._session.model.tokenizer.eog_ids, -1000.0)
    chat._options = chat._options.model_copy(update={"logit_bias": ends})
    chat.controls.set(num_predict=-1, temperature=0.9, seed=7)
    chat.ask("Tell me a very long story about a whale, in a thousand words.")
    until(lambda: len(chat._turn(chat.busy).tokens) > 8)


@pytest.fixture
def page(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> Page:
    return Page(chat, monkeypatch)


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def asked(chat: Chat, text: str) -> dict[str, Any]:
    """The answer to `text`, as the page draws it."""
    chat.ask(text)
    assert chat.wait(PATIENCE)
    return chat.turns[-1]


def test_an_answer_is_what_respond_says_and_is_told_piece_by_piece(chat: Chat, page: Page) -> None:
    question = "What is the capital of France?"
    page.tell(kind="send", text=question)
    until(lambda: chat.busy == 0 and len(chat.turns) == 2)
    expected = chat._session.respond(question, temperature=0, num_predict=24)
    assert chat.messages == [{"role": "user", "content": question}, {"role": "assistant", "content": expected.text}]
    assert chat.used == expected.stats.prompt_tokens + expected.stats.tokens
    deltas = page.of("delta")
    assert page[0][0]["kind"] == "begun"
    assert [delta["seq"] for delta in deltas] == list(range(1, len(deltas) + 1))
    told = "".join(delta["html"] for delta in deltas) + deltas[-1]["open"]
    assert re.sub("<.*?>|\\s", "", told) == re.sub("<.*?>|\\s", "", chat.turns[1]["html"])
    assert expected.text.startswith("".join(delta.get("said", "") for delta in deltas).strip())
    assert "tokens/s" in chat.turns[1]["facts"]


def test_the_system_prompt_and_what_was_said_before_are_read(chat: Chat) -> None:
    chat.system = "Answer with one word."
    asked(chat, "What is the capital of Italy?")
    asked(chat, "And of Spain?")
    *before, last = chat.messages
    assert [message["role"] for message in before] == ["system", "user", "assistant", "user"]
    assert last["content"] == chat._session.respond(before, temperature=0, num_predict=24).text


def test_stop_ends_the_computation_and_keeps_what_was_made(chat: Chat, page: Page) -> None:
    begin_endless(chat)
    generation = chat._turn(chat.busy).generation
    assert generation is not None
    page.tell(kind="stop")
    assert chat.wait(PATIENCE)
    count = len(generation._tokens)
    assert generation.finish_reason == "cancelled"
    assert chat.turns[-1]["facts"].endswith("stopped")
    assert chat.messages[-1]["content"] == generation.text != ""
    chat._session.model.submit(lambda: None).result()  # whatever was queued on the device is done
    assert len(generation._tokens) == count


def test_stop_is_heard_before_the_answer_is_begun(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    laid_out, stopped = chat._session._laid_out, threading.Event()

    def slowly(*arguments: Any) -> Any:
        assert stopped.wait(PATIENCE)
        return laid_out(*arguments)

    monkeypatch.setattr(chat._session, "_laid_out", slowly)
    chat.ask("Hello")
    chat.stop()
    stopped.set()
    assert chat.wait(PATIENCE)
    assert chat._turn(chat.turns[-1]["id"]).generation.finish_reason == "cancelled"  # pyright: ignore


def test_one_answer_at_a_time_and_what_cannot_be_done_is_said_in_words(chat: Chat, page: Page) -> None:
    begin_endless(chat)
    page.tell(kind="send", text="And another")
    page.tell(kind="new")
    chat.stop()
    assert chat.wait(PATIENCE)
    page.tell(kind="send", text="  ")
    page.tell(kind="regenerate", turn=99_999)
    page.tell(kind="open", turn=chat.turns[-1]["id"], position=10_000)
    page.tell(kind="edit", turn=chat.turns[-1]["id"], text="I said something else")
    page.tell(kind="export", format="pdf")
    page.tell(kind="juggle")
    page.tell(kind="continue", turn=1)
    until(lambda: len(page.of("problem")) == 8)
    said = " / ".join(problem["text"] for problem in page.of("problem"))
    for words in (
        "stop it first",
        "nothing in the message",
        "no message 99999",
        "no token 10000",
        "one's own",
        "'pdf'",
    ):
        assert words in said
    assert len(chat.turns) == 2
    with pytest.raises(OptionError, match="to choose"):
        Chat(chat._session, tune="a song")


def test_a_failed_answer_says_why(session: irkit.Session) -> None:
    small = Chat(irkit.Session(session.model.path, num_ctx=48))
    try:
        failed = asked(small, "word " * 60)
        assert "the context holds 48" in failed["problem"]
        assert "the context holds 48" in small.twin()
    finally:
        small.close()
        small._session.close()


def test_again_and_anew_are_versions(chat: Chat, page: Page) -> None:
    first = asked(chat, "Name a river.")
    chat.controls.set(temperature=1.5, seed=1)
    page.tell(kind="regenerate", turn=first["id"])
    assert chat.wait(PATIENCE)
    again = chat.turns[-1]
    assert again["versions"] == [first["id"], again["id"]]
    asked(chat, "Another one.")
    page.tell(kind="edit", turn=chat.turns[0]["id"], text="Name a lake.")
    assert chat.wait(PATIENCE)
    assert chat.turns[0]["text"] == "Name a lake."
    assert len(chat.turns) == 2
    page.tell(kind="version", turn=chat.turns[0]["versions"][0])
    assert len(chat.turns) == 4
    assert chat.turns[1]["id"] == again["id"]
    page.tell(kind="version", turn=first["id"])
    assert [turn["id"] for turn in chat.turns] == [chat.turns[0]["id"], first["id"]]


def test_continuing_from_another_token(chat: Chat, page: Page) -> None:
    first = asked(chat, "What is the capital of France?")
    old = chat._turn(first["id"]).tokens
    other = old[3].top[1]
    page.tell(kind="continue", turn=first["id"], position=3, token=other.id)
    assert chat.wait(PATIENCE)
    branch = chat.turns[-1]
    new = chat._turn(branch["id"]).tokens
    assert branch["versions"] == [first["id"], branch["id"]]
    assert [token.id for token in new[:4]] == [*(token.id for token in old[:3]), other.id]
    assert new[3].logprob == other.logprob
    assert branch["text"] == chat._session.model.tokenizer.decode([token.id for token in new]).strip() != first["text"]
    prompt = chat._turn(first["id"]).prompt
    expected = chat._session.generate([*prompt, *(t.id for t in new[:4])], temperature=0, num_predict=24)
    assert [token.id for token in new[4:]] == [token.id for token in expected.tokens]
    eog = chat._session.model.tokenizer.eog_ids
    page.tell(kind="continue", turn=first["id"], position=3, token=min(eog))
    assert chat.wait(PATIENCE)
    assert len(chat._turn(chat.turns[-1]["id"]).tokens) == 4  # nothing comes behind the end


def test_tokens_are_told_with_what_could_have_stood_there(chat: Chat, page: Page) -> None:
    chat.colour = "probability"
    turn = asked(chat, "Name two colours.")
    tokens = chat._turn(turn["id"]).tokens
    told, firsts = [], []
    for message, buffers in page:
        if "tokens" in message:
            told += np.frombuffer(buffers[0], np.int32).tolist()
            firsts.append((message["tokens"]["first"], len(message["tokens"]["texts"])))
    assert told == [token.id for token in tokens]
    assert [first for first, _ in firsts] == np.cumsum([0, *(count for _, count in firsts)])[:-1].tolist()
    page.tell(kind="tokens", turn=turn["id"], entropy=True)
    until(lambda: page.of("tokens"))
    message, buffers = page[-1]
    ids, logprobs, top_ids, top_logprobs, entropies = (
        np.frombuffer(data, kind) for data, kind in zip(buffers, (np.int32, *[np.float32] * 4), strict=True)
    )
    top_ids = np.frombuffer(buffers[2], np.int32).reshape(len(ids), answer.ALTERNATIVES)
    np.testing.assert_array_equal(top_ids[:, 0], [token.top[0].id for token in tokens])
    np.testing.assert_allclose(logprobs, np.array([token.logprob for token in tokens], float), rtol=1e-6)
    assert message["words"][str(top_ids[2, 1])] == tokens[2].top[1].text
    # The entropy is that of the whole distribution, which a pass over the same text gives.
    whole = chat._turn(turn["id"])
    logits = chat._session.trace(whole.ids[: len(whole.prompt) + 2], names=(), logits="last").logits[0, -1]
    shares = np.exp(logits - logits.max())
    shares = shares / shares.sum()
    np.testing.assert_allclose(entropies[2], -np.sum(shares * np.log(shares + 1e-30)), rtol=2e-2)
    assert top_logprobs.shape == (len(ids) * answer.ALTERNATIVES,)


def test_a_token_is_opened(chat: Chat, page: Page) -> None:
    turn = asked(chat, "What is the capital of France?")
    page.tell(kind="open", turn=turn["id"], position=4)
    until(lambda: page.of("opened") or page.of("problem"))
    assert not page.of("problem")
    heading, tabs = chat._inspector.box.children
    attention, lens, cache = tabs.children
    whole = chat._turn(turn["id"])
    read = len(whole.prompt) + 4
    assert attention.info["queries"] == [read - 1]
    assert len(attention.info["tokens"]) == read
    assert lens.info["positions"][-1] == read - 1
    assert lens.followed == chat._session.model.tokenizer.token(whole.tokens[4].id)
    assert f"{read} tokens were held" in cache.value
    assert "holds them still" in cache.value
    assert repr(lens.followed) in heading.value.replace("&#x27;", "'")
    page.tell(kind="shut")
    assert chat._inspector.box.children == ()
    assert attention.comm is None


def test_a_slider_changes_the_next_token(chat: Chat, page: Page) -> None:
    begin_endless(chat)
    turn = chat._turn(chat.busy)
    chat.controls.set(temperature=0.0)
    changed = len(turn.tokens) + 5  # at most four are under way
    until(lambda: len(turn.tokens) > changed + 25)
    chat.stop()
    assert chat.wait(PATIENCE)
    assert all(token.id == token.top[0].id for token in turn.tokens[changed:])
    assert any(token.id != token.top[0].id for token in turn.tokens[:changed])


def test_the_page_is_told_what_it_missed(chat: Chat, page: Page) -> None:
    begin_endless(chat)
    until(lambda: len(page.of("delta")) > 3)
    page.tell(kind="state")
    whole = page.of("whole")[-1]
    at = next(index for index, (message, _) in enumerate(page) if message is whole)
    before = [message for message, _ in page[:at] if message["kind"] == "delta"]
    assert whole["seq"] == before[-1]["seq"]
    assert whole["html"] + whole["open"] == "".join(delta["html"] for delta in before) + before[-1]["open"]
    page.tell(kind="poll", seq=-1)  # a page that threads do not reach
    assert len(page.of("whole")) == 2
    chat.stop()
    assert chat.wait(PATIENCE)
    page.tell(kind="poll", seq=-1)
    assert page.of("turns")[-1]["turns"] == chat.turns
    page.tell(kind="ping")
    assert page[-1][0]["kind"] == "pong"


def test_export_and_save(chat: Chat, page: Page, tmp_path: Any) -> None:
    chat.system = "Be brief."
    asked(chat, "Say *hi*.")
    chat.regenerate()
    assert chat.wait(PATIENCE)
    held = json.loads(chat.export())
    assert held["messages"] == chat.messages
    assert [kept["role"] for kept in held["all"]] == ["user", "assistant", "assistant"]
    assert held["all"][1]["before"] == held["all"][0]["id"]
    assert "".join(text for _, text, _ in held["all"][1]["tokens"]) == held["all"][1]["content"]
    chat.save(tmp_path / "said.md")
    assert (tmp_path / "said.md").read_text().count("Say *hi*.") == 1
    page.tell(kind="export", format="markdown")
    assert page.of("file")[-1]["text"] == (tmp_path / "said.md").read_text()
    with pytest.raises(OptionError, match="nowhere"):
        chat.save(tmp_path / "nowhere" / "said.json")


def test_the_twin_shows_the_conversation_without_script(chat: Chat) -> None:
    chat.system = "Be <b>brief</b>."
    asked(chat, "Is 1 < 2 & 3 > 2?")
    twin = chat.twin()
    assert "<script" not in twin
    assert "Be &lt;b&gt;brief&lt;/b&gt;." in twin
    assert "Is 1 &lt; 2 &amp; 3 &gt; 2?" in twin
    assert chat.turns[1]["html"] in twin
    assert twin.count('class="irkit-t') == len(chat._turn(chat.turns[1]["id"]).tokens)
    assert re.search(r"title=\"&#x27;.*%", twin)


def test_two_chats_of_one_session_do_not_mix(session: irkit.Session) -> None:
    first, second = Chat(session), Chat(session)
    for chat in (first, second):
        chat.controls.set(temperature=0, num_predict=12)
    first.ask("What is the capital of France?")
    second.ask("What is the capital of Italy?")
    assert first.wait(PATIENCE)
    assert second.wait(PATIENCE)
    for chat in (first, second):
        expected = session.respond(chat.messages[0]["content"], temperature=0, num_predict=12)
        assert chat.messages[-1]["content"] == expected.text
    first.close()
    second.close()
    with pytest.raises(OptionError, match="closed"):
        first._later(lambda message: None, {})


def test_a_new_conversation_and_back(chat: Chat, page: Page) -> None:
    asked(chat, "Hello")
    page.tell(kind="new")
    page.tell(kind="new")  # there is nothing in it yet
    assert (chat.messages, chat.turns, chat.used, chat.titles) == ([], [], 0, ["Hello", ""])
    asked(chat, "Good bye")
    page.tell(kind="switch", conversation=0)
    assert (chat.messages[0]["content"], chat.current, chat.titles) == ("Hello", 0, ["Hello", "Good bye"])
    with pytest.raises(OptionError, match="no conversation 2"):
        chat.switch(2)


def test_a_cell_that_is_run_again_goes_on_with_its_conversation(
    session: irkit.Session, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []
    monkeypatch.setattr(base, "show", lambda widget, twin, twin_id: shown.append(twin))
    monkeypatch.setattr(base, "running", lambda: ("a cell", "first"))
    chat.show()
    asked(chat, "Hello")
    begin_endless(chat)
    monkeypatch.setattr(base, "running", lambda: ("a cell", "second"))
    again = Chat(session)
    again.show()
    assert chat.comm is None
    assert [message["role"] for message in again.messages] == ["user", "assistant"] * 2
    assert "Hello" in shown[-1]
    again.close()


def test_the_verb_gives_a_chat_in_a_notebook_and_checks_its_options(
    session: irkit.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("irkit.notebook.shell", lambda: object())
    made = session.chat("Be brief.", temperature=0.1, logit_bias={5: -100.0})
    assert isinstance(made, Chat)
    assert (made.system, made.controls.read()["temperature"], made._options.logit_bias) == ("Be brief.", 0.1, {5: -100})
    made.close()
    with pytest.raises(OptionError, match="temperature"):
        session.chat(temperature=11)
