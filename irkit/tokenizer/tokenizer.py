"""Text to token ids and back, as llama.cpp does it for the same file."""

import codecs
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from irkit.errors import OptionError
from irkit.garbage import uncollected
from irkit.tokenizer.answers import MARKERS
from irkit.tokenizer.bpe import build
from irkit.tokenizer.vocabulary import Vocabulary, read_vocabulary

_SPACE = "▁"


class MetadataSource(Protocol):
    """An open GGUF file, as far as a tokenizer needs one."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The metadata of the file, by key."""
        ...


def from_gguf(source: "str | Path | MetadataSource") -> "Tokenizer":
    """The tokenizer that a GGUF file describes.

    Warns if the file does not say, or in words irkit does not know, how text is split (`tokenizer.ggml.pre`).

    Args:
        source: The path of a GGUF file (it may hold a vocabulary only), or an open `irkit.gguf.File`.

    Raises:
        ModelFileError: If the metadata is damaged or contradicts itself.
        UnsupportedModelError: If the tokenizer is of a kind irkit does not have.
    """
    if isinstance(source, str | Path):
        from irkit import gguf

        with gguf.open(source) as file:
            return from_gguf(file)
    with uncollected():
        return Tokenizer(read_vocabulary(source.metadata))


class Tokenizer:
    """Turns text into token ids and back. Made by `from_gguf`; it never changes, so threads may share it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._model = build(vocabulary)
        # Merges and scores are as large as all the rest, and now in the model.
        self._vocabulary = replace(vocabulary, ids={}, merges=[], scores=None)
        tokens = vocabulary.tokens
        self._markers = frozenset(id for id in vocabulary.control if tokens[id] in MARKERS)
        self._user_defined = _Finder({tokens[id]: id for id in vocabulary.user_defined})
        self._special = _Finder({tokens[id]: id for id in vocabulary.user_defined | vocabulary.control})
        escaped = vocabulary.pre is None or vocabulary.pre.escape_whitespaces
        self._escape = {" ": _SPACE} if escaped else {}
        self._is_byte_level = vocabulary.pre is not None and vocabulary.pre.byte_encode

    @property
    def vocab_size(self) -> int:
        """How many tokens there are; ids run from 0 to one less."""
        return len(self._vocabulary.tokens)

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, if there is one."""
        return self._vocabulary.bos_id

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text, if there is one."""
        return self._vocabulary.eos_id

    @property
    def eog_ids(self) -> frozenset[int]:
        """The tokens that end a generation."""
        return self._vocabulary.eog_ids

    @property
    def add_bos(self) -> bool:
        """Whether `encode` begins a text with `bos_id`."""
        return self._vocabulary.add_bos

    @property
    def chat_template(self) -> str | None:
        """The source of the chat template in the file, if it has one."""
        return self._vocabulary.chat_template

    @property
    def fills_in(self) -> bool:
        """Whether there are tokens to ask with for what belongs between two texts."""
        return self._vocabulary.fill_in_middle is not None

    def encode_around(self, before: str, after: str) -> list[int]:
        """The ids of a prompt for what belongs between two texts: each behind its token, and that of the gap last.

        Raises:
            OptionError: If the vocabulary has no tokens for it, or a text cannot be encoded.
        """
        if self._vocabulary.fill_in_middle is None:
            raise OptionError("the vocabulary has no tokens for filling in the middle")
        prefix, suffix, middle = self._vocabulary.fill_in_middle
        start = [self.bos_id] if self.add_bos and self.bos_id is not None else []
        texts = (self.encode(text, add_special=False) for text in (before, after))
        return [*start, prefix, *next(texts), suffix, *next(texts), middle]

    def is_control(self, id: int) -> bool:
        """Whether a token is a control (or the unknown) token, which text alone never becomes.

        Raises:
            OptionError: If there is no such token.
        """
        return self._check(id) in self._vocabulary.control

    def token_bytes(self, id: int) -> bytes:
        """The bytes a token stands for; of a control token, its name.

        Raises:
            OptionError: If there is no such token.
        """
        id = self._check(id)
        vocabulary = self._vocabulary
        text = vocabulary.tokens[id]
        if id in vocabulary.control or id in vocabulary.user_defined:
            return text.encode()
        if (byte := vocabulary.bytes.get(id)) is not None:
            return bytes((byte,))
        if self._is_byte_level:
            try:
                return text.translate(_BYTE_OF_CHARACTER).encode("latin-1")
            except UnicodeEncodeError:
                return text.encode()
        return (text.replace(_SPACE, " ") if self._escape else text).encode()

    @cached_property
    def longest(self) -> int:
        """Characters of the longest token."""
        return max(len(self.token(id)) for id in range(self.vocab_size))

    def token(self, id: int) -> str:
        """A token as text to show; what is no UTF-8 by itself becomes U+FFFD.

        Raises:
            OptionError: If there is no such token.
        """
        return self.token_bytes(id).decode("utf-8", "replace")

    def encode(
        self, text: str, add_special: bool = True, parse_special: bool = False, at_start: bool = True
    ) -> list[int]:
        """The ids of a text. Bytes that the vocabulary has no token for are left out.

        Args:
            text: Any text. User-defined tokens in it, such as runs of spaces, are always found.
            add_special: Begin with BOS and end with EOS if the model expects it and they are not there already.
            parse_special: Read the names of control tokens, such as <|im_end|>, as those tokens. Not for text
                of unknown origin: see `ChatTemplate.encode`.
            at_start: Whether `text` begins a text, rather than goes on with one. Only then do some vocabularies
                put a space before it.

        Raises:
            OptionError: If `text` is no string, or one that cannot be written as UTF-8.
        """
        ids = self._encode(text, self._special if parse_special else self._user_defined, b"", at_start)
        if add_special:
            vocabulary = self._vocabulary
            if vocabulary.add_bos and vocabulary.bos_id is not None and ids[:1] != [vocabulary.bos_id]:
                ids.insert(0, vocabulary.bos_id)
            if vocabulary.add_eos and vocabulary.eos_id is not None and ids[-1:] != [vocabulary.eos_id]:
                ids.append(vocabulary.eos_id)
        return ids

    def encode_protected(self, text: str, protected: bytes) -> list[int]:
        """The ids of a text in which control tokens are found, but not where characters are protected.

        Args:
            text: Any text.
            protected: One byte for each character of `text`: 1 if no control token may take part of it, else 0.

        Raises:
            OptionError: As `encode`.
        """
        return self._encode(text, self._special, protected)

    @property
    def control_texts(self) -> list[str]:
        """The names of all control tokens, such as <|im_end|>."""
        return [self._vocabulary.tokens[id] for id in self._vocabulary.control]

    def decode(self, ids: Iterable[int], skip_special: bool = True, at_start: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD.

        Args:
            ids: Token ids.
            skip_special: Leave control tokens out, else write their names.
            at_start: Whether the ids begin a text, rather than go on with one. Only then is the space that
                `encode` puts before a text (for some vocabularies) taken away again.

        Raises:
            OptionError: If an id is not in the vocabulary.
        """
        stream = self.stream(skip_special, at_start)
        return "".join([*map(stream.push, _iterated(ids)), stream.flush()])

    def stream(self, skip_special: bool = True, at_start: bool = True, markers: bool = False) -> "TokenStream":
        """Decodes ids one at a time; the arguments are those of `decode`.

        With `markers`, control tokens that set thinking or calls of tools off are written even if special ones are
        skipped: `AnswerReader` needs their names.
        """
        skipped = (
            self._vocabulary.control - (self._markers if markers else frozenset()) if skip_special else frozenset()
        )
        return TokenStream(self, skipped, at_start and self._vocabulary.add_space_prefix)

    def _check(self, id: int) -> int:
        try:
            index = operator.index(id)
        except TypeError:
            raise OptionError(f"{id!r:.60} is not a token id") from None
        if not 0 <= index < len(self._vocabulary.tokens):
            raise OptionError(f"token id {index} is not in the vocabulary, which ends at {self.vocab_size - 1}")
        return index

    def _encode(self, text: str, finder: "_Finder", protected: bytes, at_start: bool = True) -> list[int]:
        if not isinstance(text, str):
            raise OptionError(f"a text must be a string, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise OptionError(
                f"the text cannot be written as UTF-8: character {error.start} is a lone surrogate"
            ) from None
        vocabulary = self._vocabulary
        ids: list[int] = []
        position = 0
        for start, stop, id in finder.find(text, vocabulary.control if protected else frozenset(), protected):
            ids += self._encode_plain(text[position:start], at_start)
            ids.append(id)
            position, at_start = stop, True
            if id in vocabulary.rstrip_control:
                position += len(text) - stop - len(text[stop:].lstrip())
        ids += self._encode_plain(text[position:], at_start)
        return ids

    def _encode_plain(self, text: str, at_start: bool) -> list[int]:
        if not text:
            return []
        if at_start and self._vocabulary.add_space_prefix:
            text = " " + text
        for space, escaped in self._escape.items():
            text = text.replace(space, escaped)
        return self._model.encode(text, add_special_tokens=False).ids


class TokenStream:
    """Decodes token ids one at a time: `push` gives the text that is complete, `flush` what is left at the end.

    All of it together is what `Tokenizer.decode` gives for all the ids.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int], strip_space: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._strip_space = strip_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that `id` completes: empty while a character still lacks bytes.

        Raises:
            OptionError: If there is no such token.
        """
        piece = self._tokenizer.token_bytes(id)
        if id in self._skipped:
            return ""
        if self._strip_space:
            piece = piece.removeprefix(b" ")
            self._strip_space = False
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """The rest: U+FFFD if the last character is not complete."""
        return self._decoder.decode(b"", final=True)


class _Finder:
    """Finds tokens in text by their names: the leftmost, and of those that start there the longest."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = ids
        lengths: dict[str, set[int]] = {}
        for name in ids:
            lengths.setdefault(name[0], set()).add(len(name))
        # Thousands of names share few first characters and lengths, so looking each length up in a dict takes
        # less time than one regular expression of all names.
        self._lengths = {first: sorted(sizes, reverse=True) for first, sizes in lengths.items()}
        self._first = re.compile(f"[{re.escape(''.join(lengths))}]") if lengths else None

    def find(self, text: str, control: frozenset[int], protected: bytes) -> Iterator[tuple[int, int, int]]:
        """Start, stop and id of each; those in `control` only where no character is `protected`."""
        position = 0
        while self._first is not None and (match := self._first.search(text, position)):
            start = match.start()
            position = start + 1
            for size in self._lengths[match[0]]:
                stop = start + size
                id = self._ids.get(text[start:stop])
                if id is None or (id in control and protected.find(1, start, stop) >= 0):
                    continue
                yield start, stop, id
                position = stop
                break


def _iterated(ids: Iterable[int]) -> Iterator[int]:
    try:
        return iter(ids)
    except TypeError:
        raise OptionError(f"token ids must be a sequence of integers, not {type(ids).__name__}") from None


def _byte_of_character() -> dict[int, int]:
    """GPT-2's printable stand-ins for bytes (openai/gpt-2, src/encoder.py, `bytes_to_unicode`), turned round.

    Bytes that print in Latin-1 stand for themselves; the others, in order, are written from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {byte: byte for byte in printable} | {0x100 + index: byte for index, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()
