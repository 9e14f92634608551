"""Answers of a given form: what the option `format` asks for, and nothing else changed by it."""

import contextlib
import json
import threading
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest

import irkit
from irkit.engine import structured
from irkit.engine.runtime import Runtime
from irkit.errors import OptionError
from irkit.results import Generation
from irkit.tokenizer import from_gguf
from irkit.transformer.taps import Operands, Spec

WORD = {"type": "string", "maxLength": 12}
PERSON = {
    "type": "object",
    "properties": {"name": WORD, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "flat": PERSON,
    "nested": {
        "type": "object",
        "properties": {"head": PERSON, "staff": {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 2}},
        "required": ["head", "staff"],
        "additionalProperties": False,
    },
    "enum": {"enum": ["red", "green", 3, None, True]},
    "unicode": {
        "type": "object",
        "properties": {"größe": {"enum": ["klein", "groß"]}, "都市": {"enum": ["東京", "Zürich", "🙂"]}},
        "required": ["größe", "都市"],
        "additionalProperties": False,
    },
    "numbers": {
        "type": "array",
        "items": {"type": "number", "minimum": -1, "exclusiveMaximum": 2.5},
        "minItems": 3,
        "maxItems": 3,
    },
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    "date": {"type": "string", "format": "date"},
    "any of": {"anyOf": [{"type": "boolean"}, {"type": "integer", "minimum": 10, "maximum": 99}, {"const": "none"}]},
    "one of": {
        "oneOf": [
            {"type": "object", "properties": {"kind": {"const": kind}, kind: WORD}, "required": ["kind", kind],
             "additionalProperties": False}
            for kind in ("cat", "dog")
        ]
    },
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, WORD], "items": False, "minItems": 2},
    "references": {
        "$defs": {"leaf": {"type": "object", "properties": {"id": {"type": "integer", "minimum": 0, "maximum": 9}},
                           "required": ["id"], "additionalProperties": False}},
        "type": "object",
        "properties": {"left": {"$ref": "#/$defs/leaf"}, "right": {"$ref": "#/$defs/leaf"}},
        "required": ["left", "right"],
        "additionalProperties": False,
    },
    "all of": {"allOf": [{"type": "integer", "minimum": 5}, {"maximum": 7}]},
}  # fmt: skip
RANDOM: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_predict": 300}
PROMPT = "Here is a record of what we know, as JSON:\n"


def told(generation: Generation) -> Any:
    """Everything but times."""
    return [(t.id, t.text, t.logprob, t.top) for t in generation.tokens], generation.text, generation.finish_reason


def follows(session: irkit.Session, schema: dict[str, Any], seeds: range) -> None:
    several = session.pooled()
    for answer in [several.generate(PROMPT, format=schema, seed=seed, **RANDOM) for seed in seeds]:
        assert answer.finish_reason == "stop", answer.text
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(answer.text))


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_is_what_the_schema_says(session: irkit.Session, name: str) -> None:
    follows(session, SCHEMAS[name], range(4))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMAS)
def test_so_are_many(session: irkit.Session, name: str) -> None:
    follows(session, SCHEMAS[name], range(100, 160))


def test_json_is_any_object(session: irkit.Session) -> None:
    asked: Any = [{"role": "user", "content": "Describe a cat in JSON."}]
    answers = [session.respond(asked, format="json", seed=seed, temperature=0.7, num_predict=400) for seed in range(3)]
    ended = [json.loads(answer.text) for answer in answers if answer.finish_reason == "stop"]
    assert ended
    assert all(type(each) is dict for each in ended)
    assert all(answer.text.startswith("{") for answer in answers)


def test_the_answer_may_end_where_the_schema_allows_it(session: irkit.Session) -> None:
    """An integer can go on: the model ends it, with a token that ends answers, or nothing more fits."""
    asked = "How many days are in a week? Answer with the number alone."
    answer = session.respond(asked, format={"type": "integer"}, temperature=0, num_predict=20).wait()
    assert (str(int(answer.text)), answer.finish_reason) == (answer.text, "stop")
    assert answer.tokens[-1].id in session.model.tokenizer.eog_ids
    answer = session.generate(PROMPT, format={"const": 5}, seed=1)
    assert (answer.text, answer.finish_reason, len(answer.tokens)) == ("5", "stop", 1)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.3, "top_k": 20, "repeat_penalty": 1.3}])
def test_a_token_is_drawn_from_what_is_left(exact_session: irkit.Session, options: dict[str, Any]) -> None:
    """Each token against the model's own logits, which say what may be drawn where others are ruled out."""
    session, schema = exact_session, SCHEMAS["flat"]
    session.reset()
    answer = session.generate(PROMPT, format=schema, seed=3, top_logprobs=2, num_predict=14, **options)
    prompt = session.tokenize(PROMPT)
    ids = [*prompt, *(token.id for token in answer.tokens)]
    rows = session.trace(ids, names=()).logits[0, len(prompt) - 1 :]
    form = structured.Form(structured.vocabulary(session.model.tokenizer), structured.grammar(schema))
    for index, (token, logits) in enumerate(zip(answer.tokens, rows, strict=False)):
        listed = np.flatnonzero(np.unpackbits(form.allowed().view(np.uint8), bitorder="little")).tolist()
        before = ids[: len(prompt) + index]
        odds = irkit.sampling_distribution(logits, before, allowed=listed, **options)
        assert set(np.flatnonzero(odds).tolist()) <= set(listed)
        assert odds[token.id] > (0.99 if options["temperature"] == 0 else 0)
        own = logits - np.logaddexp.reduce(logits.astype(np.float64))
        assert token.logprob == pytest.approx(own[token.id], abs=1e-3)
        assert [t.logprob for t in token.top] == pytest.approx(np.sort(own)[:-3:-1], abs=1e-3)
        form.take(token.id)


def test_beside_others_it_is_what_it_is_alone(session: irkit.Session) -> None:
    runtime = session.model.load().result()
    for top in (False, True):
        runtime.can_batch(4, 512, top, Spec(), Operands())
    for compiled in tuple(runtime._batched.values()):
        compiled.result()
    asks: list[dict[str, Any]] = [
        {"prompt": PROMPT, "format": PERSON, "seed": 1},
        {"prompt": "Once upon a time", "seed": 2},
        {"prompt": PROMPT + PROMPT, "format": SCHEMAS["numbers"], "seed": 3, "top_logprobs": 2},
        {"prompt": "The sea is", "seed": 4, "top_logprobs": 1},
    ]
    options = {**RANDOM, "num_predict": 24}

    def alone(ask: dict[str, Any]) -> Any:
        session.reset()
        return told(session.fork().generate(**ask, **options).wait())

    expected = [alone(ask) for ask in asks]
    held, go = threading.Event(), threading.Event()
    session.model.submit(lambda: (held.set(), go.wait(60)))
    held.wait(60)
    several, sizes = session.pooled(), []
    several.reset()
    decode = Runtime.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runtime, "decode", lambda *a: (sizes.append((len(a[2]), a[-1] is not None)), decode(*a))[1])
        made = [several.generate(**ask, **options) for ask in asks]
        go.set()
        found = [told(each) for each in made]
    assert found == expected
    assert not runtime.packed or (4, True) in sizes, "they are decoded together"


def test_it_goes_with_all_else(session: irkit.Session) -> None:
    """Streamed, with captures, edits, stop strings and a limit."""
    plain = session.generate(PROMPT, format=PERSON, seed=7, **RANDOM)
    text = "".join(token.text for token in plain)
    json.loads(text)
    captured = session.generate(PROMPT, format=PERSON, seed=7, capture=["resid_post"], **RANDOM)
    assert captured.text == text
    assert all(token.captures is not None for token in captured.tokens)
    edited = session.generate(PROMPT, format=PERSON, seed=7, edits=[irkit.ablate("mlp_out", layers=[3])], **RANDOM)
    jsonschema.validate(json.loads(edited.text), PERSON)
    stopped = session.generate(PROMPT, format=PERSON, seed=7, stop=['"age"'], **RANDOM)
    assert (stopped.text, stopped.finish_reason) == (text.partition('"age"')[0], "stop")
    short = session.generate(PROMPT, format=PERSON, seed=7, **dict(RANDOM, num_predict=4))
    assert (len(short.tokens), short.finish_reason) == (4, "length")
    assert text.startswith(short.text)
    assert 0 < plain.stats.form_seconds < plain.stats.prefill_seconds + plain.stats.decode_seconds
    assert session.generate(PROMPT, seed=7, num_predict=2).wait().stats.form_seconds == 0


def test_small_vocabularies_too(tiny_path: Path) -> None:
    """258 tokens do not fill their last word of bits."""
    with irkit.Session(tiny_path, precision="exact") as session:
        follows(session, SCHEMAS["unicode"], range(2))


def nested(levels: int) -> Any:
    return reduce(lambda inner, _: {"type": "array", "items": inner}, range(levels), {})


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("xml", 'must be "json" or a JSON schema'),
        ([], 'must be "json" or a JSON schema'),
        ({"type": "strin"}, "Invalid type: strin"),
        ({"type": "array", "uniqueItems": True}, "Unimplemented keys"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "Unsatisfiable schema"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"$ref": "#"}, "nothing fits it"),
        ({"$ref": "http://127.0.0.1:9/schema"}, "not present in a registry"),
        ({"$ref": "file:///etc/hostname"}, "not present in a registry"),
        ({"const": float("nan")}, "not JSON compliant"),
        ({"enum": {1, 2}}, "not JSON serializable"),
        ({"enum": ["\ud800"]}, "hex escape"),
        ({"enum": ["x" * (1 << 16)]}, "up to 65536 are read"),
        (nested(200), "recursion limit exceeded"),
        (nested(100_000), "recursion depth exceeded"),
        ({"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}, "required": [f"{i}{j}"]} for j in range(4)]}
                    for i in range(14)]}, "schema too large"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_said_before_anything_is_computed(
    session: irkit.Session, schema: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runtime, "read", lambda *_: pytest.fail("it was computed"))
    with pytest.raises(OptionError, match=message) as raised:
        session.generate(PROMPT, format=schema)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    "schema",
    [
        nested(60),
        {"type": "string", "pattern": "^(((((a{0,100}){0,100}){0,100}){0,100}){0,100})$"},
        {"type": "string", "pattern": "^.*a.{30}$"},
        {"type": "array", "minItems": 10**9},
        {"type": "object", "properties": {f"k{n}": {} for n in range(2500)}},
        {"type": "string", "minLength": 10**9},
        {"$defs": {f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}, "b": {"$ref": f"#/$defs/d{i + 1}"}}}
                   for i in range(40)} | {"d40": {}}, "$ref": "#/$defs/d0"},
    ],
)  # fmt: skip
def test_what_is_large_is_followed_or_ends_in_an_error(session: irkit.Session, schema: Any) -> None:
    answer = session.generate(PROMPT, format=schema, seed=0, **dict(RANDOM, num_predict=12))
    with contextlib.suppress(OptionError):
        assert answer.finish_reason in ("length", "stop")
    assert session.generate("The sea", num_predict=2).wait().finish_reason == "length", "the next is not disturbed"


def test_a_thread_with_a_small_stack_may_ask(session: irkit.Session) -> None:
    vocabulary, grammar = structured.vocabulary(session.model.tokenizer), structured.grammar(nested(60))
    found: list[structured.Form] = []
    before = threading.stack_size(256 << 10)
    try:
        asks = threading.Thread(target=lambda: found.append(structured.Form(vocabulary, grammar)))
        asks.start()
    finally:
        threading.stack_size(before)
    asks.join()
    assert found[0].allowed().any()


def test_sentencepiece_tokens_too() -> None:
    """Where a space is put before every text, none is put before what an answer is forced to say."""
    pieces = ["▁", "{", "}", '"', ":", ",", '{"', '":', "größe", "▁größe", "klein", "groß", "▁▁"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    metadata: dict[str, Any] = {
        "model": "llama",
        "tokens": tokens,
        "token_type": np.array([2, 3, 3] + [6] * 256 + [1] * len(pieces), np.int32),
        "scores": np.array([0.0] * 259 + [-float(rank) for rank in range(len(pieces))], np.float32),
    }
    named = {f"tokenizer.ggml.{name}": value for name, value in metadata.items()}
    opened: Any = SimpleNamespace(metadata=named)
    tokenizer = from_gguf(opened)
    vocabulary, schema = structured.vocabulary(tokenizer), SCHEMAS["unicode"]
    for seed in range(5):
        form = structured.Form(vocabulary, structured.grammar(schema))
        rng, text, ended = np.random.default_rng(seed), b"", False
        while not ended:
            choice = np.flatnonzero(np.unpackbits(form.allowed().view(np.uint8), bitorder="little"))
            token = int(rng.choice(choice))
            text += tokenizer.token_bytes(token)
            ended = form.take(token)
        jsonschema.validate(json.loads(text), schema)
