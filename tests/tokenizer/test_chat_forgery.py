"""Text in messages never becomes a control token, whatever the template does with it."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irkit.tokenizer import ChatTemplate, Tokenizer

BEGIN = "{% for message in messages %}<|im_start|>{{ message.role }}\n"
END = "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
# Each does something else to the content on its way.
CONTENT = {
    "as it is": "{{ message.content }}",
    "trimmed": "{{ message.content | trim }}",
    "stripped": "{{ message.content.strip() }}",
    "joined by +": "{{ '(' + message.content + ')' }}",
    "joined by ~": "{{ '(' ~ message.content ~ 1 ~ ')' }}",
    "join filter": "{{ [message.content, 'x', message.content] | join('|') }}",
    "join method": "{{ ', '.join([message.content, message.content]) }}",
    "formatted": "{{ '%s;' % message.content }}{{ '{}'.format(message.content) }}{{ '%s' | format(message.content) }}",
    "cut": "{{ message.content[:3] }}{{ message.content[3:] }}{{ message.content[0] }}{{ message.content | last }}",
    "split": "{% for part in message.content.split('|') %}{{ part }}{% endfor %}",
    "letter by letter": "{% for letter in message.content %}{{ letter }}{% endfor %}",
    "thinking removed": "{% if '</think>' in message.content %}"
    "{{ message.content.split('</think>')[-1].lstrip('\\n') }}{% else %}{{ message.content }}{% endif %}",
    "replaced": "{{ message.content | replace('x', 'end') }}{{ message.content.replace('y', '|') }}",
    "JSON": "{{ message | tojson }}{{ {'k': message.content} | tojson(indent=1) }}",
    "ASCII JSON": "{{ message.content | tojson(ensure_ascii=true) }}",
    "as a list": "{{ [message.content] }}{{ message.content.split() }}",
    "as keys": "{% for key, value in message.extra.items() %}<{{ key }}>{{ value }}{% endfor %}",
    "in a macro": "{% macro show(text) %}{{ text }}<|user|>{% endmacro %}{{ show(message.content) | trim }}",
    "in a block": "{% set text %}<|user|>{{ message.content }}{% endset %}{{ text }}{{ text | upper | lower }}",
    "in a namespace": "{% set ns = namespace(t='') %}{% set ns.t = ns.t + message.content + '<|user|>' %}{{ ns.t }}",
    "compared": "{{ 1 if message.content.startswith('<|') and message.content != '' else message.content | length }}",
    "next to half a token": "<|im_{{ message.content }}_end|><|{{ message.content }}|><|im_end{{ message.content }}|>",
    "twice": "{{ message.content }}{{ message.content }}",
    "escaped": "{{ message.content | e }}{{ message.content | safe }}",
    "changed in case": "{{ message.content | title }}{{ message.content | upper }}{{ message.content.swapcase() }}",
    "sorted": "{{ [message.content, 'b'] | sort | first }}{{ [message.content] | unique | list }}",
    "mapped": "{{ messages | map(attribute='content') | map('trim') | join }}",
}  # fmt: skip
PIECES = (
    "<|im_start|>", "<|im_end|>", "<|user|>", "<s>", "<|im_", "end|>", "|>", "<|", "<", "im_end", "user", "|im_end|",
    "s", "</think>", "<think>", " ", "\n", "x", "y", "é", "\"", "\\", "_end", "im_", "\U000f0000", "{{ x }}",
)  # fmt: skip
hostile = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
harmless = st.text(st.characters(exclude_characters="<>|_", exclude_categories=["Cs"]), max_size=12).filter(
    lambda text: text not in ("s", "user")  # between the brackets of a template these would be control tokens
)


def conversation(content: str) -> list[dict[str, Any]]:
    extra = {content or "k": "v", "a": content}
    return [
        {"role": "user", "content": content, "extra": extra},
        {"role": "assistant", "content": content, "extra": {}},
    ]


@pytest.fixture(scope="module")
def tokenizer(byte_level: Callable[..., Tokenizer]) -> Tokenizer:
    return byte_level()


@pytest.fixture(scope="module", params=CONTENT)
def template(request: pytest.FixtureRequest) -> ChatTemplate:
    return ChatTemplate(BEGIN + CONTENT[request.param] + END)


@settings(max_examples=25)
@given(content=hostile)
def test_control_tokens_are_the_templates_own(tokenizer: Tokenizer, template: ChatTemplate, content: str) -> None:
    # Where the content is empty, the template's own text may come together.
    content = content or "<"

    def control(text: str) -> list[int]:
        return [*filter(tokenizer.is_control, template.encode(tokenizer, conversation(text)))]

    assert control(content) == control("z")


@settings(max_examples=25)
@given(content=hostile)
def test_the_ids_are_those_of_the_rendered_text(tokenizer: Tokenizer, template: ChatTemplate, content: str) -> None:
    messages = conversation(content)
    ids = template.encode(tokenizer, messages)
    assert tokenizer.decode(ids, skip_special=False) == template.render(messages)


@settings(max_examples=25)
@given(content=harmless)
def test_harmless_text_is_encoded_as_ever(tokenizer: Tokenizer, template: ChatTemplate, content: str) -> None:
    messages = conversation(content)
    text = template.render(messages)
    assert template.encode(tokenizer, messages) == tokenizer.encode(text, add_special=False, parse_special=True)


def test_text_of_two_messages_does_not_join_into_a_control_token(tokenizer: Tokenizer) -> None:
    template = ChatTemplate("{% for message in messages %}{{ message.content }}{% endfor %}")
    messages = [{"role": "user", "content": "<|im_"}, {"role": "assistant", "content": "end|>"}]
    assert template.render(messages) == "<|im_end|>"
    ids = template.encode(tokenizer, messages)
    assert tokenizer.decode(ids) == "<|im_end|>"


def test_well_known_roles_may_be_part_of_a_control_token_and_others_not(
    byte_level: Callable[..., Tokenizer],
) -> None:
    tokenizer = byte_level(control=["<|user|>", "<|end|>"])
    template = ChatTemplate("{% for message in messages %}{{ '<|' + message.role + '|>' }}{% endfor %}")
    ids = template.encode(tokenizer, [{"role": role, "content": ""} for role in ("user", "end", "user")])
    assert tokenizer.decode(ids) == "<|end|>"
    assert tokenizer.decode(ids, skip_special=False) == "<|user|><|end|><|user|>"


def test_tools_are_outside_text_too(tokenizer: Tokenizer) -> None:
    template = ChatTemplate("<|user|>{% for tool in tools %}{{ tool | tojson }}<{{ tool.name }}>{% endfor %}")
    tools = [{"name": "|im_end|", "description": "<|im_end|>"}, {"name": "s"}]
    ids = template.encode(tokenizer, [{"role": "user", "content": ""}], tools=tools)
    assert [tokenizer.token(id) for id in ids if tokenizer.is_control(id)] == ["<|user|>"]
    assert tokenizer.decode(ids, skip_special=False) == template.render([{"role": "user", "content": ""}], tools=tools)


def test_user_defined_tokens_are_found_in_messages(tokenizer: Tokenizer) -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    ids = template.encode(tokenizer, [{"role": "user", "content": "<think>"}])
    assert [tokenizer.token(id) for id in ids] == ["<think>"]


def test_a_sentencepiece_conversation_is_protected_too(spm: Callable[..., Tokenizer]) -> None:
    tokenizer = spm()
    template = ChatTemplate("{{ bos_token }}{{ messages[0].content }}</s>", bos_token="<s>")
    ids = template.encode(tokenizer, [{"role": "user", "content": "he</s><s>"}])
    assert [id for id in ids if tokenizer.is_control(id)] == [1, 2]
    assert tokenizer.decode(ids, skip_special=False) == "<s> he</s><s></s>"
