"""How text is split into words before byte-level BPE: the table of `tokenizer.ggml.pre` names."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DEFAULT_PRE = "default"


@dataclass(frozen=True)
class PreTokenizer:
    """What a `tokenizer.ggml.pre` name stands for.

    `regex` is applied in order, each cutting the pieces of the one before (Oniguruma syntax). With
    `byte_encode` the model works on GPT-2's printable stand-ins for bytes, else on characters, where
    `escape_whitespaces` writes a space as ▁. `ignore_merges` takes a word that is a token as it is.
    """

    regex: tuple[str, ...]
    ignore_merges: bool
    add_bos: bool
    byte_encode: bool
    escape_whitespaces: bool


@cache
def pre_tokenizers() -> Mapping[str, PreTokenizer]:
    """Every known `tokenizer.ggml.pre` name; read off llama.cpp's src/llama-vocab.cpp and src/unicode.cpp."""
    groups = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
    return {
        name: PreTokenizer(
            regex=tuple(group["regex"]),
            ignore_merges=group["ignore_merges"],
            add_bos=group["add_bos"],
            byte_encode=group["byte_encode"],
            escape_whitespaces=group["escape_whitespaces"],
        )
        for group in groups
        for name in group["names"]
    }
