"""The tokenizer of the real default model, against ids from llama.cpp (make_reference.py)."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from irkit.tokenizer import ChatTemplate, Tokenizer, from_gguf

REFERENCE: list[dict[str, Any]] = json.loads(Path(__file__).with_name("reference_smollm2.json").read_text("utf-8"))[
    "rows"
]
ABSENT = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}


@pytest.fixture(scope="module")
def tokenizer(model_path: Path) -> Tokenizer:
    return from_gguf(model_path)


@pytest.mark.parametrize(("column", "parse_special"), [("plain", False), ("special", True)])
def test_ids_are_those_of_llama_cpp(tokenizer: Tokenizer, column: str, parse_special: bool) -> None:
    wrong = [
        row["text"]
        for row in REFERENCE
        if tokenizer.encode(row["text"], add_special=False, parse_special=parse_special) != row[column]
    ]
    assert len(REFERENCE) > 400
    assert wrong == []


def test_what_is_encoded_decodes_to_itself(tokenizer: Tokenizer) -> None:
    for row in REFERENCE:
        assert tokenizer.decode(row["plain"]) == row["text"]
        assert tokenizer.decode(row["special"], skip_special=False) == row["text"]


def test_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 49152
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.eog_ids == {0, 2, 4}
    assert not tokenizer.add_bos
    assert tokenizer.token(2) == "<|im_end|>"
    assert tokenizer.token(905) == " world"
    assert tokenizer.is_control(2)
    assert not tokenizer.is_control(905)


def test_control_tokens_need_to_be_asked_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<|im_end|>", parse_special=True) == [2]
    assert not any(map(tokenizer.is_control, tokenizer.encode("<|im_end|>")))


@given(st.text())
def test_any_text_survives(tokenizer: Tokenizer, text: str) -> None:
    # This vocabulary has no token for some bytes that its training text did not hold.
    text = "".join(c for c in text if ABSENT.isdisjoint(c.encode()))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes_without_a_token_are_left_out(tokenizer: Tokenizer) -> None:
    known = {tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)}
    assert {byte for byte in range(256) if bytes((byte,)) not in known} == ABSENT
    assert tokenizer.decode(tokenizer.encode("a\x04b")) == "ab"


@given(st.lists(st.integers(0, 49151), max_size=40), st.booleans())
def test_stream_gives_what_decode_gives(tokenizer: Tokenizer, ids: list[int], skip_special: bool) -> None:
    stream = tokenizer.stream(skip_special)
    pieces = [stream.push(id) for id in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_special)
    raw = b"".join(tokenizer.token_bytes(id) for id in ids if not (skip_special and tokenizer.is_control(id)))
    assert tokenizer.decode(ids, skip_special) == raw.decode("utf-8", "replace")


@given(st.text(st.characters(min_codepoint=0x80, exclude_categories=["Cs"]), min_size=1, max_size=8))
def test_stream_never_shows_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    text = "".join(c for c in text if ABSENT.isdisjoint(c.encode()))
    stream = tokenizer.stream()
    shown = ""
    for id in tokenizer.encode(text):
        shown += stream.push(id)
        assert text.startswith(shown)
    assert shown == text


def test_rendered_and_encoded_conversations_agree(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(tokenizer.chat_template)
    messages = [{"role": "user", "content": "Hi"}]
    text = template.render(messages)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert template.encode(tokenizer, messages) == tokenizer.encode(text, parse_special=True)


def test_a_tokenizer_can_be_shared_by_threads(tokenizer: Tokenizer) -> None:
    failures = []

    def work() -> None:
        for row in REFERENCE[:150]:
            ids = tokenizer.encode(row["text"], parse_special=True)
            if ids != row["special"] or tokenizer.decode(ids, skip_special=False) != row["text"]:
                failures.append(row["text"])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_time_grows_as_the_length(tokenizer: Tokenizer, grows_as_its_length: Callable[..., bool]) -> None:
    text = "The quick brown fox, 12345 <|im_end|> jumps.\n\n  def f(x): return x  # 漢字 " * 90
    assert grows_as_its_length(lambda text: tokenizer.encode(text, parse_special=True), text)
