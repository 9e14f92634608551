"""Several answers at once: each as it is alone, whatever the others do, and nothing left behind."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import irkit
from irkit import edits
from irkit.engine.programs import load_or_compile
from irkit.engine.runtime import BATCHES, Runtime
from irkit.engine.tapping import tapping
from irkit.engine.worker import DEVICE, MOST, Steps
from irkit.kernels.cpu import library
from irkit.results import Generation
from irkit.transformer.taps import Operands, Spec

pytestmark = pytest.mark.skipif(library.load() is None, reason="the extension is not installed")
FEW, MANY = BATCHES
PROMPTS = [[7 + i, *range(20 + i, 30 + 3 * i)] for i in range(FEW + 2)]
OPTIONS: dict[str, Any] = {"temperature": 1.0, "seed": 5, "num_predict": 21, "logit_bias": {257: -100.0}}


@pytest.fixture(scope="module", params=["Q8_0", "F16"])
def small(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]
) -> Iterator[irkit.Session]:
    path = write_model(tmp_path_factory.mktemp("models") / "small.gguf", request.param)
    with irkit.Session(path, backend="cpu", num_ctx=512) as session:
        prepare(session, 512)
        yield session


def prepare(session: irkit.Session, capacity: int, *, tops: tuple[bool, ...] = (False, True)) -> None:
    """Have what decodes for several, and whatever else was asked for, compiled."""
    runtime = session.model.load().result()
    for size in BATCHES:
        for top in tops:
            runtime.can_batch(size, capacity, top, Spec(), Operands())
    for compiled in tuple(runtime._batched.values()):
        compiled.result()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Which calls are made: the kind, and of how many tokens or rows."""
    made: list[tuple[str, int]] = []
    read, decode = Runtime.read, Runtime.decode
    monkeypatch.setattr(
        Runtime,
        "read",
        lambda self, cache, ids, *rest: (made.append(("read", len(ids))), read(self, cache, ids, *rest))[1],
    )
    monkeypatch.setattr(
        Runtime,
        "decode",
        lambda self, cache, tokens, *rest: (made.append(("decode", len(tokens))), decode(self, cache, tokens, *rest))[
            1
        ],
    )
    return made


def together(session: irkit.Session, asks: list[Callable[[irkit.Session], Generation]]) -> list[Generation]:
    """Answers that are asked for before the first begins."""
    held, go = threading.Event(), threading.Event()
    job = session.model.submit(lambda: (held.set(), go.wait(60)))
    held.wait(60)
    several = session.pooled()
    made = [ask(several) for ask in asks]
    go.set()
    job.result()
    return [generation.wait() for generation in made]


def alone(session: irkit.Session, ask: Callable[[irkit.Session], Generation]) -> Generation:
    session.reset()
    return ask(session.fork()).wait()


def told(generation: Generation) -> Any:
    """Everything but times."""
    tokens = [(t.id, t.text, t.logprob, t.top) for t in generation.tokens]
    return generation.text, tokens, generation.finish_reason


def idle(session: irkit.Session) -> None:
    """Nothing is left of what was computed but the caches for those to come."""
    until = time.monotonic() + 10
    while DEVICE._open and time.monotonic() < until:
        time.sleep(0.001)  # an answer is told its end before it leaves
    assert session.model.load().result().batches == []
    assert all(cache.batch is None for cache in session.model._pool._idle)
    assert (DEVICE.queued, DEVICE._running, DEVICE._waiting) == (0, [], [])


def bits_are_the_same(session: irkit.Session) -> bool:
    """Half precision is summed up in another order for several rows, but with AVX-512."""
    return "F16" not in session.info().quantization or "avx512" in library.describe()


def test_answers_are_those_of_one_by_one(small: irkit.Session, calls: list[tuple[str, int]]) -> None:
    kinds: list[dict[str, Any]] = [
        {"num_predict": 3}, {"temperature": 0.0}, {"top_logprobs": 3, "seed": 9}, {"top_k": 5, "repeat_penalty": 1.5},
        {"stop": "e"}, {"num_predict": 40, "min_p": 0.2, "format": "json"},
    ]  # fmt: skip
    asks = [
        lambda s, prompt=prompt, kind=kind: s.generate(prompt, **dict(OPTIONS, **kind))
        for prompt, kind in zip(PROMPTS, kinds, strict=True)
    ]
    expected = [told(alone(small, ask)) for ask in asks]
    calls.clear()
    found = [told(generation) for generation in together(small, asks)]
    if bits_are_the_same(small):
        assert found == expected
    else:
        assert [text for text, *_ in found] == [text for text, *_ in expected]
    batched = [rows for kind, rows in calls if kind == "decode"]
    assert batched.count(MANY) >= 5, "they are decoded together"
    idle(small)


def test_a_batch_is_as_large_as_it_must_be(small: irkit.Session, calls: list[tuple[str, int]]) -> None:
    lengths = [60, 60, 80, 80, 120, 120]
    asks = [
        lambda s, prompt=prompt, length=length: s.generate(prompt, **dict(OPTIONS, num_predict=length))
        for prompt, length in zip(PROMPTS, lengths, strict=True)
    ]
    expected = [alone(small, ask).text for ask in asks]
    calls.clear()
    assert [each.text for each in together(small, asks)] == expected
    rows = [size for kind, size in calls if kind == "decode"]
    changes = [size for i, size in enumerate(rows) if rows[i - 1 : i] != [size]]
    assert changes[:2] == [MANY, FEW], "two of eight are fewer than half"
    idle(small)


def test_many_more_than_can_be_made_at_once(small: irkit.Session) -> None:
    prompts = [[i % 200, 3, 4] for i in range(3 * MOST)]
    expected = [alone(small, lambda s, p=p: s.generate(p, **OPTIONS)).text for p in prompts]
    assert [g.text for g in small.generate_many(prompts, **OPTIONS)] == expected
    idle(small)


def test_one_that_is_cancelled_leaves_the_others(small: irkit.Session) -> None:
    expected = [alone(small, lambda s, p=p: s.generate(p, **OPTIONS)).text for p in PROMPTS]
    endless = small.pooled().generate([1, 2, 3], **dict(OPTIONS, num_predict=450))
    next(iter(endless))
    others = small.generate_many(PROMPTS, **OPTIONS)
    next(iter(others[0]))
    endless.cancel()
    assert [other.text for other in others] == expected
    assert endless.finish_reason == "cancelled"
    idle(small)


def test_one_that_waits_can_be_cancelled(small: irkit.Session) -> None:
    several = small.pooled()
    running = [several.generate([n, 1], **dict(OPTIONS, num_predict=300)) for n in range(MOST)]
    waiting = several.generate([1, 2, 3], **OPTIONS)
    waiting.cancel()
    assert (waiting.finish_reason, waiting.tokens) == ("cancelled", ())
    for generation in running:
        generation.cancel()
        generation.wait()
    idle(small)


def test_a_long_prompt_does_not_hold_up_the_others(small: irkit.Session, calls: list[tuple[str, int]]) -> None:
    long = np.random.default_rng(0).integers(0, 250, 480).tolist()
    quick = small.pooled().generate([1, 2, 3], **dict(OPTIONS, num_predict=400))
    next(iter(quick))
    slow = small.pooled().generate(long, **OPTIONS)
    slow.wait()
    reads = [index for index, (kind, size) in enumerate(calls) if kind == "read" and size > 3]
    assert [calls[index][1] for index in reads] == [128, 128, 128, 96]
    assert all(after - before > 1 for before, after in pairwise(reads)), "it decodes in between"
    assert slow.text == alone(small, lambda s: s.generate(long, **OPTIONS)).text
    quick.cancel()
    quick.wait()
    idle(small)


def test_answers_with_the_same_captures_or_edits_are_made_together(
    small: irkit.Session, calls: list[tuple[str, int]]
) -> None:
    vector = np.random.default_rng(0).normal(size=small.model.config.d_model).astype(np.float32)
    kinds: list[dict[str, Any]] = [
        {"capture": ["pattern", "ln_final.scale"]},
        {"capture": ["pattern", "ln_final.scale"]},
        {"capture": {"names": "resid_post", "layers": 1}, "edits": [irkit.steer(vector, 0, strength=1.0)]},
        {"capture": {"names": "resid_post", "layers": 1}, "edits": [irkit.steer(vector, 1, strength=-3.0)]},
        {},
        {},
    ]
    asks = [
        lambda s, prompt=prompt, kind=kind: s.generate(prompt, **kind, **OPTIONS)
        for prompt, kind in zip(PROMPTS, kinds, strict=True)
    ]
    expected = [alone(small, ask) for ask in asks]
    together(small, asks)  # asks for the programs
    prepare(small, 512)
    small.pooled().reset()
    calls.clear()
    found = together(small, asks)
    rows = [size for kind, size in calls if kind == "decode"]
    assert set(rows) == {FEW}
    assert len(rows) == 3 * OPTIONS["num_predict"] // 4, "two of each kind"
    for mine, its, kind in zip(found, expected, kinds, strict=True):
        assert (told(mine) if bits_are_the_same(small) else mine.text) == (
            told(its) if bits_are_the_same(small) else its.text
        )
        for token, same in zip(mine.tokens if kind else (), its.tokens, strict=False):
            assert token.captures is not None
            assert same.captures is not None
            assert token.captures.provenance.positions == same.captures.provenance.positions
            assert list(token.captures) == list(same.captures)
            for name in token.captures:
                np.testing.assert_allclose(
                    token.captures[name], same.captures[name], rtol=1e-5, atol=1e-6, err_msg=name
                )
    idle(small)


def test_a_program_that_was_let_go_of_is_compiled_beside_what_goes_on_again(
    small: irkit.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = small.model.load().result()
    monkeypatch.setattr("irkit.engine.runtime._MOST_TAPPED", 1)

    def ready(point: str) -> bool:
        made = tapping(small.model.config, 4, names=point, at_end=True)
        return runtime.can_batch(FEW, 512, False, made.spec, made.operands(512, 4, 1))

    for point in ("resid_pre", "resid_mid"):
        assert not ready(point)
        for compiled in tuple(runtime._batched.values()):
            compiled.result()
        assert ready(point)
    held = len(runtime._batched)
    assert not ready("resid_pre"), "the other took its place"
    assert len(runtime._batched) <= held + 1
    for compiled in tuple(runtime._batched.values()):
        compiled.result()


@pytest.mark.parametrize(
    "ask",
    [
        lambda s: told(s.generate(PROMPTS[0], edits=[irkit.ablate("attn_out", layers=1)], **OPTIONS).wait()),
        lambda s: s.trace(PROMPTS[0], names=["resid_post"])["resid_post"].tolist(),
        lambda s: s.score(PROMPTS[0]).total,
        lambda s: s.embed(PROMPTS[0]).tolist(),
    ],
    ids=["answer", "trace", "score", "embed"],
)
def test_while_a_program_is_compiled_for_one_the_others_go_on(
    small: irkit.Session, ask: Callable[[irkit.Session], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, several = small.model.load().result(), small.pooled()
    with small.hooks([], edits=[irkit.ablate("attn_out", layers=0)]):
        alike = small.pooled()
        expected = ask(alike)
        for key in [key for key in runtime._programs if dict(key[-1]).get("spec")]:
            del runtime._programs[key]
        compiling, go = threading.Event(), threading.Event()

        def held(*arguments: Any, **how: Any) -> Any:
            if how.get("spec"):
                compiling.set()
                assert go.wait(60)
            return load_or_compile(*arguments, **how)

        def busy() -> Steps:
            while not compiling.is_set():
                yield None

        monkeypatch.setattr("irkit.engine.runtime.load_or_compile", held)
        other = DEVICE.answer(busy, threading.Event())
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(ask, alike)
            assert compiling.wait(60)
            other.result()
            assert len(several.generate(PROMPTS[1], **OPTIONS).wait().tokens) == OPTIONS["num_predict"]
            assert not found.done()
            go.set()
            assert found.result() == expected
    idle(small)


def test_an_answer_changed_by_a_function_has_its_own_way(small: irkit.Session, calls: list[tuple[str, int]]) -> None:
    seen = set[int]()

    def halve(value: Any, hook: Any) -> Any:
        seen.add(value.shape[0])
        return value * 0.5

    def changed(s: irkit.Session) -> Generation:
        return s.generate(PROMPTS[0], edits=[edits.call("attn_out", halve, layers=0)], **OPTIONS)

    expected = told(alone(small, changed))
    calls.clear()
    assert [told(each) for each in together(small, [changed, changed])] == [expected] * 2
    assert seen == {1}
    assert {size for kind, size in calls if kind == "decode"} == {1}
    idle(small)


def test_what_earlier_answers_read_is_not_read_again(small: irkit.Session) -> None:
    several, opening = small.pooled(), list(range(100, 180))
    several.reset()
    first = several.generate([*opening, 1, 2], **OPTIONS).wait()
    again = several.generate([*opening, 3, 4], **OPTIONS).wait()
    assert (first.stats.cached_tokens, again.stats.cached_tokens) == (0, len(opening))
    went_on = [*opening, 1, 2, *(token.id for token in first.tokens), 5]
    on = several.generate(went_on, **OPTIONS).wait()
    assert on.stats.cached_tokens == len(went_on) - 2, "the other did not take away what the first has left"
    assert on.text == alone(small, lambda s: s.generate(went_on, **OPTIONS)).text
    changed = [irkit.ablate("attn_out", layers=0)]
    assert several.generate([*opening, 3], edits=changed, **OPTIONS).wait().stats.cached_tokens == 0
    assert several.generate([*opening, 6], **OPTIONS).wait().stats.cached_tokens == len(opening)


def test_a_prompt_that_was_read_or_scored_serves_many(small: irkit.Session) -> None:
    several, prompt = small.pooled(), list(range(60, 140))
    want = alone(small, lambda s: s.generate(prompt, **OPTIONS)).text
    for read in (
        lambda: several.generate(prompt, **dict(OPTIONS, num_predict=0)).wait(),
        lambda: several.score(prompt),
    ):
        several.reset()
        read()
        made = together(several, [lambda s: s.generate(prompt, **OPTIONS)] * 3)
        assert [answer.stats.cached_tokens for answer in made] == [len(prompt) - 1] * 3
        assert [answer.text for answer in made] == [want] * 3
    with small.hooks([], edits=[irkit.ablate("attn_out", layers=0)]):
        small.pooled().score([*range(150, 180)])
    assert several.generate([*range(150, 180)], **OPTIONS).wait().stats.cached_tokens == 0


def test_what_another_cache_begins_with_is_not_kept_beside_it(small: irkit.Session) -> None:
    several = small.pooled()
    several.reset()
    for length in (20, 20, 30, 25):
        several.generate([*range(100, 100 + length)], **dict(OPTIONS, num_predict=0)).wait()
    assert small.model.submit(lambda: [len(cache.ids) for cache in small.model._pool._idle]).result() == [30, 25]


def test_the_same_cache_is_used_in_the_order_of_the_calls(small: irkit.Session) -> None:
    small.reset()
    first = small.generate(PROMPTS[0], **OPTIONS)
    second = small.generate(PROMPTS[0], **OPTIONS)
    small.cache.rewind(1)
    assert first.done
    assert second.done
    assert second.stats.cached_tokens == len(PROMPTS[0]) - 1
    assert first.text == second.text
    assert len(small.cache) == len(PROMPTS[0]) + OPTIONS["num_predict"] - 2


def test_jobs_do_not_wait_for_answers_they_have_nothing_to_do_with(small: irkit.Session) -> None:
    endless = small.pooled().generate([1, 2, 3], **dict(OPTIONS, num_predict=450))
    next(iter(endless))
    assert small.score([1, 2, 3]).tokens
    assert not endless.done
    endless.cancel()
    endless.wait()


def test_an_answer_that_cannot_be_told_fails_alone(small: irkit.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    put = Generation._put

    def fails(self: Generation, *tokens: Any) -> None:
        if self is made[1] and len(self._tokens) > 1:
            raise MemoryError("no more")
        put(self, *tokens)

    expected = [told(alone(small, lambda s, prompt=prompt: s.generate(prompt, **OPTIONS))) for prompt in PROMPTS[:3]]
    monkeypatch.setattr(Generation, "_put", fails)
    held = threading.Event()
    small.model.submit(lambda: held.wait(60))
    made = small.generate_many(PROMPTS[:3], **OPTIONS)
    held.set()
    with pytest.raises(MemoryError):
        made[1].wait()
    assert [each.text for each in (made[0], made[2])] == [expected[0][0], expected[2][0]]
    idle(small)


def test_a_call_that_fails_ends_the_answers_in_it_and_no_others(
    small: irkit.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, failed = Runtime.decode, threading.Event()

    def fails_once(self: Runtime, cache: Any, tokens: Any, *rest: Any) -> Any:
        if len(tokens) == FEW and not failed.is_set():
            failed.set()
            raise MemoryError("no more")
        return decode(self, cache, tokens, *rest)

    monkeypatch.setattr(Runtime, "decode", fails_once)
    held, made = threading.Event(), []
    small.model.submit(lambda: held.wait(60))
    made = small.generate_many(PROMPTS[:3], **OPTIONS)
    held.set()
    ended = 0
    for generation in made:
        try:
            generation.wait()
        except MemoryError:
            ended += 1
    assert ended > 1
    idle(small)
    assert [g.text for g in small.generate_many(PROMPTS, **OPTIONS)] == [
        alone(small, lambda s, p=p: s.generate(p, **OPTIONS)).text for p in PROMPTS
    ]


def test_a_cache_that_grows_goes_on_in_a_larger_batch(
    tmp_path: Path, write_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("irkit.engine.cache.SMALLEST", 64)
    with irkit.Session(write_model(tmp_path / "small.gguf", "Q8_0"), backend="cpu") as session:
        for capacity in (64, 128):
            prepare(session, capacity, tops=(False,))
        prompts = [[1, *range(50)], [2, *range(10)], [3, *range(40)]]
        options = dict(OPTIONS, num_predict=60)
        expected = [alone(session, lambda s, p=p: s.generate(p, **options)).text for p in prompts]
        assert [g.text for g in session.generate_many(prompts, **options)] == expected


def test_exact_answers_are_made_together(
    tmp_path: Path, write_model: Callable[..., Path], calls: list[tuple[str, int]]
) -> None:
    path = write_model(tmp_path / "small.gguf")
    with irkit.Session(path, backend="cpu", precision="exact", num_ctx=64) as session:
        prepare(session, 64)
        expected = [told(alone(session, lambda s, p=p: s.generate(p, **OPTIONS))) for p in PROMPTS[:3]]
        calls.clear()
        found = together(session, [lambda s, p=p: s.generate(p, **OPTIONS) for p in PROMPTS[:3]])
        assert [told(each) for each in found] == expected
        assert {rows for kind, rows in calls if kind == "decode"} == {FEW}
