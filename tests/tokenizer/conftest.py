import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from irkit.tokenizer import Tokenizer, from_gguf

# GPT-2 writes these bytes as themselves and the others, in order, as U+0100 and on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_CHARACTERS = [chr(b) for b in PRINTABLE] + [chr(0x100 + i) for i in range(256 - len(PRINTABLE))]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|user|>", "<s>"]
USER_DEFINED = ["<think>", "</think>", "  "]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld"]


def byte_level_metadata(
    control: Sequence[str] = CONTROL, user_defined: Sequence[str] = USER_DEFINED, **keys: Any
) -> dict[str, Any]:
    """The metadata of a small byte-level BPE vocabulary; `keys` go under tokenizer.ggml."""
    joined = [merge.replace(" ", "") for merge in MERGES]
    tokens = [*BYTE_CHARACTERS, *joined, *control, *user_defined]
    types = [1] * (256 + len(joined)) + [3] * len(control) + [4] * len(user_defined)
    values: dict[str, Any] = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": np.array(types, np.int32),
        "merges": MERGES,
        **keys,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in values.items() if value is not None}


def spm_metadata(**keys: Any) -> dict[str, Any]:
    """The metadata of a small SentencePiece vocabulary."""
    pieces = ["he", "ll", "hell", "hello", "▁w", "or", "▁wor", "ld", "▁world", "▁hello"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces, *"▁helowrd", "<sep>"]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 260) + [4]
    scores = [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)]
    values: dict[str, Any] = {
        "model": "llama",
        "tokens": tokens,
        "token_type": np.array(types, np.int32),
        "scores": np.array(scores, np.float32),
        **keys,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in values.items() if value is not None}


@dataclass
class Opened:
    """Stands in for an open file."""

    metadata: dict[str, Any]


def tokenizer_of(metadata: dict[str, Any]) -> Tokenizer:
    return from_gguf(Opened(metadata))


@pytest.fixture(scope="session")
def byte_level() -> Callable[..., Tokenizer]:
    """Makes a tokenizer of a small byte-level BPE vocabulary."""
    return lambda *args, **keys: tokenizer_of(byte_level_metadata(*args, **keys))


@pytest.fixture(scope="session")
def spm() -> Callable[..., Tokenizer]:
    """Makes a tokenizer of a small SentencePiece vocabulary."""
    return lambda **keys: tokenizer_of(spm_metadata(**keys))


@pytest.fixture(scope="session")
def metadata_of() -> Callable[..., dict[str, Any]]:
    """The metadata of either small vocabulary, by its `tokenizer.ggml.model`."""
    return lambda model, **keys: {"gpt2": byte_level_metadata, "llama": spm_metadata}[model](**keys)


@pytest.fixture(scope="session")
def made_of() -> Callable[[dict[str, Any]], Tokenizer]:
    """The tokenizer that metadata describe."""
    return tokenizer_of


@pytest.fixture(scope="session")
def grows_as_its_length() -> Callable[[Callable[[str], object], str], bool]:
    """Whether 16 times a text takes less than 64 times the time; quadratic work takes 256 times.

    Only this thread's time counts, and one try of three is enough: a collection of all garbage may fall into one.
    """

    def seconds(work: Callable[[str], object], text: str) -> float:
        start = time.thread_time()
        work(text)
        return time.thread_time() - start

    return lambda work, text: any(seconds(work, text * 16) < 64 * seconds(work, text) for _ in range(3))
