"""The vocabulary that a GGUF file's metadata describes, checked once and for all.

Key names and token types are those of the GGUF specification (docs/gguf.md in ggml-org/ggml); which tokens end
a generation, and which are control tokens whatever the file says, follows llama.cpp's src/llama-vocab.cpp.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

import numpy as np

from irkit.errors import ModelFileError, UnsupportedModelError
from irkit.tokenizer.pre_tokenizers import DEFAULT_PRE, PreTokenizer, pre_tokenizers

_PREFIX = "tokenizer.ggml."
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")

# Texts that end a generation in whichever vocabulary they are a token of.
_END_OF_GENERATION = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
)  # fmt: skip
# The roles of fill-in-the-middle tokens: their keys, and the texts they are known by where the key is missing.
_FILL_IN_MIDDLE = {
    ("fim_pre_token_id", "prefix_token_id"): (
        "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
        "<|code_prefix|>", "<|prefix|>",
    ),
    ("fim_suf_token_id", "suffix_token_id"): (
        "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
        "<|code_suffix|>", "<|suffix|>",
    ),
    ("fim_mid_token_id", "middle_token_id"): (
        "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
        "<|code_middle|>", "<|middle|>",
    ),
    ("fim_pad_token_id",): ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    ("fim_rep_token_id",): ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    ("fim_sep_token_id",): ("<|file_sep|>",),
}  # fmt: skip
# A model that has begun another file, or pads, has nothing more to say.
_FILL_IN_MIDDLE_ENDS = ("fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id")


class TokenType(IntEnum):
    """The values of `tokenizer.ggml.token_type`."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model and what they are for; a token id is an index into `tokens`, `ids` the inverse.

    `control` holds the ids of control and unknown tokens, `reclassified` those of them that the file calls
    something else, `user_defined` those of type 4, `rstrip_control` those after which white space is dropped;
    `bytes` maps the ids of byte tokens to their byte. `pre` is None for SentencePiece vocabularies, which have
    `scores`, float32 [vocab]; the others have `merges`, in order. `fill_in_middle` are the tokens before what
    precedes a gap, before what follows it, and before what fills it.
    """

    kind: Literal["gpt2", "llama", "gemma4"]
    tokens: list[str]
    ids: dict[str, int]
    control: frozenset[int]
    reclassified: frozenset[int]
    user_defined: frozenset[int]
    bytes: Mapping[int, int]
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    eog_ids: frozenset[int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    rstrip_control: frozenset[int]
    pre: PreTokenizer | None
    scores: "np.ndarray[Any, np.dtype[np.float32]] | None"
    merges: list[str]
    chat_template: str | None
    fill_in_middle: tuple[int, int, int] | None


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary in a file's metadata.

    Raises:
        UnsupportedModelError: If it is of a kind other than gpt2, llama and gemma4.
        ModelFileError: If keys are missing, of the wrong type, or contradict one another.
    """
    kind = _get(metadata, "model", str)
    if kind not in ("gpt2", "llama", "gemma4"):
        raise UnsupportedModelError(
            f"{_PREFIX}model is {_short(kind)}: irkit has tokenizers for gpt2, llama and gemma4"
        )
    tokens = _read_tokens(metadata)
    ids = {text: id for id, text in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = next(text for id, text in enumerate(tokens) if ids[text] != id)
        raise ModelFileError(f"{_PREFIX}tokens holds {_short(twice)} twice")
    types = _read_types(metadata, tokens)
    is_spm = kind == "llama"

    def special(name: str, default: int | None = None) -> int | None:
        id = _get(metadata, f"{name}_token_id", int, default)
        if id is not None and not 0 <= id < len(tokens):
            if id == default:
                return None
            raise ModelFileError(f"{_PREFIX}{name}_token_id is {id}, but there are {len(tokens)} tokens")
        return id

    bos_id = special("bos", 1 if is_spm else None)
    eos_id = special("eos", 2 if is_spm else None)
    unknown_id = special("unknown", 0 if is_spm else None)
    named_ends = {special(name) for name in ("eot", "eom")} - {None}

    eog = {ids[text] for text in _END_OF_GENERATION if text in ids}
    forced_control = set(eog)
    fills: list[int | None] = []
    for keys, texts in _FILL_IN_MIDDLE.items():
        names = [key.removesuffix("_token_id") for key in keys]
        id = next((id for name in names if (id := special(name)) is not None), None)
        if id is None and (found := [ids[text] for text in texts if text in ids]):
            id = min(found)
            forced_control.add(id)
        fills.append(id)
        if id is not None and keys[0] in _FILL_IN_MIDDLE_ENDS:
            eog.add(id)
    prefix, suffix, middle, *_ = fills
    filled = None if prefix is None or suffix is None or middle is None else (prefix, suffix, middle)
    eog |= {id for id in (eos_id, *named_ends) if id is not None}
    # In these two vocabularies one of the texts is an ordinary mark inside an answer.
    ends = {tokens[id] for id in eog}
    if "<|end|>" in ends and ends & {"<|call|>", "<|calls|>"} and ends & {"<|return|>", "<|flush|>"}:
        eog.discard(ids["<|end|>"])
    if "</s>" in ends and ends & {"<|tool_response>", "<|plamo:eos|>"}:
        eog.discard(ids["</s>"])
        forced_control.discard(ids["</s>"])

    # A text that ends a generation must not be forged by a user, even if the file calls it an ordinary token.
    reclassified = frozenset(id for id in forced_control if types[id] != TokenType.CONTROL)
    types[list(reclassified)] = TokenType.CONTROL
    pre = None if is_spm else _read_pre(metadata, kind)
    add_bos = _get(metadata, "add_bos_token", bool, None)
    add_eos = _get(metadata, "add_eos_token", bool, False)
    if (add_bos and bos_id is None) or (add_eos and eos_id is None):
        name = "bos" if add_bos and bos_id is None else "eos"
        raise ModelFileError(f"{_PREFIX}add_{name}_token is set, but {_PREFIX}{name}_token_id is missing")
    if add_bos is None:
        add_bos = (pre is None or pre.add_bos) and bos_id is not None
    control = frozenset(np.flatnonzero(np.isin(types, (TokenType.CONTROL, TokenType.UNKNOWN))).tolist())
    user_defined = frozenset(np.flatnonzero(types == TokenType.USER_DEFINED).tolist())
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise ModelFileError("tokenizer.chat_template is not a string")
    return Vocabulary(
        kind=kind,
        tokens=tokens,
        ids=ids,
        control=control,
        reclassified=reclassified,
        user_defined=user_defined,
        bytes=_read_bytes(tokens, types),
        bos_id=bos_id,
        eos_id=eos_id,
        unknown_id=unknown_id,
        eog_ids=frozenset(eog),
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=_get(metadata, "add_space_prefix", bool, True) and is_spm,
        rstrip_control=_rstripped(metadata, tokens, control | user_defined) if is_spm else frozenset(),
        pre=pre,
        scores=_read_numbers(metadata, "scores", "iuf", len(tokens)).astype(np.float32) if is_spm else None,
        merges=[] if is_spm else _read_merges(metadata),
        chat_template=template,
        fill_in_middle=filled,
    )


_MISSING: Any = object()


def _get(metadata: Mapping[str, Any], name: str, kind: type, default: Any = _MISSING) -> Any:
    value = metadata.get(_PREFIX + name, default)
    if value is _MISSING:
        raise ModelFileError(f"{_PREFIX}{name} is missing")
    # bool is a subclass of int, and `true` is no token id.
    if value is not default and type(value) is not kind:
        raise ModelFileError(f"{_PREFIX}{name} is not of type {kind.__name__}")
    return value


def _read_tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = _get(metadata, "tokens", list)
    if set(map(type, tokens)) != {str}:
        raise ModelFileError(f"{_PREFIX}tokens is not a list of strings, or empty")
    # Several tokens may be empty: they get llama.cpp's names, to stay apart.
    return [text or f"[EMPTY_{id}]" for id, text in enumerate(tokens)] if "" in tokens else tokens


def _read_numbers(metadata: Mapping[str, Any], name: str, kinds: str, count: int) -> "np.ndarray[Any, Any]":
    value = _get(metadata, name, np.ndarray)
    if value.dtype.kind not in kinds or value.ndim != 1:
        raise ModelFileError(f"{_PREFIX}{name} is not an array of numbers of the right type")
    if len(value) != count:
        raise ModelFileError(f"{_PREFIX}{name} has {len(value)} entries for {count} tokens")
    if value.dtype.kind == "f" and np.isnan(value).any():
        raise ModelFileError(f"{_PREFIX}{name} holds NaN")
    return value


def _read_types(metadata: Mapping[str, Any], tokens: list[str]) -> "np.ndarray[Any, Any]":
    if f"{_PREFIX}token_type" not in metadata:
        return np.full(len(tokens), TokenType.NORMAL)
    return _read_numbers(metadata, "token_type", "iu", len(tokens)).copy()


def _read_bytes(tokens: list[str], types: "np.ndarray[Any, Any]") -> dict[int, int]:
    values = {}
    for id in np.flatnonzero(types == TokenType.BYTE).tolist():
        match = _BYTE_TOKEN.fullmatch(tokens[id])
        if match is None:
            raise ModelFileError(f"{_PREFIX}tokens[{id}] is a byte token, but reads {_short(tokens[id])}")
        values[id] = int(match[1], 16)
    return values


def _read_merges(metadata: Mapping[str, Any]) -> list[str]:
    # Kimi-K2 comes without merges: its words are looked up whole, and else taken byte by byte.
    default = [] if metadata.get(f"{_PREFIX}pre") == "kimi-k2" else _MISSING
    merges = _get(metadata, "merges", list, default)
    if not set(map(type, merges)) <= {str}:
        raise ModelFileError(f"{_PREFIX}merges is not a list of strings")
    return merges


def _read_pre(metadata: Mapping[str, Any], kind: str) -> PreTokenizer:
    known = pre_tokenizers()
    name = "gemma4" if kind == "gemma4" else _get(metadata, "pre", str, "")
    if name in known:
        return known[name]
    state = f"is {_short(name)}, which irkit does not know" if name else "is missing"
    warnings.warn(
        f"{_PREFIX}pre {state}: text is split as for {DEFAULT_PRE!r}, which may not be how the model was trained",
        stacklevel=4,
    )
    return known[DEFAULT_PRE]


def _rstripped(metadata: Mapping[str, Any], tokens: list[str], special: frozenset[int]) -> frozenset[int]:
    # Phi-3 was trained without the white space after its turn marks, and its file does not say so.
    name = str(metadata.get("general.name", "")).lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    return frozenset(id for id in special if tokens[id] not in ("<unk>", "<s>", "<|endoftext|>"))


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
