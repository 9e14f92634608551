"""Answers of a given form: which tokens may come next, as bits that the sampler is given.

llguidance turns a JSON schema into a grammar, goes through it with the answer, and finds the tokens of the vocabulary
that the rest of the grammar can begin with.
"""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np

from irkit.engine.worker import start_deep
from irkit.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llguidance import LLTokenizer

    from irkit.tokenizer import Tokenizer

MOST_BYTES = 1 << 16
"""Of a schema, as JSON: of one that is nothing but properties, llguidance takes half a second."""
# A schema that takes more is refused, at once or when an answer gets there. The fuel of a step is about 15 ms.
_LIMITS: dict[str, Any] = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
# Between the parts of an object: nothing, a space, or a line break and an indentation. The standard allows any white
# space, of which small models make no end.
_WHITESPACE = r" |\n[ \t]{0,32}"


def grammar(format: str | Mapping[str, Any]) -> str:
    """llguidance's grammar of what the option `format` asks for: of any JSON object where it is "json".

    Raises:
        OptionError: it is no JSON, or too long.
    """
    from llguidance import LLMatcher

    try:
        schema = json.dumps({"type": "object"} if format == "json" else format, allow_nan=False)
        made = LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": _WHITESPACE})
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"option format: {_line(str(error))}") from None
    if len(schema) > MOST_BYTES:
        raise OptionError(f"option format: the schema has {len(schema)} bytes; up to {MOST_BYTES} are read")
    return made


class _Tokens:
    """A tokenizer as llguidance asks for it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = range(tokenizer.vocab_size)
        self.tokens = [tokenizer.token_bytes(id) for id in ids]
        self.special_token_ids = [id for id in ids if tokenizer.is_control(id)]
        self.bos_token_id = tokenizer.bos_id
        self.eos_token_id = tokenizer.eos_id
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special=False, at_start=False)


def vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    """The tokens of a model, in the trie that masks are found with: a quarter of a second for 50,000 of them."""
    from llguidance import LLTokenizer, TokenizerWrapper

    ends: list[int] = sorted(tokenizer.eog_ids)
    return LLTokenizer(TokenizerWrapper(_Tokens(tokenizer)), n_vocab=tokenizer.vocab_size, eos_token=ends)


class Form:
    """What an answer is to look like, as far as it has got."""

    def __init__(self, vocabulary: LLTokenizer, grammar: str) -> None:
        """Of an answer of which there is nothing yet.

        Raises:
            OptionError: there is no such grammar, it has something that llguidance does not know, or is too large.
        """
        from llguidance import LLMatcher, LLParserLimits

        limits, made = LLParserLimits(**_LIMITS), Future[LLMatcher]()

        def make() -> None:
            matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
            matcher.compute_bitmask()  # some of what is wrong with a schema shows only when it is begun with
            made.set_result(matcher)

        start_deep(threading.Thread(target=make))  # it calls itself for each level of a schema, of which 128 are read
        self._matcher = made.result()
        self._words = -(-vocabulary.vocab_size // 32)
        self.seconds = 0.0
        """What finding the tokens has taken."""
        self._check()

    def allowed(self) -> np.ndarray:
        """A bit for each token that may come next: uint32 `[1, vocabulary / 32]`, the first token's the lowest."""
        began = time.perf_counter()
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[None, : self._words]
        self.seconds += time.perf_counter() - began
        self._check()
        return bits

    def take(self, token: int) -> bool:
        """Go on behind `token`; whether the answer is at its end, as nothing more can come."""
        began = time.perf_counter()
        self._matcher.consume_token(token)
        self.seconds += time.perf_counter() - began
        self._check()
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = _line(self._matcher.get_error())
            # Of a schema that refers to nothing but itself, only the reason is named why there is no text of it.
            raise OptionError(f"option format: {'nothing fits it' if reason.startswith('NoExtension') else reason}")


def _line(text: str) -> str:
    line = " ".join(text.partition("<non-verbose")[0].split())
    return line if len(line) <= 300 else f"{line[:297]}..."
