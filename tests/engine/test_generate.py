"""Several tokens a call: the same answer as one a call, wherever it ends, and the cache as if it had been so."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import irkit
from irkit.engine.runtime import AT_ONCE, Runtime
from irkit.errors import OptionError
from irkit.kernels.cpu import library
from irkit.results import Generation

pytestmark = pytest.mark.skipif(library.load() is None, reason="the extension is not installed")
N_CTX = 30
# So short a context that a prompt, too, is read token by token, and the answers do not depend on what is cached.
PROMPT = [byte - 0x21 for byte in b"an-ode-to"]
END = 257
LETTERS = {token: -100.0 for token in range(258) if not ord("a") <= token + 0x21 <= ord("z")}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 5, "logit_bias": LETTERS}


@pytest.fixture(scope="module")
def small_session(
    tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]
) -> Iterator[irkit.Session]:
    path = write_model(tmp_path_factory.mktemp("models") / "small.gguf", "Q8_0")
    with irkit.Session(path, backend="cpu", num_ctx=N_CTX) as session:
        yield session


@pytest.fixture
def calls(small_session: irkit.Session, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the runtime's methods are called, in a session with nothing in its cache."""
    small_session.reset()
    made: list[str] = []

    def counted(name: str) -> Any:
        method = getattr(Runtime, name)
        return lambda *arguments: (made.append(name), method(*arguments))[1]

    for name in ("read", "decode"):
        monkeypatch.setattr(Runtime, name, counted(name))
    return made


def one_a_call(session: irkit.Session, prompt: list[int], **options: Any) -> tuple[Generation, list[Any]]:
    """The answer of a session with an empty cache when every token is a call, and the keys it leaves there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runtime, "at_once", 1)
        session.reset()
        generation = session.generate(prompt, **options).wait()
        keys = keys_of(session)
    session.reset()
    return generation, keys


def keys_of(session: irkit.Session) -> list[Any]:
    arrays = session._cache.arrays
    assert arrays is not None
    return [np.asarray(layer)[:, :, : len(session._cache.ids)] for layer in arrays.keys]


def check(session: irkit.Session, found: Generation, expected: Generation, prompt: list[int], keys: list[Any]) -> None:
    """Both answers are the same, and the cache holds all of the text but its last token."""
    assert [(token.id, token.text) for token in found.tokens] == [(token.id, token.text) for token in expected.tokens]
    assert [token.logprob for token in found.tokens] == pytest.approx([t.logprob for t in expected.tokens], abs=1e-5)
    assert (found.text, found.finish_reason) == (expected.text, expected.finish_reason)
    written = [*prompt, *(token.id for token in found.tokens)][:-1]
    assert session._cache.ids == written
    assert session._cache.arrays is not None
    assert np.asarray(session._cache.arrays.tokens)[0, : len(written)].tolist() == written
    for mine, theirs in zip(keys_of(session), keys, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("count", range(1, 10))
def test_as_many_tokens_as_are_wanted(small_session: irkit.Session, calls: list[str], count: int) -> None:
    expected, keys = one_a_call(small_session, PROMPT, num_predict=count, **SAMPLED)
    calls.clear()
    found = small_session.generate(PROMPT, num_predict=count, **SAMPLED).wait()
    check(small_session, found, expected, PROMPT, keys)
    assert (found.finish_reason, len(found.tokens)) == ("length", count)
    assert calls.count("read") == len(PROMPT)
    assert calls.count("decode") == -(-(count - 1) // AT_ONCE)


@pytest.mark.parametrize("at", range(8))
def test_a_stop_string_anywhere_in_a_call(small_session: irkit.Session, calls: list[str], at: int) -> None:
    free, _ = one_a_call(small_session, PROMPT, num_predict=12, **SAMPLED)
    stop = free.text[at : at + 3]
    assert free.text.find(stop) == at
    expected, keys = one_a_call(small_session, PROMPT, num_predict=12, stop=stop, **SAMPLED)
    found = small_session.generate(PROMPT, num_predict=12, stop=stop, **SAMPLED).wait()
    check(small_session, found, expected, PROMPT, keys)
    assert (found.text, found.finish_reason, len(found.tokens)) == (free.text[:at], "stop", at + 3)


def test_the_end_of_the_text_anywhere_in_a_call(small_session: irkit.Session, calls: list[str]) -> None:
    lengths = set()
    for seed in range(12):
        options = SAMPLED | {"seed": seed, "logit_bias": LETTERS | {END: 1.0}}
        expected, keys = one_a_call(small_session, PROMPT, **options)
        found = small_session.generate(PROMPT, **options).wait()
        check(small_session, found, expected, PROMPT, keys)
        if found.finish_reason == "stop":
            assert found.tokens[-1].id == END
            lengths.add((len(found.tokens) - 1) % AT_ONCE)
    assert lengths == set(range(AT_ONCE))


@pytest.mark.parametrize("length", range(20, 28))
def test_the_end_of_the_context_anywhere_in_a_call(small_session: irkit.Session, calls: list[str], length: int) -> None:
    prompt = (PROMPT * 4)[:length]
    expected, keys = one_a_call(small_session, prompt, **SAMPLED)
    found = small_session.generate(prompt, **SAMPLED).wait()
    check(small_session, found, expected, prompt, keys)
    assert (found.finish_reason, len(found.tokens)) == ("context", N_CTX - length)


def test_sampling_changes_between_calls(small_session: irkit.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    small_session.reset()
    decode, answers, ready = Runtime.decode, [], threading.Event()
    plain = small_session.generate(PROMPT, **SAMPLED).tokens
    small_session.reset()

    def changing(self: Runtime, *arguments: Any) -> Any:
        if len(answers[0]._tokens) == 1 + AT_ONCE:
            answers[0].change(logit_bias={5: 1000.0})
        return decode(self, *arguments)

    monkeypatch.setattr(Runtime, "decode", changing)
    small_session.model.submit(ready.wait)
    answers.append(small_session.generate(PROMPT, **SAMPLED))
    with pytest.raises(OptionError, match="temperature"):
        answers[0].change(temperature=11)
    with pytest.raises(OptionError, match="num_predict"):
        answers[0].change(num_predict=3)
    with pytest.raises(OptionError, match="vocabulary of 258"):
        answers[0].change(logit_bias={258: 1.0})
    ready.set()
    ids = [token.id for token in answers[0].tokens]
    before = 1 + 2 * AT_ONCE  # what was under way is drawn as it was asked for
    assert ids[:before] == [token.id for token in plain[:before]]
    assert {*ids[before:]} == {5}


def test_cancelled_between_calls(small_session: irkit.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    small_session.reset()
    decode, answers, ready = Runtime.decode, [], threading.Event()

    def cancelling(self: Runtime, *arguments: Any) -> Any:
        if len(answers[0].partial_text) > AT_ONCE:
            answers[0].cancel()
        return decode(self, *arguments)

    monkeypatch.setattr(Runtime, "decode", cancelling)
    small_session.model.submit(ready.wait)
    answers.append(small_session.generate(PROMPT, **SAMPLED))
    ready.set()
    (found,) = answers
    assert found.finish_reason == "cancelled"
    assert len(found.tokens) == 1 + 2 * AT_ONCE
    assert small_session._cache.ids == [*PROMPT, *(token.id for token in found.tokens)][:-1]


@pytest.mark.parametrize("count", [2, 5, 7])
def test_what_was_drawn_past_the_end_is_not_taken_for_cached(
    small_session: irkit.Session, calls: list[str], count: int
) -> None:
    begun = small_session.generate(PROMPT, num_predict=count, **SAMPLED).wait()
    other = [*PROMPT, *(token.id for token in begun.tokens), 1, 2]
    found = small_session.generate(other, num_predict=6, **SAMPLED).wait()
    assert found.stats.cached_tokens == len(PROMPT) + count - 1
    found_ids, found_keys = [token.id for token in found.tokens], keys_of(small_session)
    expected, keys = one_a_call(small_session, other, num_predict=6, **SAMPLED)
    assert found_ids == [token.id for token in expected.tokens]
    for mine, theirs in zip(found_keys, keys, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_text_written_on_from_its_cache_is_the_same_text(small_session: irkit.Session, calls: list[str]) -> None:
    whole, _ = one_a_call(small_session, PROMPT, num_predict=16, **SAMPLED)
    ids = list(PROMPT)
    for count in (3, 1, 5, 2, 5):
        part = small_session.generate(ids, num_predict=count, **SAMPLED)
        ids += [token.id for token in part.tokens]
    assert ids == [*PROMPT, *(token.id for token in whole.tokens)]


def test_the_default_model_answers_the_same(session: irkit.Session) -> None:
    if session.model.load().result().at_once == 1:
        pytest.skip("every token is a call here")
    options: dict[str, Any] = {"num_predict": 18, "seed": 3, "temperature": 0.8}
    prompt = session.tokenize("My favourite colour is")
    expected, keys = one_a_call(session, prompt, **options)
    found = session.generate(prompt, **options).wait()
    check(session, found, expected, prompt, keys)
