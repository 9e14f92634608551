"""The tokenizer for `tokenizer.ggml.model` llama, against the sentencepiece package on models trained here."""

import io
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from irkit.tokenizer import Tokenizer

with warnings.catch_warnings():
    # The package's compiled part warns of itself.
    warnings.simplefilter("ignore", DeprecationWarning)
    sentencepiece: Any = pytest.importorskip("sentencepiece")

LETTERS = "abcdefgh é漢😀"


def _train(prefix: bool, fallback: bool) -> Any:
    source = random.Random(1)
    words = ["".join(source.choices("abcdefghé漢", k=source.randint(1, 7))) for _ in range(120)]
    lines = (" ".join(source.choices(words, k=12)) for _ in range(1500))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=500,
        hard_vocab_limit=False,
        byte_fallback=fallback,
        add_dummy_prefix=prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<sep>"],
        control_symbols=["<ctl>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def _metadata(model: Any, prefix: bool) -> dict[str, Any]:
    ids = range(model.get_piece_size())
    kinds = {model.is_unknown: 2, model.is_control: 3, model.is_byte: 6, model.is_unused: 5}
    types = [next((number for asks, number in kinds.items() if asks(id)), 1) for id in ids]
    types[model.piece_to_id("<sep>")] = 4
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(id) for id in ids],
        "tokenizer.ggml.scores": np.array([model.get_score(id) for id in ids], np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
        "tokenizer.ggml.add_space_prefix": prefix,
    }


@pytest.fixture(scope="module", params=[(True, True), (False, True), (True, False)], ids=["prefix", "bare", "no-bytes"])
def pair(request: pytest.FixtureRequest, made_of: Callable[[dict[str, Any]], Tokenizer]) -> tuple[Any, Tokenizer]:
    """A sentencepiece model, and our tokenizer of it."""
    prefix, fallback = request.param
    model = _train(prefix, fallback)
    return model, made_of(_metadata(model, prefix))


@given(st.one_of(st.text(LETTERS, max_size=60), st.text(max_size=20)))
def test_ids_are_those_of_sentencepiece(pair: tuple[Any, Tokenizer], text: str) -> None:
    # U+0000 ends the text for sentencepiece, and before the user-defined token it always puts a space.
    model, tokenizer = pair
    text = text.replace("\0", "").replace("<sep>", "")
    assert tokenizer.encode(text, add_special=False) == model.encode(text)


@given(st.text(LETTERS, max_size=60))
def test_decoding_is_that_of_sentencepiece(pair: tuple[Any, Tokenizer], text: str) -> None:
    model, tokenizer = pair
    ids = model.encode(text)
    # sentencepiece shows an unknown token as "⁇", which is a matter of taste.
    if model.unk_id() not in ids:
        assert tokenizer.decode(ids) == model.decode(ids) == text


def test_special_tokens(pair: tuple[Any, Tokenizer]) -> None:
    model, tokenizer = pair
    control = model.piece_to_id("<ctl>")
    separator = model.piece_to_id("<sep>")
    assert tokenizer.encode("a") == [model.bos_id(), *model.encode("a")]
    assert tokenizer.encode("<ctl>", add_special=False, parse_special=True) == [control]
    assert control not in tokenizer.encode("<ctl>")
    assert tokenizer.encode("<sep>", add_special=False) == [separator]
    assert tokenizer.eog_ids == {model.eos_id()}
    assert tokenizer.decode([control, separator]) == "<sep>"
