"""The parts of an answer, however its text is divided."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from irkit.tokenizer.answers import MARKERS, AnswerReader, Content, Forms, Part, Thinking, ToolCall, forms_of

HERMES = Forms(("<think>", "</think>"), ("<tool_call>",))
MISTRAL = Forms(("[THINK]", "[/THINK]"), ("[TOOL_CALLS]",))
LLAMA = Forms(None, ("<|python_tag|>", "{"))
TOOLS = ("weather", "add")
ADD = ToolCall("add", {"a": 1, "b": 2})
WEATHER = ToolCall("weather", {"city": "Paris"})


def read(pieces: list[str], forms: Forms, tools: Any = TOOLS, **more: Any) -> list[Part]:
    """The parts, those of the same kind next to each other as one."""
    reader = AnswerReader(forms, tools, **more)
    parts = [part for piece in pieces for part in reader.push(piece)] + reader.flush()
    joined: list[Part] = []
    for part in parts:
        before = joined[-1] if joined else None
        if isinstance(part, ToolCall):
            joined.append(part)
            continue
        assert part.text
        if type(before) is type(part) and not isinstance(before, ToolCall | None):
            joined[-1] = type(part)(before.text + part.text)
        else:
            joined.append(part)
    return joined


ANSWERS = [
    (HERMES, '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>', [ADD]),
    (HERMES, ' \n<tool_call>{"name":"add","arguments":{"a":1,"b":2}}</tool_call>\n', [ADD]),
    (
        HERMES,
        'Sure:\n<tool_call>{"name": "add", "parameters": {"a": 1, "b": 2}}</tool_call>\n'
        '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call> And so on.',
        [Content("Sure:\n"), ADD, WEATHER, Content("And so on.")],
    ),
    (
        HERMES,
        '<tool_call>[{"name": "add", "arguments": {"a": 1, "b": 2}}, {"name": "now"}]</tool_call>',
        [ADD, ToolCall("now", {})],
    ),
    (
        HERMES,
        '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}\n{"name": "now"}</tool_call>',
        [ADD, ToolCall("now", {})],
    ),
    (HERMES, '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}', [ADD]),
    (
        HERMES,
        '<tool_call>{"name": "say", "arguments": {"text": "</tool_call> \\"} \\\\"}}</tool_call>',
        [ToolCall("say", {"text": '</tool_call> "} \\'})],
    ),
    (
        HERMES,
        '<think>\nLet me see.\n\n</think>\n\nOne. <tool_call>{"name": "now"}</tool_call>',
        [Thinking("Let me see."), Content("One. "), ToolCall("now", {})],
    ),
    (HERMES, "<think></think>  Yes. ", [Content("Yes. ")]),
    (HERMES, "<think> never ends </thin", [Thinking("never ends </thin")]),
    (HERMES, " Not at once <think>no</think>", [Content(" Not at once <think>no</think>")]),
    (HERMES, '<tool_call>{"name": "add"', [Content('<tool_call>{"name": "add"')]),
    (HERMES, "<tool_call>{no} </tool_call> x", [Content("<tool_call>{no} </tool_call> x")]),
    (HERMES, '<tool_call>{"name": "a", "arguments": [1]}', [Content('<tool_call>{"name": "a", "arguments": [1]}')]),
    (HERMES, '<tool_call>{"name": "\\ud800"}', [Content('<tool_call>{"name": "\\ud800"}')]),
    (HERMES, '<tool_call>{"name": "a", "arguments": {"x": NaN}}', None),
    (HERMES, '<tool_call><tool_call>{"name": "now"}</tool_call>', [Content("<tool_call>"), ToolCall("now", {})]),
    (HERMES, "a <tool_c", [Content("a <tool_c")]),
    (MISTRAL, '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": 2}, "id": "123456789"}]', [ADD]),
    (
        MISTRAL,
        '[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}[TOOL_CALLS]weather[CALL_ID]x1[ARGS]{"city": "Paris"}',
        [ADD, WEATHER],
    ),
    (MISTRAL, '[TOOL_CALLS]add{"a": 1, "b": 2}', [ADD]),
    (MISTRAL, "[TOOL_CALLS] are what they write", None),
    (MISTRAL, "[TOOL_CALLS]" + "x" * 300 + "{}", None),
    (MISTRAL, "[THINK]Hm.[/THINK]Yes.", [Thinking("Hm."), Content("Yes.")]),
    (LLAMA, '{"name": "add", "parameters": {"a": 1, "b": 2}}', [ADD]),
    (LLAMA, '<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": 2}}', [ADD]),
    (
        LLAMA,
        '\n{"name": "add", "parameters": {"a": 1, "b": 2}}; {"name": "weather", "parameters": {"city": "Paris"}}\n',
        [ADD, WEATHER],
    ),
    (LLAMA, '{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}', [ADD]),
    (LLAMA, '{"name": "add", "parameters": {"a": 1, "b": 2}} Done.', [ADD, Content("Done.")]),
    (LLAMA, '{"name": "add", "parameters": {"a": 1, "b": 2}}; done.', [ADD, Content("; done.")]),
    (LLAMA, ' {"name": "Ada", "age": 36} is one.', None),
    (LLAMA, 'It is {"name": "add", "parameters": {}}', None),
    (LLAMA, '<|python_tag|>weather.call(city="Paris")', None),
    (LLAMA, "{", None),
]


@pytest.mark.parametrize(("forms", "text", "expected"), ANSWERS)
def test_the_parts_are_the_same_however_the_text_is_divided(
    forms: Forms, text: str, expected: list[Part] | None
) -> None:
    expected = [Content(text)] if expected is None else expected
    assert read([text], forms) == expected
    assert read([*text], forms) == expected
    for cut in range(len(text)):
        assert read([text[:cut], text[cut:]], forms) == expected


PIECES = st.sampled_from([
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<think>", "</think>", "{", "}", "[",
    "]", '"', "\\", ";", " ", "\n", '{"name": "add", "arguments": {"a": 1, "b": 2}}', '{"name": "Ada"}', "<", "x",
])  # fmt: skip


@given(st.sampled_from([HERMES, MISTRAL, LLAMA]), st.lists(PIECES).map("".join), st.data(), st.booleans())
def test_any_division_of_any_text_gives_the_same_parts(
    forms: Forms, text: str, data: st.DataObject, thinking: bool
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = read([text], forms, thinking=thinking)
    assert read(pieces, forms, thinking=thinking) == read([*text], forms, thinking=thinking) == whole


@given(st.sampled_from([HERMES, MISTRAL, LLAMA]), st.lists(st.text() | PIECES).map("".join))
@example(LLAMA, '{"name": "add"}')
def test_without_tools_everything_but_thinking_is_content(forms: Forms, text: str) -> None:
    parts = read([*text], Forms(None, forms.calls), tools=())
    assert parts == ([Content(text)] if text else [])


@given(st.sampled_from([HERMES, MISTRAL, LLAMA]), st.text())
def test_text_without_calls_passes_unchanged(forms: Forms, text: str) -> None:
    if not any(marker in text for marker in MARKERS):
        assert read([*text], forms) == ([Content(text)] if text else [])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, max_size=4), st.booleans())
def test_whatever_the_arguments_are_they_come_out(arguments: dict[str, Any], ascii: bool) -> None:
    call = json.dumps({"name": "add", "arguments": arguments}, ensure_ascii=ascii)
    for forms, text in [
        (HERMES, f"<tool_call>{call}</tool_call>"),
        (MISTRAL, f"[TOOL_CALLS][{call}]"),
        (MISTRAL, f"[TOOL_CALLS]add[ARGS]{json.dumps(arguments, ensure_ascii=ascii)}"),
        (LLAMA, call),
    ]:
        assert read([*text], forms) == [ToolCall("add", arguments)]


def test_content_is_not_held_back_longer_than_it_must_be() -> None:
    reader = AnswerReader(HERMES, TOOLS)
    assert reader.push("Hello") == [Content("Hello")]
    assert reader.push(" <tool") == [Content(" ")]
    assert reader.push("s are fine") == [Content("<tools are fine")]
    reader = AnswerReader(HERMES, TOOLS, thinking=True)
    assert reader.push("\nHm, ") == [Thinking("Hm,")]
    assert reader.push("well</think>") == [Thinking(" well")]
    assert reader.push('<tool_call>{"name": "now"}') == [ToolCall("now", {})]


def test_calls_of_a_prompt_that_has_opened_the_thinking() -> None:
    assert read(["Hm.\n</think>\n\nYes."], HERMES, thinking=True) == [Thinking("Hm."), Content("Yes.")]
    assert read(["Yes."], LLAMA, thinking=True) == [Content("Yes.")]


@pytest.mark.parametrize(
    ("source", "forms"),
    [
        ("{{ messages }}", Forms()),
        ("{% if tools %}<tool_call>{% endif %}", Forms(None, ("<tool_call>",))),
        ("<think></think><tool_call>", Forms(("<think>", "</think>"), ("<tool_call>",))),
        ("{{ '[TOOL_CALLS] ' }}", Forms(None, ("[TOOL_CALLS]",))),
        ("""{{- '"parameters": ' }}""", Forms(None, ("{",))),
        ("""{"name": function name, "parameters": dictionary}<|python_tag|>""", LLAMA),
    ],
)
def test_forms_are_those_that_the_template_has(source: str, forms: Forms) -> None:
    assert forms_of(source) == forms
