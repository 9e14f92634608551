"""Chat templates: what they see, what they give, and what is done for them."""

import json
import warnings
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from irkit.errors import ModelFileError, OptionError
from irkit.tokenizer import ChatTemplate, Tokenizer
from irkit.tokenizer.answers import Content, Thinking, ToolCall

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}[{{ message.role }}] {{ message.content }} "
    "{% endfor %}"
)
TOOLS = [{"type": "function", "function": {"name": "é<b>&'\"", "parameters": {"type": "object", "b": 1, "a": [1.5]}}}]


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def test_a_conversation_is_rendered() -> None:
    messages = [{"role": "system", "content": "Be kind."}, *user("Hi"), {"role": "assistant", "content": "Hello!"}]
    want = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    assert ChatTemplate(CHATML).render(messages, add_generation_prompt=False) == want
    assert ChatTemplate(CHATML).render(messages) == want + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("Hi", "Hi"),
        (None, ""),
        ([], ""),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
    ],
)
def test_content_may_be_parts(content: Any, text: str) -> None:
    assert ChatTemplate("{{ messages[0].content }}").render(user(content)) == text


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}|{{ eos_token }}", "<s>|</s>"),
        ("{% if true %}\n  x\n{% endif %}\n", "  x\n"),
        ("{{ nothing }}{{ nothing is defined }}{{ messages[5] }}", "False"),
        (
            "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}"
            "{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "013",
        ),
        ("{% generation %}{{ 'a' }}{% endgeneration %}b", "ab"),
        ("{{ tools | tojson }}", json.dumps(TOOLS, ensure_ascii=False)),
        ("{{ tools | tojson(indent=2) }}", json.dumps(TOOLS, ensure_ascii=False, indent=2)),
        ("{{ tools | tojson(ensure_ascii=true) }}", json.dumps(TOOLS)),
        (
            "{{ tools | tojson(separators=(',', ':'), sort_keys=true) }}",
            json.dumps(TOOLS, ensure_ascii=False, separators=(",", ":"), sort_keys=True),
        ),
        ("{{ tools[0].function.parameters.keys() | list | join(', ') }}", "type, b, a"),
        (
            "{{ 'a\nb\n' | indent(2) }}|{{ 'a\nb' | indent(2, true) }}|{{ 'a\nb' | indent('> ') }}",
            "a\n  b\n|  a\n  b|a\n> b",
        ),
        ("{{ [1, 2] | join }}{{ [{'a': 1}, {'a': 2}] | join('-', attribute='a') }}", "121-2"),
        (
            "{{ 'aXbX' | replace('X', 'y') }}{{ 'aXbX' | replace('X', 'y', 1) }}{{ 'ab'.replace('a', 'c') }}",
            "aybyaybXcb",
        ),
        ("{{ '%s-%03d' % ('a', 7) }}{{ '%(x)s' | format(x=1) }}{{ '{}{x}'.format(1, x=2) }}", "a-007112"),
        (
            "{{ 2.567 | round(1) }}{{ 7 // 2 }}{{ 2 ** 10 }}{{ 'ab' * 2 }}{{ [1] + [2] }}{{ 'a' ~ 1 ~ [2] }}",
            "2.631024abab[1, 2]a1[2]",
        ),
        ("{% set ns = namespace(x=0) %}{% for m in messages %}{% set ns.x = ns.x + 1 %}{% endfor %}{{ ns.x }}", "1"),
        ("{% macro m(a, b='B') %}{{ a }}{{ b }}{% endmacro %}{{ m('x') }}{{ m('y', b='z') }}", "xByz"),
        ("{% set s %}a{{ 1 }}{% endset %}{{ s | upper }}{{ s[:1] }}{{ s[::-1] }}", "A1a1a"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | first }}", "Hi"),
        ("{{ messages | length }}{{ messages[0].get('x', 'none') }}{{ 'Hi' in messages[0].content }}", "1noneTrue"),
    ],
)
def test_templates_are_rendered_as_by_transformers(source: str, text: str) -> None:
    assert ChatTemplate(source, "<s>", "</s>").render(user("Hi"), tools=TOOLS) == text


def test_templates_can_tell_the_time() -> None:
    before = datetime.now().year
    assert before <= int(ChatTemplate("{{ strftime_now('%Y') }}").render(user("Hi"))) <= datetime.now().year


def test_absent_tools_are_none_or_else_undefined() -> None:
    assert ChatTemplate("{{ tools is none }}").render(user("Hi")) == "True"
    assert ChatTemplate("{% for tool in tools %}x{% endfor %}y").render(user("Hi")) == "y"
    assert ChatTemplate("{{ tools is none }}").render(user("Hi"), tools=[]) == "True"


def test_a_template_may_refuse_in_its_own_words() -> None:
    with pytest.raises(OptionError, match=r"roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(user("Hi"))


@pytest.mark.parametrize(
    "source",
    [NO_SYSTEM, NO_SYSTEM.replace("{{ raise_exception('System role not supported') }}", "{% continue %}")],
    ids=["refused", "dropped"],
)
def test_a_system_message_goes_into_the_first_user_turn_if_it_has_no_place(source: str) -> None:
    template = ChatTemplate(source)
    system = {"role": "system", "content": "Be kind."}
    later = [{"role": "assistant", "content": "Hello!"}, *user("Bye")]
    assert template.render([system, *user("Hi"), *later]) == "[user] Be kind.\nHi [assistant] Hello! [user] Bye "
    assert template.render([system]) == "[user] Be kind. "
    assert template.render([system, *later]) == "[assistant] Hello! [user] Be kind.\nBye "


def test_developers_are_the_system_if_the_template_does_not_know_them() -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert ChatTemplate(CHATML).render(messages, False) == "<|im_start|>system\nx<|im_end|>\n"
    assert ChatTemplate("{# developer #}{{ messages[0].role }}").render(messages) == "developer"


@pytest.mark.parametrize("source", [None, "", " \n"])
def test_without_a_template_a_plain_format_is_used_and_said(source: str | None) -> None:
    with pytest.warns(UserWarning, match="no chat template") as caught:
        template = ChatTemplate(source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = template.render([{"role": "system", "content": "Be kind."}, *user("Hi")])
    assert len(caught) == 1
    assert text == "system: Be kind.\n\nuser: Hi\n\nassistant:"
    assert template.stop == ("\n\nuser:",)
    assert ChatTemplate(CHATML).stop == ()


def deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("Hi", "messages: must be a list of messages, not str"),
        ({"role": "user", "content": "Hi"}, "messages: must be a list"),
        (7, "messages: must be a list"),
        ([], "messages: must not be empty"),
        (["Hi"], r"messages\[0\]: must be a mapping"),
        ([*user("Hi"), {"content": "x"}], r"messages\[1\]\.role: must be a string"),
        ([{"role": "", "content": "x"}], r"messages\[0\]\.role"),
        ([{"role": 1, "content": "x"}], r"messages\[0\]\.role"),
        ([{"role": "user"}], r"messages\[0\]\.content: is missing"),
        (user(5), r"messages\[0\]\.content: must be a string"),
        (user({"text": "x"}), r"messages\[0\]\.content: must be a string"),
        (user(["x"]), r"messages\[0\]\.content\[0\]: must be a part"),
        (user([{"type": "image_url"}]), r"messages\[0\]\.content\[0\]: must be a part"),
        (user("a\ud800"), r"messages\[0\]\.content: character 1 is a lone surrogate"),
        ([{**user("a")[0], "x": {"y": {1, 2}}}], r"messages\[0\]\.x\.y: .* is not a JSON value"),
        ([{**user("a")[0], "x": float("nan")}], r"messages\[0\]\.x: nan is not a JSON value"),
        ([{**user("a")[0], 5: 1}], r"messages\[0\]: has a key that is not a string"),
        ([{**user("a")[0], "x": deep(100)}], r"messages\[0\]\.x.*nested more than"),
    ],
)
def test_malformed_messages_are_named(messages: Any, words: str) -> None:
    template = ChatTemplate(CHATML)
    with pytest.raises(OptionError, match=words):
        template.render(messages)


@pytest.mark.parametrize("tools", ["x", {"a": 1}, ["x"], 5])
def test_malformed_tools_are_named(tools: Any) -> None:
    with pytest.raises(OptionError, match="tools"):
        ChatTemplate(CHATML).render(user("Hi"), tools=tools)


def test_messages_are_left_as_they_were() -> None:
    messages = [{"role": "system", "content": "Be kind."}, *user([{"type": "text", "text": "Hi"}])]
    before = json.dumps(messages)
    ChatTemplate(NO_SYSTEM).render(messages)
    assert json.dumps(messages) == before


def test_encoding_begins_with_bos_once(spm: Callable[..., Tokenizer], byte_level: Callable[..., Tokenizer]) -> None:
    tokenizer = spm()
    hello = tokenizer.encode("hello")
    assert hello[0] == tokenizer.bos_id
    for source in ("hello", "<s>hello", "{{ bos_token }}hello"):
        template = ChatTemplate(source, bos_token="<s>")
        assert template.encode(tokenizer, user("x")) == hello
    assert ChatTemplate("hello").encode(tokenizer, user("x"), add_special=False) == hello[1:]
    assert ChatTemplate("hello").encode(byte_level(), user("x")) == byte_level().encode("hello")


@pytest.mark.parametrize("source", ["{% if %}", "{{ ", "{% nonsense %}", "{{ 'a' | nonsense }}", "x" * 70_000])
def test_what_is_no_template_is_refused(source: str) -> None:
    with pytest.raises(ModelFileError, match="chat template"):
        ChatTemplate(source)


THINKING = "{% for m in messages %}{{ m.content }}</think>{% endfor %}A:"


def test_whether_tools_get_into_the_text() -> None:
    assert not ChatTemplate(CHATML).takes_tools
    assert ChatTemplate("{{ tools | tojson if tools }}<tool_call>").takes_tools
    assert not ChatTemplate("{{ raise_exception('no') if tools }}<tool_call>").takes_tools


def test_an_answer_is_read_in_the_forms_of_its_template() -> None:
    reader = ChatTemplate("{{ tools | tojson if tools }}<tool_call>").reader(TOOLS)
    parts = reader.push('<tool_call>{"name": "add", "arguments": {}}</tool_call>') + reader.flush()
    assert parts == [ToolCall("add", {})]
    assert ChatTemplate("<tool_call>").reader().push("<tool_call>{}") == [Content("<tool_call>{}")]
    opened = ChatTemplate(THINKING + "<think>\n").reader()
    assert opened.push("Hm.</think>Yes.") == [Thinking("Hm."), Content("Yes.")]


@pytest.mark.parametrize(
    ("source", "end"),
    [
        (THINKING, "A:<think>\n\n</think>\n\n"),
        (THINKING + "<think>\n", "A:<think>\n\n</think>\n\n"),
        (THINKING + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}", "A:<think>\n\n</think>\n\n"),
        (THINKING + "{{ '<think>' if thinking else '</think>' }}", "A:</think>"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}A:", "A:"),
    ],
)
def test_a_model_that_is_not_to_think_begins_behind_an_empty_thought(source: str, end: str) -> None:
    template = ChatTemplate(source)
    assert template.render(user("hi"), think=False).endswith(end)
    parts = template.reader(think=False).push("Yes.")
    assert parts == [Content("Yes.")]
