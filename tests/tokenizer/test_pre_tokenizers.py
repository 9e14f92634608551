"""Every name in the table of pre-tokenizers makes a tokenizer that loses nothing."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irkit.tokenizer import Tokenizer
from irkit.tokenizer.bpe import word_splitter
from irkit.tokenizer.pre_tokenizers import pre_tokenizers

NAMES = sorted(pre_tokenizers())
# One name for each different way to split.
DIFFERENT = sorted({pre: name for name, pre in pre_tokenizers().items()}.values())


def test_the_table_is_complete() -> None:
    assert len(NAMES) == 91
    assert {"default", "llama-bpe", "qwen2", "smollm", "gpt-2", "tekken", "gpt-4o", "deepseek-v3"} <= set(NAMES)


@pytest.fixture(scope="module")
def tokenizers(byte_level: Callable[..., Tokenizer]) -> dict[str, Tokenizer]:
    return {name: byte_level(pre=name) for name in NAMES}


def test_every_name_makes_a_tokenizer(tokenizers: dict[str, Tokenizer]) -> None:
    text = "Don't split 12345 words\r\n\n\tor 漢字 éÉ — !?"
    for name, pre in pre_tokenizers().items():
        if pre.byte_encode:
            assert tokenizers[name].decode(tokenizers[name].encode(text)) == text, name


@settings(max_examples=50)
@given(st.text(max_size=20))
def test_no_way_to_split_loses_text(tokenizers: dict[str, Tokenizer], text: str) -> None:
    for name in DIFFERENT:
        if pre_tokenizers()[name].byte_encode:
            assert tokenizers[name].decode(tokenizers[name].encode(text, parse_special=True), False) == text, name


def split(name: str, text: str) -> list[str]:
    """The words of `text`."""
    words = word_splitter(pre_tokenizers()[name]).pre_tokenize_str(text)
    return [text[start:stop] for _, (start, stop) in words]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("default", "a  b12345", ["a", " ", " b", "123", "45"]),
        ("llama-bpe", "I'LL pay 12345!\n\n x", ["I", "'LL", " pay", " ", "123", "45", "!\n\n", " x"]),
        ("qwen2", "x 123", ["x", " ", "1", "2", "3"]),
        ("smollm", "x 123", ["x", " ", "1", "2", "3"]),
        ("gpt-2", "x 123  y", ["x", " 123", " ", " y"]),
        ("tekken", "HelloWorld", ["Hello", "World"]),
        ("deepseek-v3", "x1234漢字", ["x", "123", "4", "漢字"]),
        ("afmoe", "x 12345", ["x", " ", "12", "345"]),
        ("kimi-k2", "我是Kimi的123456", ["我是", "Kimi", "的", "123", "456"]),
        ("gemma4", "a b\n\nc", ["a b", "\n\n", "c"]),
    ],
)
def test_words_are_cut_where_the_model_was_trained_to_see_them(name: str, text: str, words: list[str]) -> None:
    assert split(name, text) == words


@pytest.mark.parametrize(
    ("name", "original"),
    [("tiny_aya", r"\d{1,3}(?=(?:\d{3})*\b)"), ("superbpe", r"(?=(\d{3})+(?!\d))")],
)
@given(text=st.text("0123456789x. ", max_size=20))
def test_digits_are_grouped_as_by_the_quadratic_regex(name: str, original: str, text: str) -> None:
    pre = pre_tokenizers()[name]
    # Two of the regexes stand for the original; what follows them is unchanged.
    last = pre.regex[2:] if name == "tiny_aya" else ()
    slow = replace(pre, regex=(*(("\\p{N}+",) if name == "superbpe" else ()), original, *last))
    words = word_splitter(slow).pre_tokenize_str(text)
    assert split(name, text) == [text[start:stop] for _, (start, stop) in words]


@pytest.mark.parametrize("text", [" ", "7", "A", "é漢", "\n", "a1 ", "'", "\t x"])
def test_time_grows_as_the_length(
    tokenizers: dict[str, Tokenizer], text: str, grows_as_its_length: Callable[..., bool]
) -> None:
    for name in DIFFERENT:
        assert grows_as_its_length(tokenizers[name].encode, text * (1200 // len(text))), name
