"""The CPU's sampler against the one that XLA compiles: the same tokens for the same seeds."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irkit.kernels import cpu
from irkit.kernels.cpu import library
from irkit.options import SamplingOptions
from irkit.transformer import sampling

pytestmark = pytest.mark.skipif(library.load() is None, reason="the extension is not installed")
ROWS, VOCABULARY, PAST = 64, 300, 32
OPTIONS = st.builds(
    SamplingOptions,
    temperature=st.sampled_from([0.0, 0.3, 0.8, 2.0]),
    top_k=st.sampled_from([-1, 0, 1, 3, 40, 200, 1000]),
    top_p=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    typical_p=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    top_n_sigma=st.sampled_from([-1.0, 0.5, 2.0]),
    xtc_probability=st.sampled_from([0.0, 0.4, 1.0]),
    xtc_threshold=st.sampled_from([0.0, 0.05, 0.2, 0.6]),
    repeat_last_n=st.sampled_from([-1, 0, 2, 64]),
    repeat_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, -0.2]),
    logit_bias=st.sampled_from([{}, {0: 3.0, 5: -100.0}]),
)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    assert library.register()


@jax.jit
def both(*arguments: Any) -> tuple[sampling.Sampled, sampling.Sampled]:
    return sampling.sample(*arguments, top=5, kernels=cpu), sampling.sample(*arguments, top=5)


def bits(listed: np.ndarray) -> np.ndarray:
    """The words, uint32 `[row, w]`, of booleans `[row, vocabulary]`."""
    padded = np.pad(listed, ((0, 0), (0, -listed.shape[1] % 32)))
    return np.packbits(padded, axis=1, bitorder="little").view("<u4").astype(np.uint32)


@settings(max_examples=60)
@given(
    st.lists(OPTIONS, min_size=1, max_size=ROWS),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.5, 2.0, 5.0]),
    st.sampled_from([0.0, 0.01, 0.5, 0.99]),
)
def test_it_draws_what_xla_draws(options: list[SamplingOptions], seed: int, scale: float, few: float) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=scale, size=(ROWS, VOCABULARY)).astype(np.float32)
    history = rng.integers(0, VOCABULARY // 4, (ROWS, PAST)).astype(np.int32)
    length = rng.integers(0, PAST + 1, ROWS).astype(np.int32)
    chosen = sampling.settings(
        [options[row % len(options)] for row in range(ROWS)], rng.integers(0, 2**63, ROWS).tolist(), VOCABULARY
    )
    listed = rng.random((ROWS, VOCABULARY)) < few
    listed[np.arange(ROWS), rng.integers(0, VOCABULARY, ROWS)] = True
    listed[::3] = True  # rows in which any token may be drawn, beside others
    found, expected = both(logits, history, length, chosen, bits(listed))
    assert listed[np.arange(ROWS), np.asarray(found.token)].all()
    same = np.asarray(found.token) == np.asarray(expected.token)
    assert same.sum() >= ROWS - 1  # a random number may fall between two sums that are rounded differently
    np.testing.assert_allclose(found.logprob[same], expected.logprob[same], atol=1e-5)
    np.testing.assert_array_equal(found.top[0], expected.top[0])
    np.testing.assert_allclose(found.top[1], expected.top[1], atol=1e-5)


def test_ties_go_to_the_first() -> None:
    logits = np.zeros((1, VOCABULARY), np.float32)
    greedy = sampling.settings([SamplingOptions(temperature=0)], [0], VOCABULARY)
    for first in (0, 31, 32, VOCABULARY - 1):
        allowed = bits(np.arange(VOCABULARY)[None] >= first)
        found, _ = both(logits, np.zeros((1, PAST), np.int32), np.zeros(1, np.int32), greedy, allowed)
        assert found.token.tolist() == [first]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_draw_some_token(value: float, temperature: float) -> None:
    logits = np.full((1, VOCABULARY), value, np.float32)
    everything = SamplingOptions(
        temperature=temperature, top_k=0, typical_p=0.5, min_p=0.1, top_n_sigma=1, xtc_probability=1
    )
    chosen = sampling.settings([everything], [0], VOCABULARY)
    any_token = sampling.everything(1, VOCABULARY)
    found, _ = both(logits, np.full((1, PAST), -7, np.int32), np.full(1, PAST, np.int32), chosen, any_token)
    assert 0 <= found.token[0] < VOCABULARY


def test_more_tokens_than_the_history_holds_are_refused() -> None:
    chosen = sampling.settings([SamplingOptions()], [0], 8)
    logits, history, length = np.zeros((1, 8), np.float32), np.zeros((1, 4), np.int32), np.array([5], np.int32)
    with pytest.raises(Exception, match="more tokens than there is history"):
        jax.block_until_ready(jax.jit(cpu.sample)(logits, history, length, sampling.everything(1, 8), chosen))


def test_a_mask_of_another_size_is_refused() -> None:
    chosen = sampling.settings([SamplingOptions()], [0], 33)
    logits, history, length = np.zeros((1, 33), np.float32), np.zeros((1, 4), np.int32), np.array([0], np.int32)
    with pytest.raises(Exception, match="shapes do not fit"):
        jax.block_until_ready(jax.jit(cpu.sample)(logits, history, length, np.ones((1, 1), np.uint32), chosen))
