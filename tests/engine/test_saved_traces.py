"""What a model showed, kept in a file: the same in every bit, whatever was asked for."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import irkit
from irkit.trace import Largest

pytestmark = pytest.mark.usefixtures("nothing_prepared")


@pytest.mark.parametrize(
    "asked",
    [
        {"names": ["pattern", "rot_k", "resid_post", "embed", "ln1.scale"]},
        {"names": ["pattern", "z"], "layers": [1], "heads": [1], "positions": [2, -1], "logits": "none"},
        {"names": ["resid_post"], "reduce": "lens", "k": 3, "logits": "last"},
        {"names": ["resid_mid", "pattern"], "reduce": "mean", "edits": [irkit.ablate("z", layers=0, heads=1)]},
    ],
)
def test_round_trip(small_model: Callable[..., Path], tmp_path: Path, asked: dict[str, Any]) -> None:
    path = small_model()
    with irkit.Session(path, precision="exact") as session:
        made = session.trace(["hello there", "he"], **asked)
    made.save(tmp_path / "kept.safetensors")
    found = irkit.load_trace(tmp_path / "kept.safetensors")
    assert list(found) == list(made)
    for name, value in made.items():
        pairs = zip(value, found[name], strict=True) if isinstance(value, Largest) else [(value, found[name])]
        for one, other in pairs:
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
    assert found.has_logits == made.has_logits
    if made.has_logits:
        np.testing.assert_array_equal(found.logits, made.logits)
    assert found.provenance.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.provenance.edits == made.provenance.edits
    assert (found.ids, found.strings) == (made.ids, made.strings)
    assert repr(found.row(1)).startswith(f"<Trace of {path.name}: 1 tokens")
    assert str(path.parent).encode() not in (tmp_path / "kept.safetensors").read_bytes()  # nobody else's business
