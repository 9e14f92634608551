"""Head scores against diagonals that numpy takes, hand-made patterns, and rollout against its definition."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import irkit
from irkit import analysis
from irkit.as_json import as_json
from irkit.engine import trace
from irkit.errors import ContextFullError, OptionError


def repeated(rows: int, length: int) -> list[list[int]]:
    once = np.random.default_rng(1).integers(0, 256, (rows, length))
    return np.concatenate([once, once], axis=1).tolist()


def by_numpy(patterns: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """The field's recipe, of patterns `[layer, b, head, query, key]`."""
    offsets = {"induction": 1 - length, "previous_token": -1, "duplicate_token": -length}
    return {
        kind: patterns.astype(np.float64).diagonal(offset, axis1=-2, axis2=-1).mean(axis=(1, 3))
        for kind, offset in offsets.items()
    }


@pytest.mark.parametrize(("rows", "length", "chunks"), [(2, 10, trace.CHUNKS), (1, 13, (8, 16))])
def test_scores_are_means_of_diagonals(
    tiny: irkit.Session, monkeypatch: pytest.MonkeyPatch, rows: int, length: int, chunks: tuple[int, ...]
) -> None:
    monkeypatch.setattr(trace, "CHUNKS", chunks)  # the second is read in two calls
    texts = repeated(rows, length)
    found = analysis.head_scores(tiny, tokens=texts)
    expected = by_numpy(tiny.trace(texts, names="pattern", logits="none")["pattern"], length)
    for kind, scores in expected.items():
        assert getattr(found, kind).shape == (2, 4)
        np.testing.assert_allclose(getattr(found, kind), scores, atol=1e-6)
    assert (found.length, found.batch) == (length, rows)


def attends_back_by(back: int) -> Any:
    """A hook that lets every query attend to the key so many positions before, the first ones to themselves."""

    def hook(pattern: Any, hook: Any) -> Any:
        query, key = jnp.arange(pattern.shape[2])[:, None], jnp.arange(pattern.shape[3])
        return jnp.broadcast_to(key == jnp.where(query < back, query, query - back), pattern.shape)

    return hook


@pytest.mark.parametrize(("kind", "back"), [("previous_token", 1), ("duplicate_token", 8), ("induction", 7)])
def test_a_head_of_each_kind_scores_one(tiny: irkit.Session, kind: str, back: int) -> None:
    with tiny.hooks([("pattern", attends_back_by(back))]):
        found = analysis.head_scores(tiny, length=8, batch=1)
    for other in ("previous_token", "duplicate_token", "induction"):
        np.testing.assert_allclose(getattr(found, other), float(other == kind), atol=1e-6)


def test_scores_of_given_patterns() -> None:
    previous = np.eye(12, k=-1)
    previous[0, 0] = 1
    assert {k: float(v) for k, v in analysis.pattern_scores(previous).items()} == pytest.approx(
        {"previous_token": 1, "induction": 0, "duplicate_token": 0}
    )
    # One entry of seven is not an induction position, and is counted.
    induction = np.eye(12, k=-5)
    induction[5, 0] = 0
    assert analysis.pattern_scores(induction)["induction"] == pytest.approx(6 / 7)


def test_the_seed_chooses_the_tokens(tiny: irkit.Session) -> None:
    first, again, other = (analysis.head_scores(tiny, length=8, batch=1, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.induction, again.induction)
    assert (first.induction != other.induction).any()


def test_as_text_table_and_json(tiny: irkit.Session) -> None:
    found = analysis.head_scores(tiny, length=8, batch=1)
    layer, head, score = found.top("previous_token", 1)[0]
    assert score == found.previous_token.max() == found.previous_token[layer, head]
    line = next(line for line in repr(found).splitlines() if "previous token" in line)
    assert f"L{layer}H{head} {score:.2f}" in line
    frame = found.to_frame()
    assert frame.induction[4 * layer + head] == found.induction[layer, head]
    assert list(frame.columns) == ["layer", "head", "induction", "previous_token", "duplicate_token"]
    assert as_json(found)["induction"] == found.induction.tolist()


def test_texts_that_do_not_repeat(tiny: irkit.Session) -> None:
    for wrong in ([[1, 2, 3, 4]], [[1, 2, 1]], [[1, 1]]):
        with pytest.raises(OptionError, match="then the same again"):
            analysis.head_scores(tiny, tokens=wrong)
    with pytest.raises(OptionError, match="at least 2"):
        analysis.head_scores(tiny, length=1)
    with pytest.raises(ContextFullError, match="600 tokens"):
        analysis.head_scores(tiny, length=300)


def test_rollout(tiny: irkit.Session) -> None:
    held = tiny.trace(["hello there", "another text"], names="pattern", logits="none")
    rollout = analysis.attention_rollout(held)
    assert rollout.shape == (2, *held["pattern", 0].shape[2:])
    np.testing.assert_allclose(rollout.sum(-1), 1, atol=1e-5)
    assert (np.triu(rollout, 1) == 0).all()
    first, second = (0.5 * held["pattern", i].mean(1) + 0.5 * np.eye(rollout.shape[-1]) for i in (0, 1))
    np.testing.assert_allclose(rollout, np.einsum("bqm,bmk->bqk", second, first), atol=1e-6)
    with pytest.raises(OptionError, match=r"blocks\.1\.attn\.hook_pattern"):
        analysis.attention_rollout(tiny.trace("hello there", names="pattern", layers=0))
    with pytest.raises(OptionError, match="all heads"):
        analysis.attention_rollout(tiny.trace("hello there", names="pattern", heads=0))


def test_the_real_model_has_induction_heads(exact_session: irkit.Session) -> None:
    found = analysis.head_scores(exact_session, length=24, batch=1)
    assert found.induction.shape == (30, 9)
    assert found.induction.max() > 0.7
    assert found.previous_token.max() > 0.7
