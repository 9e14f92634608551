from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import irkit
from irkit.analysis.gradients import attribution_patching, saliency
from irkit.analysis.patching import patching_sweep
from irkit.engine import gradients

CLEAN, CORRUPT = [5, 9, 30, 7, 81, 6, 40, 3], [5, 9, 31, 7, 81, 6, 45, 3]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]) -> Iterator[irkit.Session]:
    with irkit.Session(write_model(tmp_path_factory.mktemp("model") / "small.gguf"), precision="exact") as session:
        yield session


def along(session: irkit.Session, name: str, layer: int | None, direction: np.ndarray, ids: list[int]) -> float:
    """The slope of the logit difference along a direction at a hook point: central differences, extrapolated."""
    full = name if layer is None else f"blocks.{layer}.{name}"

    def central(step: float) -> float:
        ends = []
        for sign in (1, -1):
            edit = irkit.Edit(full, "add", direction[None].astype(np.float32), sign * step)
            logits = session.trace(ids, names=(), edits=[edit]).logits[0, -1].astype(np.float64)
            ends.append(logits[7] - logits[11])
        return (ends[0] - ends[1]) / (2 * step)

    return (4 * central(0.01) - central(0.02)) / 3


@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("resid_pre", "hook_resid_pre"),
        ("attn_out", "hook_attn_out"),
        ("mlp_out", "hook_mlp_out"),
        ("head", "attn.hook_z"),
    ],
)
def test_gradients_are_central_differences(small: irkit.Session, name: str, point: str) -> None:
    found = attribution_patching(small, CLEAN, CORRUPT, token=7, other=11)
    both = small.trace([CLEAN, CORRUPT], names=point)
    _, slopes = gradients.gradients(small.model.load().result(), CORRUPT, (point,), 7, 11)
    for layer in range(2):
        # Along the gradient itself the slope is its length, and rounding counts least.
        gradient = slopes[point][layer]
        size = np.linalg.norm(gradient)
        assert along(small, point, layer, gradient / size, CORRUPT) == pytest.approx(size, rel=1e-3)
        difference = both[point, layer][0] - both[point, layer][1]
        assert found.values[name][layer].sum() == pytest.approx(np.sum(gradient * difference), rel=1e-3, abs=1e-4)
    head = found.values["head"]
    assert head.shape == (2, 4)
    assert found.values["attn_out"].shape == (2, 8)


def test_a_small_patch_does_what_its_attribution_says(small: irkit.Session) -> None:
    """At the last layer's end the metric is linear but for the norm, so attribution comes near the true effect."""
    effects = attribution_patching(small, CLEAN, CORRUPT, token=7, other=11)
    true = patching_sweep(small, CLEAN, CORRUPT, token=7, other=11)
    assert (effects.clean, effects.corrupt) == pytest.approx((true.clean, true.corrupt), abs=1e-4)
    assert (effects.values["resid_pre"][:, :2] == 0).all()  # before the first token that differs
    assert effects.to_frame().shape == (2 * 8 * 3 + 2 * 4, 4)
    assert "largest" in repr(effects)


def test_saliency_is_a_central_difference(small: irkit.Session) -> None:
    found = saliency(small, CLEAN, token=7)
    rng = np.random.default_rng(0)
    direction = rng.normal(size=found.gradient.shape)
    direction /= np.linalg.norm(direction)
    other = saliency(small, CLEAN, token=11)
    expected = along(small, "hook_embed", None, direction, CLEAN)
    assert np.sum((found.gradient - other.gradient) * direction) == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert found.logit == pytest.approx(small.trace(CLEAN, names=()).logits[0, -1, 7], abs=1e-4)
    assert found.norm.shape == found.times_input.shape == (8,)
    assert found.to_frame().shape == (8, 3)
    likeliest = small.trace(CLEAN, names=()).logits[0, -1].argmax()
    assert saliency(small, CLEAN).token == small.model.tokenizer.token(int(likeliest))


def test_packed_weights_are_read_as_float32_for_gradients(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    path = write_model(tmp_path / "q8.gguf", "Q8_0", d_mlp=96)
    with irkit.Session(path) as fast, irkit.Session(path, precision="exact") as exact:
        np.testing.assert_array_equal(saliency(fast, CLEAN, 7).gradient, saliency(exact, CLEAN, 7).gradient)
