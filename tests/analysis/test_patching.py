from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import irkit
from irkit.analysis import patching
from irkit.analysis.patching import patching_sweep
from irkit.engine import sweep

CLEAN, CORRUPT = [5, 9, 30, 7, 81, 6, 40, 3, 17, 5], [5, 9, 31, 7, 81, 6, 45, 3, 17, 5]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]) -> Iterator[irkit.Session]:
    with irkit.Session(write_model(tmp_path_factory.mktemp("model") / "small.gguf"), precision="exact") as session:
        yield session


def difference(logits: np.ndarray) -> float:
    return float(logits[0, -1, 7] - logits[0, -1, 11])


def cell_by_cell(session: irkit.Session, name: str, cells: list[dict[str, Any]]) -> np.ndarray:
    clean = session.trace(CLEAN, names=name)
    traces = [session.trace(CORRUPT, names=(), edits=[irkit.patch(clean, name, **cell)]) for cell in cells]
    return np.array([difference(trace.logits) for trace in traces])


@pytest.mark.parametrize("name", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z"])
def test_a_sweep_is_one_forward_a_cell(small: irkit.Session, name: str) -> None:
    found = patching_sweep(small, CLEAN, CORRUPT, name=name, token=7, other=11)
    cells = [{"layer": layer, "positions": position} for layer in range(2) for position in range(10)]
    expected = cell_by_cell(small, name, cells).reshape(2, 10)
    np.testing.assert_allclose(found.values, expected, rtol=0, atol=1e-4)
    assert np.abs(expected - found.corrupt).max() > 0.01  # something is to be seen
    assert found.clean == pytest.approx(difference(small.trace(CLEAN, names=()).logits), abs=1e-4)


def test_a_sweep_over_heads(small: irkit.Session) -> None:
    found = patching_sweep(small, CLEAN, CORRUPT, over="head", heads=[3, 1], positions=range(4, 9), token=7, other=11)
    cells = [{"layer": layer, "heads": h, "positions": range(4, 9)} for layer in range(2) for h in (3, 1)]
    np.testing.assert_allclose(found.values.ravel(), cell_by_cell(small, "z", cells), rtol=0, atol=1e-4)
    assert (found.columns, found.over) == ((3, 1), "head")


def test_runs_that_cannot_differ_are_not_computed(small: irkit.Session) -> None:
    found = patching_sweep(small, CLEAN, CORRUPT, token=7, other=11)
    assert found.computed == 2 + 8  # two tokens differ in the embedding, and what follows the first of them
    assert (found.values[:, :2] == found.corrupt).all()
    same = patching_sweep(small, CLEAN, CLEAN, token=7, other=11)
    assert same.computed == 0
    assert same.values == pytest.approx(same.clean)


def test_groups_of_any_size_give_the_same(small: irkit.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = patching_sweep(small, CLEAN, CORRUPT, token=7, other=11).values
    monkeypatch.setattr(sweep, "TOKENS", 32)
    np.testing.assert_allclose(patching_sweep(small, CLEAN, CORRUPT, token=7, other=11).values, whole, atol=1e-4)
    chosen = patching_sweep(small, CLEAN, CORRUPT, layers=-1, positions=[-1, 6], token=7, other=11).values
    np.testing.assert_allclose(chosen, whole[1:, [9, 6]], atol=1e-4)


def test_metrics(small: irkit.Session) -> None:
    plain = patching_sweep(small, CLEAN, CORRUPT, token=7, other=11)
    normalized = patching_sweep(small, CLEAN, CORRUPT, "normalized", token=7, other=11)
    np.testing.assert_allclose(
        normalized.values, (plain.values - plain.corrupt) / (plain.clean - plain.corrupt), atol=1e-5
    )
    own = patching_sweep(small, CLEAN, CORRUPT, lambda logits: logits[:, 7] - logits[:, 11], token=7, other=11)
    np.testing.assert_allclose(own.values, plain.values, atol=1e-4)
    layer, column, value = plain.top(1)[0]
    assert value == pytest.approx(plain.values[layer, column])
    assert "10 positions" in repr(plain)
    assert plain.to_frame().shape == (2, 10)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"corrupt": CORRUPT[:-1]}, "10 and 9"),
        ({"name": "pattern"}, "cannot be swept"),
        ({"name": "resid_pre", "over": "head"}, "has no heads"),
        ({"heads": 1}, "over: position or head"),
        ({"layers": 2}, "layers: there is no 2"),
        ({"positions": 10}, "positions: there is no 10"),
        ({"token": 100000}, "outside the vocabulary"),
        ({"token": "two tokens"}, "tokens, not one"),
        ({"corrupt": CLEAN, "metric": "normalized", "token": 1, "other": 2}, "nothing to normalize"),
        ({"corrupt": CLEAN}, "the likeliest"),
    ],
)
def test_what_does_not_fit_is_refused(small: irkit.Session, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(irkit.errors.OptionError, match=message):
        patching_sweep(small, **{"clean": CLEAN, "corrupt": CORRUPT, **changed})


def test_packed_weights(session: irkit.Session) -> None:
    """Where activations are rounded to int8, a sweep is within what that rounding does."""
    clean, corrupt = ([session.tokenize(f"The capital of {c} is")][0] for c in ("France", "Italy"))
    token, other = (patching.token_id(session, text, "token") for text in (" Paris", " Rome"))
    found = patching_sweep(session, clean, corrupt, layers=[0, 12, 29], token=token, other=other)
    trace = session.trace(clean, names="resid_pre")
    expected = []
    for layer, position in ((0, 3), (12, -1), (29, -1)):
        edit = irkit.patch(trace, "resid_pre", layer, positions=position)
        logits = session.trace(corrupt, names=(), edits=[edit]).logits[0, -1]
        expected.append(logits[token] - logits[other])
    np.testing.assert_allclose(found.values[[0, 1, 2], [3, -1, -1]], expected, atol=0.5)
    assert found.values[0, 3] == pytest.approx(found.clean, abs=0.5)
    assert found.clean > 0 > found.corrupt
