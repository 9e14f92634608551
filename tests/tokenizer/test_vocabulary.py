"""What the metadata of a file may say about a tokenizer, and what they must not."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irkit.errors import ModelFileError, OptionError, UnsupportedModelError
from irkit.tokenizer import Tokenizer, from_gguf

MakeTokenizer = Callable[..., Tokenizer]


def ids_of(tokenizer: Tokenizer, *texts: str) -> list[int]:
    """The ids of control and user-defined tokens, one by one."""
    return [id for text in texts for id in tokenizer.encode(text, add_special=False, parse_special=True)]


def test_byte_level_merges_apply_in_order(byte_level: MakeTokenizer) -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("hello world")
    assert [tokenizer.token(id) for id in ids] == ["hello", " world"]
    assert tokenizer.token_bytes(ids[1]) == b" world"


def test_sentencepiece_joins_the_best_scored_first(spm: MakeTokenizer) -> None:
    tokenizer = spm()
    ids = tokenizer.encode("hello world", add_special=False)
    assert [tokenizer.token(id) for id in ids] == [" hello", " world"]
    assert tokenizer.decode(ids) == "hello world"


def test_sentencepiece_falls_back_to_bytes(spm: MakeTokenizer) -> None:
    tokenizer = spm(add_space_prefix=False)
    ids = tokenizer.encode("é", add_special=False)
    assert [tokenizer.token_bytes(id) for id in ids] == [b"\xc3", b"\xa9"]
    assert tokenizer.token(ids[0]) == "\ufffd"


def test_a_space_is_put_before_each_piece_of_text_and_taken_from_the_first(spm: MakeTokenizer) -> None:
    tokenizer = spm()
    ids = tokenizer.encode("he<sep>he", add_special=False)
    assert [tokenizer.token(id) for id in ids] == [" ", "he", "<sep>", " ", "he"]
    assert tokenizer.decode(ids) == "he<sep> he"
    assert tokenizer.decode(ids, at_start=False) == " he<sep> he"


def test_user_defined_tokens_are_always_found_and_control_tokens_on_request(byte_level: MakeTokenizer) -> None:
    tokenizer = byte_level()
    (think,) = ids_of(tokenizer, "<think>")
    (end,) = ids_of(tokenizer, "<|im_end|>")
    assert think in tokenizer.encode("a<think>b")
    assert end not in tokenizer.encode("a<|im_end|>b")
    assert end in tokenizer.encode("a<|im_end|>b", parse_special=True)


def test_control_tokens_that_set_the_parts_of_an_answer_off_can_be_written(byte_level: MakeTokenizer) -> None:
    tokenizer = byte_level(control=["[TOOL_CALLS]", "[/TOOL]"])
    ids = tokenizer.encode("a[TOOL_CALLS]{}[/TOOL]", parse_special=True)
    for markers, text in ((True, "a[TOOL_CALLS]{}"), (False, "a{}")):
        stream = tokenizer.stream(markers=markers)
        assert "".join(map(stream.push, ids)) == text


def test_a_prompt_for_what_fills_a_gap(byte_level: MakeTokenizer) -> None:
    around = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]
    tokenizer = byte_level(control=["<s>", *around], bos_token_id=None)
    assert tokenizer.fills_in
    assert tokenizer.decode(tokenizer.encode_around("a<s>", "b"), skip_special=False).endswith(
        "<fim_prefix>a<s><fim_suffix>b<fim_middle>"
    )
    (control,) = ids_of(tokenizer, "<s>")
    assert control not in tokenizer.encode_around("a<s>", "b")
    lacking = byte_level(control=around[:2])
    assert not lacking.fills_in
    with pytest.raises(OptionError, match="no tokens for filling in"):
        lacking.encode_around("a", "b")


def test_the_longest_of_overlapping_tokens_is_found(byte_level: MakeTokenizer) -> None:
    tokenizer = byte_level(control=["<a>", "<a><b>", "<b>"])
    assert [tokenizer.token(id) for id in ids_of(tokenizer, "<a><a><b><b>")] == ["<a>", "<a><b>", "<b>"]


def test_text_never_merges_into_a_control_token(metadata_of: Callable[..., Any], made_of: MakeTokenizer) -> None:
    # "hello" is what the merges make of the letters; here the file says it is a control token.
    metadata = metadata_of("llama")
    hello = metadata["tokenizer.ggml.tokens"].index("hello")
    metadata["tokenizer.ggml.token_type"][hello] = 3
    tokenizer = made_of(metadata)
    assert hello not in tokenizer.encode("hello")
    assert hello in tokenizer.encode("hello", parse_special=True)


def test_texts_that_end_a_generation_are_control_tokens_whatever_the_file_says(byte_level: MakeTokenizer) -> None:
    tokenizer = byte_level(user_defined=["<|eot_id|>", "<think>"], merges=None, pre="kimi-k2")
    (eot,) = ids_of(tokenizer, "<|eot_id|>")
    assert tokenizer.is_control(eot)
    assert eot in tokenizer.eog_ids
    assert eot not in tokenizer.encode("<|eot_id|>")


def test_end_of_generation_is_found_by_text_and_by_key(byte_level: MakeTokenizer) -> None:
    names = ["<|im_end|>", "<end_of_turn>", "<x>", "<y>", "<z>", "<|fim_pad|>", "<|fim_prefix|>"]
    plain = byte_level(control=names)
    assert sorted(map(plain.token, plain.eog_ids)) == ["<end_of_turn>", "<|fim_pad|>", "<|im_end|>"]
    x, y, z = ids_of(plain, "<x>", "<y>", "<z>")
    keyed = byte_level(control=names, eos_token_id=x, eot_token_id=y, fim_sep_token_id=z)
    assert keyed.eog_ids == plain.eog_ids | {x, y, z}
    assert keyed.eos_id == x


def test_harmony_messages_do_not_end_a_generation(byte_level: MakeTokenizer) -> None:
    tokenizer = byte_level(control=["<|end|>", "<|return|>", "<|call|>"])
    assert sorted(map(tokenizer.token, tokenizer.eog_ids)) == ["<|call|>", "<|return|>"]


@pytest.mark.parametrize(
    ("model", "keys", "begins", "ends"),
    [
        ("gpt2", {"bos_token_id": 0}, False, False),
        ("gpt2", {"bos_token_id": 0, "pre": "llama-bpe"}, True, False),
        ("gpt2", {"bos_token_id": 0, "pre": "llama-bpe", "add_bos_token": False}, False, False),
        ("gpt2", {"pre": "llama-bpe"}, False, False),
        ("gpt2", {"bos_token_id": 0, "add_bos_token": True}, True, False),
        ("gpt2", {"eos_token_id": 5, "add_eos_token": True}, False, True),
        ("llama", {}, True, False),
        ("llama", {"add_bos_token": False, "add_eos_token": True}, False, True),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(
    metadata_of: Callable[..., Any], made_of: MakeTokenizer, model: str, keys: dict[str, Any], begins: bool, ends: bool
) -> None:
    tokenizer = made_of(metadata_of(model, **keys))
    plain = tokenizer.encode("hello", add_special=False)
    want = [tokenizer.bos_id] * begins + plain + [tokenizer.eos_id] * ends
    assert tokenizer.encode("hello") == want


def test_bos_is_not_doubled(spm: MakeTokenizer) -> None:
    tokenizer = spm()
    assert tokenizer.encode("<s>hello", parse_special=True) == tokenizer.encode("hello")


def test_white_space_after_phi3_control_tokens_is_dropped(
    metadata_of: Callable[..., Any], made_of: MakeTokenizer
) -> None:
    plain = made_of(metadata_of("llama"))
    phi3 = made_of({"general.name": "Phi-3 mini", **metadata_of("llama")})
    text = "</s> \n hello<s> hello"
    assert phi3.encode(text, parse_special=True) == plain.encode("</s>hello<s> hello", parse_special=True)


@pytest.mark.parametrize("pre", [None, "brand-new"])
def test_an_unknown_pre_tokenizer_is_warned_of(
    metadata_of: Callable[..., Any], made_of: MakeTokenizer, pre: str | None
) -> None:
    with pytest.warns(UserWarning, match=r"tokenizer\.ggml\.pre.*(missing|brand-new)"):
        made_of(metadata_of("gpt2", pre=pre))


def test_opened_by_path_and_by_file(model_path: Path) -> None:
    from irkit import gguf

    with gguf.open(model_path) as file:
        opened = from_gguf(file)
    assert opened.encode("Hello") == from_gguf(str(model_path)).encode("Hello")


@pytest.mark.parametrize("model", ["t5", "bert", "rwkv", "none"])
def test_other_kinds_are_refused_by_name(metadata_of: Callable[..., Any], made_of: MakeTokenizer, model: str) -> None:
    with pytest.raises(UnsupportedModelError, match=model):
        made_of({**metadata_of("gpt2"), "tokenizer.ggml.model": model})


@pytest.mark.parametrize(
    ("model", "keys", "words"),
    [
        ("gpt2", {"tokens": None}, "tokens is missing"),
        ("gpt2", {"tokens": ["a", "b", "a"]}, "'a' twice"),
        ("gpt2", {"tokens": []}, "tokens is not a list of strings, or empty"),
        ("gpt2", {"tokens": ["a", 1]}, "tokens is not a list of strings"),
        ("gpt2", {"merges": None}, "merges is missing"),
        ("gpt2", {"merges": ["ab"]}, "not two tokens"),
        ("gpt2", {"merges": ["h nowhere"]}, "'nowhere', which is not a token"),
        ("gpt2", {"merges": ["h 漢"]}, "'漢', which is not a token"),
        ("gpt2", {"token_type": np.ones(3, np.int32)}, "token_type has 3 entries"),
        ("gpt2", {"token_type": np.ones(3, np.float32)}, "token_type is not an array"),
        ("gpt2", {"bos_token_id": 10_000}, "bos_token_id is 10000, but there are 273 tokens"),
        ("gpt2", {"eos_token_id": -1}, "eos_token_id is -1"),
        ("gpt2", {"eos_token_id": True}, "eos_token_id is not of type int"),
        ("gpt2", {"add_bos_token": 1, "bos_token_id": 0}, "add_bos_token is not of type bool"),
        ("gpt2", {"add_bos_token": True}, "bos_token_id is missing"),
        ("gpt2", {"pre": 7}, "pre is not of type str"),
        ("llama", {"scores": None}, "scores is missing"),
        ("llama", {"scores": np.zeros(5, np.float32)}, "scores has 5 entries"),
        ("llama", {"scores": np.full(278, np.nan, np.float32)}, "scores holds NaN"),
    ],
)
def test_damaged_metadata_are_refused(
    metadata_of: Callable[..., Any], made_of: MakeTokenizer, model: str, keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModelFileError, match=words):
        made_of(metadata_of(model, **keys))


@pytest.mark.parametrize("text", ["<0x-1>", "<0xFFF>", "<0xG0>", "<0x>", "0x41", "<0x41"])
def test_byte_tokens_that_name_no_byte_are_refused(
    metadata_of: Callable[..., Any], made_of: MakeTokenizer, text: str
) -> None:
    metadata = metadata_of("llama")
    metadata["tokenizer.ggml.tokens"][3] = text
    with pytest.raises(ModelFileError, match="is a byte token"):
        made_of(metadata)


def test_a_chat_template_must_be_text(metadata_of: Callable[..., Any], made_of: MakeTokenizer) -> None:
    assert made_of({**metadata_of("gpt2"), "tokenizer.chat_template": "x"}).chat_template == "x"
    assert made_of(metadata_of("gpt2")).chat_template is None
    with pytest.raises(ModelFileError, match="chat_template"):
        made_of({**metadata_of("gpt2"), "tokenizer.chat_template": 1})


@pytest.mark.parametrize("id", [273, -1, 1 << 40, 1.5, "a", None])
def test_ids_outside_the_vocabulary_are_refused(byte_level: MakeTokenizer, id: Any) -> None:
    tokenizer = byte_level()
    for use in (tokenizer.token, tokenizer.token_bytes, tokenizer.is_control, tokenizer.stream().push):
        with pytest.raises(OptionError, match="token id"):
            use(id)
    with pytest.raises(OptionError, match="token id"):
        tokenizer.decode([id])


def test_arguments_of_the_wrong_type_are_refused(byte_level: MakeTokenizer) -> None:
    tokenizer = byte_level()
    with pytest.raises(OptionError, match="must be a string, not bytes"):
        tokenizer.encode(b"a")  # pyright: ignore[reportArgumentType]
    with pytest.raises(OptionError, match="character 1 is a lone surrogate"):
        tokenizer.encode("a\ud800")
    with pytest.raises(OptionError, match="sequence of integers"):
        tokenizer.decode(5)  # pyright: ignore[reportArgumentType]


def test_ids_may_be_numpy_integers(byte_level: MakeTokenizer) -> None:
    tokenizer = byte_level()
    assert tokenizer.decode(np.array(tokenizer.encode("hello"), np.int32)) == "hello"  # pyright: ignore[reportArgumentType]


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 400),
    st.just(0xFFFFFFFF),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.text(max_size=3), max_size=5),
    st.lists(st.one_of(st.integers(), st.text(max_size=2), st.none()), max_size=4),
    st.builds(np.zeros, st.integers(0, 300), st.sampled_from([np.int32, np.uint8, np.float32, np.bool_])),
)
KEYS = [
    "model", "pre", "tokens", "token_type", "scores", "merges", "bos_token_id", "eos_token_id", "eot_token_id",
    "fim_pad_token_id", "unknown_token_id", "add_bos_token", "add_eos_token", "add_space_prefix",
]  # fmt: skip


def change_list(draw: st.DrawFn, items: list[Any], values: st.SearchStrategy[Any]) -> list[Any]:
    """`items` with a few of them replaced, removed or repeated."""
    items = list(items)
    for _ in range(draw(st.integers(1, 3))):
        index = draw(st.integers(0, max(len(items) - 1, 0)))
        items[index : index + draw(st.integers(0, 1))] = draw(st.lists(values, max_size=2))
    return items


@st.composite
def mangled(draw: st.DrawFn, metadata_of: Callable[..., Any]) -> dict[str, Any]:
    metadata = metadata_of(draw(st.sampled_from(["gpt2", "llama"])))
    for _ in range(draw(st.integers(1, 3))):
        key = "tokenizer.ggml." + draw(st.sampled_from(KEYS))
        value = metadata.get(key)
        how = draw(st.sampled_from(["remove", "junk", "change", "change"]))
        if how == "remove":
            metadata.pop(key, None)
        elif isinstance(value, list) and how == "change":
            texts = st.one_of(
                st.text(st.characters(), max_size=3), st.sampled_from([*value, "", " ", "<0x-1>", "a b", "x" * 600])
            )
            metadata[key] = change_list(draw, value, texts)
        elif isinstance(value, np.ndarray) and how == "change":
            numbers = st.one_of(st.integers(-3, 9), st.sampled_from([np.nan, np.inf, -np.inf]))
            changed = change_list(draw, value.tolist(), numbers)
            metadata[key] = np.array(changed, value.dtype if np.isfinite(changed).all() else np.float32)
        else:
            metadata[key] = draw(junk)
    return metadata


@settings(max_examples=300)
@given(data=st.data())
def test_mangled_metadata_make_a_tokenizer_or_a_clear_error(
    metadata_of: Callable[..., Any], made_of: MakeTokenizer, data: st.DataObject
) -> None:
    metadata = data.draw(mangled(metadata_of))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            tokenizer = made_of(metadata)
        except (ModelFileError, UnsupportedModelError):
            return
    ids = tokenizer.encode("hello  <|im_end|> wörld <think>", parse_special=True)
    assert isinstance(tokenizer.decode(ids), str)
    assert all(isinstance(tokenizer.token(id), str) for id in range(tokenizer.vocab_size))
