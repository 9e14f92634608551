"""Both precisions, through the CPU's kernels, against the portable path with the same weights, on whole models."""

import os
import pydoc_data.topics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import irkit
from irkit.engine import open_model, steps
from irkit.engine.runtime import Runtime
from irkit.kernels.cpu import can_fuse, library, unpacked
from irkit.options import LoadOptions
from irkit.transformer import cache as kv
from irkit.transformer.decoder import forward
from irkit.transformer.taps import hook_names

pytestmark = pytest.mark.skipif(library.load() is None, reason="the extension is not installed")
# A text in plain English that every Python has.
TEXT = pydoc_data.topics.topics["objects"] + pydoc_data.topics.topics["naming"]


@partial(jax.jit, static_argnames=("config", "spec"))
def read(params: Any, cache: Any, tokens: Any, start: Any, count: Any, *, config: Any, spec: Any = ()) -> Any:
    where = steps.positions(tokens, start)
    return forward(params, tokens, where, cache, config=config, count=count, spec=spec)


def runtime_of(path: Path, precision: Any) -> Runtime:
    return open_model(path, LoadOptions(precision=precision, backend="cpu")).load().result()


def logits(runtime: Runtime, ids: Sequence[int], *sizes: int, portable: bool = False) -> np.ndarray:
    """After each of `ids`, which are read in calls of so many tokens; through XLA, if they are to be `portable`."""
    params = unpacked(runtime.params) if portable else runtime.params
    cache = kv.empty(runtime.config, 1, 512, runtime.cache_dtype)
    parts, done = [], 0
    for size in sizes:
        tokens = np.array([ids[done : done + size]], np.int32)
        where = np.array([done], np.int32), np.array([size], np.int32)
        found, cache, _ = read(params, cache, tokens, *where, config=runtime.config)
        parts.append(np.asarray(found[0]))
        done += size
    return np.concatenate(parts)


IDS = np.random.default_rng(0).integers(0, 257, 41).tolist()
FLOATS = ("F32", "F16", "BF16")


@pytest.mark.usefixtures("nothing_prepared")
@pytest.mark.parametrize(
    ("format_name", "shape"),
    [
        *((name, {}) for name in (*FLOATS, "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")),
        ("Q8_0", {"d_head": 32, "biases": True}),
        ("Q4_1", {"d_head": 8, "n_heads": 8}),  # heads too small for the kernels
        ("Q8_0", {"n_heads": 20, "n_kv_heads": 1, "d_mlp": 160}),  # more query heads than one call's few rows
        ("F16", {"d_model": 80, "d_mlp": 72}),  # widths that 32 does not divide
    ],
)
def test_logits_are_near_the_portable_ones(
    small_model: Callable[..., Path], format_name: str, shape: dict[str, Any]
) -> None:
    path = small_model(format_name, **shape)
    fast, exact = runtime_of(path, "fast"), runtime_of(path, "exact")
    assert fast.packed
    assert {block["down"].form for block in exact.params["blocks"]} == {"f32"}
    assert all(can_fuse(block, fast.config.d_head) == (fast.config.d_head >= 16) for block in fast.params["blocks"])
    expected = logits(exact, IDS, 41, portable=True)
    # Of logits with a deviation of 2: float16 in the cache, and activations in eight bits where weights are codes.
    most, usual = (0.1, 0.004) if format_name in FLOATS else (1.0, 0.1)
    for sizes in [(1,), (5,), (40, 1)]:
        error = np.abs(logits(fast, IDS, *sizes) - expected[: sum(sizes)])
        assert error.max() < most
        assert error.mean() < usual
        np.testing.assert_allclose(logits(exact, IDS, *sizes), expected[: sum(sizes)], rtol=0, atol=1e-4)


@pytest.mark.usefixtures("nothing_prepared")
def test_calls_of_several_tokens_give_the_same_bits_however_divided(small_model: Callable[..., Path]) -> None:
    runtime = runtime_of(small_model("Q4_1"), "fast")
    whole = logits(runtime, IDS, 40)
    for sizes in [(20, 20), (5, 3, 32), (2,) * 20, (33, 7)]:
        np.testing.assert_array_equal(logits(runtime, IDS, *sizes), whole)


@pytest.mark.usefixtures("nothing_prepared")
@pytest.mark.filterwarnings("ignore:jax has already started")
def test_sessions_with_threads_of_their_own_take_turns(
    small_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, text, chosen = small_model("Q4_0"), "and so on, and so forth, " * 3, []
    choose = library.set_threads
    monkeypatch.setattr(library, "set_threads", lambda threads: (chosen.append(threads), choose(threads)))
    sessions = [irkit.Session(path, backend="cpu", threads=threads) for threads in (1, 2, 3)]
    scores = [session.score(text, top_logprobs=5) for _ in range(3) for session in sessions]
    assert all(score == scores[0] for score in scores[1:])
    assert chosen == [1, 2, 3] * 3
    for session in sessions:
        session.close()


def test_the_default_models_score_does_not_depend_on_the_threads(
    session: irkit.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, scores = session.model.load().result(), []
    if not runtime.packed:
        pytest.skip("this is not the CPU")
    for threads in (2, 1, 3):
        monkeypatch.setattr(runtime, "threads", threads)
        scores.append(session.score(TEXT[:150], top_logprobs=20))
    assert scores[0] == scores[1] == scores[2]


def divergence(fast: Runtime, exact: Runtime, ids: Sequence[int]) -> float:
    """The mean over the tokens of KL(exact | fast), in nats, read 256 at a time."""

    @jax.jit
    def between(fast: Any, exact: Any) -> Any:
        p, q = jax.nn.log_softmax(exact), jax.nn.log_softmax(fast)
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1)

    capacity = -(-len(ids) // 256) * 256
    caches = [kv.empty(each.config, 1, capacity, each.cache_dtype) for each in (fast, exact)]
    found = []
    for start in range(0, len(ids), 256):
        part = np.zeros((1, 256), np.int32)
        count = min(256, len(ids) - start)
        part[0, :count] = ids[start : start + count]
        where, logits = (np.array([start], np.int32), np.array([count], np.int32)), []
        for index, runtime in enumerate((fast, exact)):
            made, caches[index], _ = read(runtime.params, caches[index], part, *where, config=runtime.config)
            logits.append(made[0])
        found.append(np.asarray(between(*logits))[:count])
    return float(np.concatenate(found).mean())


@pytest.mark.parametrize(
    ("tokens", "most"), [(300, 1e-2), pytest.param(2000, 5e-3, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_fast_stays_near_exact_on_the_default_model(
    session: irkit.Session, exact_session: irkit.Session, tokens: int, most: float
) -> None:
    fast, exact = (each.model.load().result() for each in (session, exact_session))
    if not fast.packed:
        pytest.skip("this is not the CPU")
    ids = session.tokenize(TEXT)[:tokens]
    assert len(ids) == tokens
    assert 1e-5 < divergence(fast, exact, ids) < most


def test_what_is_captured_does_not_change_the_answer(session: irkit.Session) -> None:
    runtime = session.model.load().result()
    if not runtime.packed:
        pytest.skip("this is not the CPU")
    ids = session.tokenize("The capital of France is")
    names = hook_names(runtime.config.n_layers)
    spec = tuple(name for name in names if not name.startswith("blocks.") or name.split(".")[1] in ("0", "29"))
    tokens, where = np.array([ids], np.int32), (np.zeros(1, np.int32), np.array([len(ids)], np.int32))
    results = []
    for wanted in ((), ("blocks.29.hook_resid_post",), spec):
        cache = kv.empty(runtime.config, 1, 64, runtime.cache_dtype)
        found, _, captures = read(runtime.params, cache, tokens, *where, config=runtime.config, spec=wanted)
        assert set(captures) == set(wanted)
        results.append((np.asarray(found[0]), captures))
    (plain, _), (beside, only), (whole, captures) = results
    np.testing.assert_array_equal(beside, plain)  # the stream between the layers costs them nothing
    assert session.detokenize([int(whole[-1].argmax())]) == session.detokenize([int(plain[-1].argmax())]) == " Paris"
    assert np.abs(whole - plain).mean() < 0.2
    for layer in (0, 29):
        pattern = np.asarray(captures[f"blocks.{layer}.attn.hook_pattern"])
        assert pattern.shape == (1, 9, len(ids), 64)
        np.testing.assert_allclose(pattern.sum(-1), 1, atol=1e-5)
        assert not np.triu(pattern[0, 0], 1).any()
        added = np.asarray(captures[f"blocks.{layer}.attn.hook_result"]).sum(2)
        out = np.asarray(captures[f"blocks.{layer}.hook_attn_out"])
        np.testing.assert_allclose(added, out, atol=1e-4 * np.abs(out).max())  # no block of int8 spans two heads
    final = np.asarray(captures["blocks.29.hook_resid_post"])
    assert np.abs(final - np.asarray(only["blocks.29.hook_resid_post"])).mean() < 0.05 * np.abs(final).mean()


WITHOUT_KERNELS = """
import sys, irkit
with irkit.Session(sys.argv[1], backend="cpu") as session:
    print(session.info().kernels)
    print(session.generate(sys.argv[2], temperature=0, num_predict=12).text)
"""


def test_without_the_kernels_the_text_is_the_same(session: irkit.Session, model_path: Path) -> None:
    if not session.info().kernels.startswith("cpu ("):
        pytest.skip("the kernels do not compute here")
    prompt = "1, 2, 3, 4, 5, 6, 7, 8, 9,"  # after which no two tokens are nearly as likely
    expected = session.generate(prompt, temperature=0, num_predict=12).text
    assert expected == " 10, 11, 12,"
    command = [sys.executable, "-c", WITHOUT_KERNELS, str(model_path), prompt]
    done = subprocess.run(
        command, env=os.environ | {"IRKIT_KERNELS": "xla"}, capture_output=True, text=True, timeout=250
    )
    assert done.stdout == f"xla (IRKIT_KERNELS=xla)\n{expected}\n", done.stderr
