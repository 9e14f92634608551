"""The sampler chain against a plain numpy reading of llama.cpp's, and its draws against its own distribution."""

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import irkit
from irkit.errors import OptionError
from irkit.options import SamplingOptions
from irkit.transformer import sampling

OFF: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


def distribution(probabilities: list[float], **options: Any) -> np.ndarray:
    """Of tokens that the model gives these probabilities, with every sampler off that is not named."""
    return irkit.sampling_distribution(np.log(probabilities), **(OFF | options))


def test_with_everything_off_it_is_the_models_own() -> None:
    np.testing.assert_allclose(distribution([0.1, 0.2, 0.3, 0.4]), [0.1, 0.2, 0.3, 0.4], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_k": 2}, [0, 0, 3 / 7, 4 / 7]),
        ({"top_p": 0.4}, [0, 0, 0, 1]),
        ({"top_p": 0.41}, [0, 0, 3 / 7, 4 / 7]),
        ({"top_p": 0.0}, [0, 0, 0, 1]),
        ({"min_p": 0.6}, [0, 0, 3 / 7, 4 / 7]),
        ({"min_p": 1.0}, [0, 0, 0, 1]),
        ({"temperature": 0}, [0, 0, 0, 1]),
        ({"temperature": 0.5}, [0.01 / 0.3, 0.04 / 0.3, 0.09 / 0.3, 0.16 / 0.3]),
        # Surprises 2.30 1.61 1.20 0.92, entropy 1.28: the third token is the most typical, then the second.
        ({"typical_p": 0.2}, [0, 0, 1, 0]),
        ({"typical_p": 0.35}, [0, 0.4, 0.6, 0]),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.25}, [0.1 / 0.6, 0.2 / 0.6, 0.3 / 0.6, 0]),
        ({"xtc_probability": 0.5, "xtc_threshold": 0.25}, [(0.1 + 1 / 6) / 2, (0.2 + 1 / 3) / 2, (0.3 + 0.5) / 2, 0.2]),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.35}, [0.1, 0.2, 0.3, 0.4]),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.51}, [0.1, 0.2, 0.3, 0.4]),
        ({"logit_bias": {0: 1e4}}, [1, 0, 0, 0]),
        # top_k comes before top_p: of the two left, the larger has 4/7 of the mass.
        ({"top_k": 2, "top_p": 0.5}, [0, 0, 0, 1]),
    ],
)  # fmt: skip
def test_four_tokens(options: dict[str, Any], expected: list[float]) -> None:
    np.testing.assert_allclose(distribution([0.1, 0.2, 0.3, 0.4], **options), expected, atol=1e-5)


def test_penalties_see_the_window_only() -> None:
    logits = np.array([2.0, -2.0, 1.0, 0.0])

    def odds(*seen: int, **options: Any) -> np.ndarray:
        return irkit.sampling_distribution(logits, seen, **(OFF | options))

    def expected(*changed: float) -> np.ndarray:
        return np.exp(changed) / np.exp(changed).sum()

    np.testing.assert_allclose(odds(0, 1, repeat_penalty=2.0), expected(1.0, -4.0, 1.0, 0.0), rtol=1e-5)
    np.testing.assert_allclose(odds(0, 0, 2, frequency_penalty=0.5), expected(1.0, -2.0, 0.5, 0.0), rtol=1e-5)
    np.testing.assert_allclose(odds(0, 0, 2, presence_penalty=0.5), expected(1.5, -2.0, 0.5, 0.0), rtol=1e-5)
    last_two: dict[str, Any] = {"repeat_last_n": 2, "presence_penalty": 1.0}
    np.testing.assert_allclose(odds(0, 1, 2, **last_two), expected(2.0, -3.0, 0.0, 0.0), rtol=1e-5)
    everything: dict[str, Any] = {"repeat_last_n": -1, "presence_penalty": 1.0}
    np.testing.assert_allclose(odds(0, 1, 2, **everything), expected(1.0, -3.0, 0.0, 0.0), rtol=1e-5)
    none: dict[str, Any] = {"repeat_last_n": 0, "presence_penalty": 1.0}
    np.testing.assert_allclose(odds(0, 1, 2, **none), expected(2.0, -2.0, 1.0, 0.0), rtol=1e-5)


def test_the_first_of_equal_logits_wins_when_greedy() -> None:
    assert irkit.sampling_distribution([1.0, 3.0, 3.0], temperature=0).tolist() == [0, 1, 0]


def reference(logits: np.ndarray, tokens: list[int], o: SamplingOptions) -> np.ndarray:
    """The chain in float64 numpy, one sampler after the other on a list of candidates."""
    x = logits.astype(np.float64)
    for token, bias in o.logit_bias.items():
        x[token] += bias
    window = tokens if o.repeat_last_n < 0 else tokens[len(tokens) - min(o.repeat_last_n, len(tokens)) :]
    for token in set(window):
        x[token] = x[token] * o.repeat_penalty if x[token] <= 0 else x[token] / o.repeat_penalty
        x[token] -= window.count(token) * o.frequency_penalty + o.presence_penalty

    def softmax(ids: list[int]) -> np.ndarray:
        e = np.exp(x[ids] - x[ids].max())
        return e / e.sum()

    ids = sorted(range(len(x)), key=lambda i: -x[i])
    if o.top_n_sigma > 0:
        ids = [i for i in ids if x[i] >= x.max() - o.top_n_sigma * x.std()]
    if o.top_k > 0:
        ids = ids[: o.top_k]
    if o.typical_p < 1:
        p = softmax(ids)
        surprise = -np.log(p)
        order = np.argsort(np.abs(surprise - (p * surprise).sum()), kind="stable")
        count = next((n + 1 for n, total in enumerate(np.cumsum(p[order])) if total > o.typical_p), len(ids))
        ids = sorted((ids[n] for n in order[:count]), key=lambda i: -x[i])
    if o.top_p < 1:
        p = softmax(ids)
        ids = ids[: next((n + 1 for n, total in enumerate(np.cumsum(p)) if total >= o.top_p), len(ids))]
    if o.min_p > 0:
        ids = [i for i in ids if x[i] >= x[ids[0]] + np.log(o.min_p)]

    def final(ids: list[int]) -> np.ndarray:
        odds = np.zeros(len(x))
        if o.temperature <= 0:
            odds[ids[0]] = 1
        else:
            scaled = np.exp((x[ids] - x[ids].max()) / o.temperature)
            odds[ids] = scaled / scaled.sum()
        return odds

    above = int((softmax(ids) >= o.xtc_threshold).sum())
    without_top = ids[above - 1 :] if above >= 2 and o.xtc_threshold <= 0.5 else ids
    return (1 - o.xtc_probability) * final(ids) + o.xtc_probability * final(without_top)


OPTIONS = st.builds(
    SamplingOptions,
    temperature=st.sampled_from([0.0, 0.3, 0.8, 1.0, 2.0]),
    top_k=st.sampled_from([-1, 0, 1, 3, 40, 200]),
    top_p=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    typical_p=st.sampled_from([0.2, 0.7, 1.0]),
    top_n_sigma=st.sampled_from([-1.0, 0.5, 2.0]),
    xtc_probability=st.sampled_from([0.0, 0.4, 1.0]),
    xtc_threshold=st.sampled_from([0.05, 0.2, 0.6]),
    repeat_last_n=st.sampled_from([-1, 0, 2, 64]),
    repeat_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.2]),
    logit_bias=st.sampled_from([{}, {0: 3.0, 5: -100.0}]),
)


@settings(max_examples=150)
@given(OPTIONS, st.integers(0, 2**32 - 1), st.lists(st.integers(0, 149), max_size=16))
def test_it_agrees_with_the_reference(options: SamplingOptions, seed: int, tokens: list[int]) -> None:
    logits = np.random.default_rng(seed).normal(scale=2.0, size=150).astype(np.float32)
    found = irkit.sampling_distribution(logits, tokens, **options.model_dump())
    np.testing.assert_allclose(found, reference(logits, tokens, options), atol=2e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 5, "temperature": 1.5},
        {"top_k": 0, "top_p": 0.8},
        {"xtc_probability": 0.5, "xtc_threshold": 0.1, "temperature": 1.0},
        {"temperature": 0.0},
    ],
)
@pytest.mark.parametrize("allowed", [None, [*range(20, 90), 199]])
def test_draws_follow_the_distribution(options: dict[str, Any], allowed: list[int] | None) -> None:
    rows, rounds = 64, 40
    bits = sampling.everything(rows, 200) if allowed is None else np.tile(sampling.words(allowed, 200), (rows, 1))
    logits = np.random.default_rng(1).normal(scale=1.5, size=200).astype(np.float32)
    drawn = jax.jit(sampling.sample, static_argnames="top")
    counts = np.zeros(200)
    for turn in range(rounds):
        seeds = [turn * rows + row for row in range(rows)]
        chosen = sampling.settings([SamplingOptions(**options)] * rows, seeds, 200)
        history, length = np.zeros((rows, 1), np.int32), np.ones(rows, np.int32)
        result = drawn(np.tile(logits, (rows, 1)), history, length, chosen, bits, top=3)
        counts += np.bincount(np.asarray(result.token), minlength=200)
        np.testing.assert_allclose(
            result.top[1][0], np.sort(np.log(np.exp(logits) / np.exp(logits).sum()))[:-4:-1], rtol=1e-4
        )
    expected = irkit.sampling_distribution(logits, allowed=allowed, **options) * rows * rounds
    assert not counts[expected == 0].any()
    likely = expected > 0
    chi_squared = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    degrees = likely.sum() - 1
    assert chi_squared <= degrees + 5 * np.sqrt(2 * degrees)  # five standard deviations


def test_settings_are_traced() -> None:
    traced = []

    def counted(*arguments: Any) -> Any:
        traced.append(1)
        return sampling.sample(*arguments, top=0)

    draw = jax.jit(counted)
    logits, history, length = (
        np.zeros((1, 300), np.float32),
        np.zeros((1, 4), np.int32),
        np.zeros(1, np.int32),
    )
    for index, option in enumerate(SamplingOptions.model_fields):
        value: Any = {3: 1.5} if option == "logit_bias" else 0.4 if option not in ("top_k", "repeat_last_n") else 7
        chosen = sampling.settings([SamplingOptions(**{option: value})], [index], 300)
        draw(logits, history, length, chosen, sampling.words([index, 299], 300))
    assert len(traced) == 1


def test_only_what_is_allowed_is_drawn() -> None:
    probabilities = [0.1, 0.2, 0.3, 0.4]
    np.testing.assert_allclose(distribution(probabilities, allowed=[0, 2]), [0.25, 0, 0.75, 0], rtol=1e-5)
    np.testing.assert_allclose(distribution(probabilities, allowed=[1], top_k=3), [0, 1, 0, 0])
    np.testing.assert_allclose(distribution(probabilities, allowed=[0, 2], temperature=0), [0, 0, 1, 0])
    # The threshold of XTC, too, is held against what is left: of two above it, the less likely stays.
    excluded: dict[str, Any] = {"xtc_probability": 1.0, "xtc_threshold": 0.0}
    np.testing.assert_allclose(distribution(probabilities, allowed=[0, 2], **excluded), [1, 0, 0, 0])
    # Neither does the deviation know of others: of 0 and 1 it is a half.
    sigma: dict[str, Any] = OFF | {"allowed": [0, 1], "top_n_sigma": 1.9}
    assert irkit.sampling_distribution([0.0, 1.0, 50.0], **sigma).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("logits", "tokens", "options", "named"),
    [
        ([1.0, 2.0], (), {"tempereture": 1}, "did you mean temperature"),
        ([1.0, 2.0], (), {"top_p": 1.5}, "top_p"),
        ([1.0, 2.0], (), {"logit_bias": {2: 1.0}}, "logit_bias"),
        ([1.0, 2.0], (2,), {}, "tokens"),
        ([1.0, 2.0], (), {"allowed": [2]}, "allowed"),
        ([1.0, 2.0], (), {"allowed": []}, "allowed"),
        ([1.0, np.nan], (), {}, "logits"),
        ([[1.0, 2.0]], (), {}, "logits"),
        ([], (), {}, "logits"),
    ],
)
def test_what_makes_no_sense_is_named(
    logits: Any, tokens: tuple[int, ...], options: dict[str, Any], named: str
) -> None:
    with pytest.raises(OptionError, match=named):
        irkit.sampling_distribution(logits, tokens, **options)
