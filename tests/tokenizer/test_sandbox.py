"""Templates that try to get out, or to use up time or memory, end in a clear error, and soon."""

import time
import tracemalloc
from collections.abc import Iterator

import pytest

from irkit.errors import ModelFileError
from irkit.tokenizer import ChatTemplate

MESSAGES = [{"role": "user", "content": "Hi"}]
# A value that doubles with each turn of the loop, made by what stands in for {}.
DOUBLING = "{% set ns = namespace(x='ab', y=[1]) %}{% for i in range(70) %}{} {% endfor %}{{ ns.x }}{{ ns.y }}"
BIG = "{% set big = 'x' * 200000 %}"


@pytest.fixture
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 60e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**10 }}",
        "{{ 10**10 * 'a' }}",
        "{{ ([1] * 10**9) | length }}",
        "{{ 10 ** (10 ** 10) }}",
        "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{{ ('f' * 100000) | int(base=16) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%.1000000000f' % 1.0 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '%(a)1000000000d' % {'a': 1} }}",
        "{{ '%(a(b))1000000000d' % {'a(b)': 1} }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ ['%1000000000d'] | map('format', 1) | list }}",
        "{{ '%(a)s' * 10000 % {'a': 'x' * 100000} }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{0:{1}}'.format(1, 1000000000) }}",
        "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
        "{{ ('{0}' * 10000).format('x' * 100000) }}",
        "{{ 'a' | center(10**10) }}",
        "{{ 'a'.center(10**10) }}",
        "{{ 'a'.ljust(10000000000) }}",
        "{{ 'a'.zfill(10000000000) }}",
        "{{ '\t'.expandtabs(10000000000) }}",
        "{{ (1).to_bytes(10000000000, 'big') }}",
        "{{ 'a'.encode().center(10000000000) }}",
        "{{ 'a\nb' | indent(10**10) }}",
        "{{ 1 | round(1000000000, 'ceil') }}",
        "{{ [1] | batch(1000000000, 'x') | list }}",
        "{{ lipsum(10000000) }}",
        BIG + "{{ range(99999) | join(big) }}",
        BIG + "{{ big.join(range(99999) | map('string')) }}",
        BIG + "{{ big | replace('x', big) }}",
        BIG + "{{ big.replace('', big) }}",
        BIG + "{{ range(9999) | list | tojson(separators=(big, big)) }}",
        DOUBLING.replace("{}", "{% set ns.x = ns.x + ns.x %}"),
        DOUBLING.replace("{}", "{% set ns.x = ns.x ~ ns.x %}"),
        DOUBLING.replace("{}", "{% set ns.x = [ns.x, ns.x] | join %}"),
        DOUBLING.replace("{}", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
        DOUBLING.replace("{}", "{% set ns.x = '%s%s' % (ns.x, ns.x) %}"),
        DOUBLING.replace("{}", "{% set ns.x = ns.x.replace('a', 'aa').replace('b', 'bb') %}"),
    ],
)
@pytest.mark.usefixtures("little_memory")
def test_huge_values_are_refused_before_they_are_made(source: str) -> None:
    start = time.thread_time()
    with pytest.raises(ModelFileError, match="chat template"):
        ChatTemplate(source).render(MESSAGES)
    assert time.thread_time() - start < 10


@pytest.mark.parametrize(
    "source",
    [
        BIG + "{{ [" + "big[1:], " * 3000 + "] | length }}",
        BIG + "{{ [" + "big, " * 3000 + "] | length }}",
        BIG + "{{ big }}" * 3000,
        "".join(f"{{% set a{i} = 'x' * 200000 %}}" for i in range(1500)),
        DOUBLING.replace("{}", "{% set ns.y = ns.y + ns.y %}"),
        DOUBLING.replace("{}", "{% set ns.y = [ns.y, ns.y] %}"),
        DOUBLING.replace("{}", "{% set ns.y = (ns.y, ns.y) %}"),
        DOUBLING.replace("{}", "{% set ns.y = {'a': ns.y, 'b': ns.y} %}"),
        DOUBLING.replace("{}", "{% set ns.y = dict(a=ns.y, b=ns.y) %}"),
        DOUBLING.replace("{}", "{% set ns.y = [{'a': ns.y}.items(), {'a': ns.y}.items()] %}"),
        DOUBLING.replace("{}", "{% set ns.y = namespace(a=ns.y, b=ns.y) %}"),
        "{% macro f() %}{% set ns.y = varargs %}{% endmacro %}" + DOUBLING.replace("{}", "{{ f(ns.y, ns.y) }}"),
        "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
        + "{% call m() %}" * 18
        + "x" * 1000
        + "{% endcall %}" * 18,
    ],
)
def test_values_that_come_to_much_together_are_refused(source: str) -> None:
    start = time.thread_time()
    with pytest.raises(ModelFileError, match="chat template"):
        ChatTemplate(source).render(MESSAGES)
    assert time.thread_time() - start < 10


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}x{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for x in [1, 2] recursive %}{{ loop([1, 2]) if loop.depth < 60 }}{% endfor %}",
        "{{ [" + "range(99999) | map('string') | list, " * 1500 + "] | length }}",
    ],
)
def test_endless_work_is_cut_short(source: str) -> None:
    start = time.thread_time()
    with pytest.raises(ModelFileError, match="chat template"):
        ChatTemplate(source).render(MESSAGES)
    assert time.thread_time() - start < 5


@pytest.mark.parametrize(
    "source",
    [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "[" * 5000 + "1" + "]" * 5000 + " }}",
        "{{ " + "not " * 10000 + "1 }}",
        "{{ " + "-" * 50000 + "1 }}",
        "{{ 1" + "+1" * 20000 + " }}",
        "{{ 'a'" + "|upper" * 8000 + " }}",
        "{{ a" + ".b" * 20000 + " }}",
        "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
        "{% for i in [1] %}" * 40 + "{% endfor %}" * 40,
        "{{ " + "9" * 50000 + " }}",
        "{% set ns = namespace(y=[]) %}{% for i in range(9999) %}{% set ns.y = [ns.y] %}{% endfor %}{{ ns.y }}",
    ],
)
def test_deep_templates_are_refused(source: str) -> None:
    with pytest.raises(ModelFileError, match="chat template"):
        ChatTemplate(source).render(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{{ messages.__len__() }}",
        "{{ raise_exception.__globals__['sys'] }}",
        "{{ self._TemplateReference__context.environment }}",
        "{% include 'x' %}",
        "{% import 'x' as x %}",
        "{% extends 'x' %}",
        "{{ nothing() }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.nothing.more }}",
        "{{ '\\ud800' }}",
        "{{ namespace(x=1) }}",
    ],
)
def test_what_templates_may_not_do_is_an_error(source: str) -> None:
    with pytest.raises(ModelFileError, match="chat template"):
        ChatTemplate(source).render(MESSAGES)


@pytest.mark.parametrize(
    "source",
    ["{{ messages[0].content._real }}", "{{ '' | attr('__class__') }}", "{{ '{0.__class__}'.format(1) }}"],
)
def test_what_is_hidden_does_not_show(source: str) -> None:
    assert ChatTemplate(source).render(MESSAGES) == ""


def test_long_conversations_are_not_refused() -> None:
    source = (
        "{% for message in messages %}"
        "{% if loop.index0 == messages | length - 1 %}{{ messages[1:] | length }}{% endif %}"
        "{% set content = message.content | trim %}<|{{ message.role }}|>{{ content ~ '\n' }}{{ message | tojson }}"
        "{% endfor %}"
    )
    messages = [{"role": "user", "content": "word " * 100}] * 3000
    text = ChatTemplate(source).render(messages)
    assert len(text) > 3_000_000
    assert "2999" in text
