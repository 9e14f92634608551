"""What a notebook shows of results: HTML without script, that says what is there and lets nothing out of its place."""

import asyncio
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import irkit
from irkit import reprs
from irkit.results import Alternative, Generation, Score, Stats, Token

END: dict[str, Any] = {"logit_bias": {257: -1e4}}
"""Keeps the tiny model from ending its answer."""


@pytest.fixture
def tiny(tiny_path: Path) -> Iterator[irkit.Session]:
    with irkit.Session(tiny_path) as session:
        yield session


def words(html: str) -> str:
    """What a reader sees, once all is known to be closed that was opened."""
    shown, opened = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in ("script", "img", "link", "iframe")
            assert not [name for name, _ in attrs if name.startswith("on")]
            opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

        def handle_data(self, data: str) -> None:
            if "style" not in opened:
                shown.append(data)

    Reader().feed(html)
    assert not opened
    return "".join(shown)


def made(*tokens: Token, done: bool = True) -> Generation:
    generation = Generation()
    for token in tokens:
        generation._put(token)
    if done:
        generation._finish("stop", Stats(prompt_tokens=5, cached_tokens=2, tokens=len(tokens), decode_seconds=0.5))
    return generation


def test_an_answer_shows_its_tokens_and_what_it_took() -> None:
    other = Alternative(4, "<b>", math.log(0.25))
    tokens = Token(3, "<i>", math.log(0.5), (other,)), Token(4, " end", -20.0)
    html = made(*tokens)._repr_html_()
    assert words(html) == "<i> end2 tokens · 2 tokens/s · prompt 5, 2 cached · stop"
    titles = re.findall(r'title="(.*?)"', html, re.S)
    assert titles[0].splitlines() == ["&#x27;&lt;i&gt;&#x27;: 50 % (-0.69 nats)", "&#x27;&lt;b&gt;&#x27;: 25 %"]
    shades = [int(found) for found in re.findall(r'class="irkit-t irkit-s(\d)"', html)]
    assert shades == [1, reprs.SHADES]


def test_an_answer_in_the_making_does_not_wait() -> None:
    assert "reading the prompt" in words(made(done=False)._repr_html_())
    first, second = Token(1, "Once", -0.1, time=0.5), Token(2, " upon", -0.1, time=0.75)
    going = made(first, second, done=False)
    assert words(going._repr_html_()) == "Once upon2 tokens · 4 tokens/s · …"
    going._most = 1000
    assert words(going._repr_html_()) == "Once upon2 of 1,000 tokens · 4 tokens/s · …"


def test_a_long_answer_is_plain_text() -> None:
    html = made(*[Token(1, "a", -0.1)] * (reprs.MOST_TOKENS + 1))._repr_html_()
    assert "title=" not in html
    assert len(html) < 2 * reprs.MOST_TOKENS


def test_a_failed_answer_says_why() -> None:
    generation = made(done=False)
    generation._fail(irkit.errors.BackendError("the <device> is gone"))
    assert "the <device> is gone" in words(generation._repr_html_())


def test_a_score_shows_its_tokens() -> None:
    html = Score((Token(1, "The", None), Token(2, " spoon", -3.0)))._repr_html_()
    assert words(html) == "The spoon2 tokens · -3.00 nats · perplexity 20.09"
    assert html.count("title=") == 1
    assert "perplexity" not in words(Score((Token(1, "a", None),))._repr_html_())


def test_a_session_shows_itself_without_loading(tiny: irkit.Session) -> None:
    assert "2 layers × 4 heads, 64 wide" in words(tiny._repr_html_())
    assert tiny.model._runtime is None or tiny.model._runtime.done()
    tiny.generate([1, 2, 3], num_predict=4, **END).wait()
    assert "6 of 512 tokens of context in use" in words(tiny._repr_html_())
    tiny.close()
    assert "closed" in words(tiny._repr_html_())


def test_info_and_trace_are_tables(tiny: irkit.Session) -> None:
    shown = words(tiny.info()._repr_html_())
    assert "258 tokens" in shown
    assert "4 (2 of keys and values), 16 wide" in shown
    trace = tiny.trace([1, 2, 3], names=["pattern", "resid_post"])
    assert "pattern2[b, head, query, key]" in words(trace._repr_html_())


def test_a_cache_shows_its_end(tiny: irkit.Session) -> None:
    assert words(tiny.fork().cache._repr_html_()) == "KV cache of tiny0 of 512 tokens · clean · 0 bytes"
    tiny.generate([40 + at % 20 for at in range(70)], num_predict=1).wait()
    shown = words(tiny.cache._repr_html_())
    assert shown.startswith(f"KV cache of tiny…{tiny.detokenize(tiny.cache.ids[-60:])}70 of 512 tokens · clean")


def test_a_token_prints_as_its_text() -> None:
    assert f"{Token(1, ' Paris', -0.1)}" == " Paris"


def test_awaiting_an_answer_leaves_the_loop_free(tiny: irkit.Session) -> None:
    async def both() -> int:
        turns = 0

        async def turn() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        turning = asyncio.create_task(turn())
        answer = await tiny.agenerate([1, 2], num_predict=40, seed=1, **END)
        turning.cancel()
        assert answer.done
        assert answer.text == (await tiny.agenerate([1, 2], num_predict=40, seed=1, **END)).text
        assert len([token async for token in tiny.arespond("hello", num_predict=5, **END)]) == 5
        return turns

    assert asyncio.run(both()) > 10


def test_an_answer_ends_with_the_task_that_awaits_it(tiny_path: Path) -> None:
    async def cancelled(session: irkit.Session) -> Generation:
        answer = session.agenerate([1, 2], **END)

        async def wait() -> None:
            await answer

        waiting = asyncio.create_task(wait())
        await anext(aiter(answer))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return answer

    with irkit.Session(tiny_path, num_ctx=1 << 20) as session:
        assert asyncio.run(cancelled(session)).finish_reason == "cancelled"


def test_awaiting_raises_what_failed(tiny: irkit.Session) -> None:
    async def failed() -> None:
        generation = made(done=False)
        asyncio.get_running_loop().call_soon(generation._fail, irkit.errors.BackendError("gone"))
        await generation

    with pytest.raises(irkit.errors.BackendError, match="gone"):
        asyncio.run(failed())
