"""The numbers of the KV cache, by choice."""

from pathlib import Path
from typing import Any

import pytest

import irkit
from irkit.errors import OptionError

PROMPT = "The capital of France is"


@pytest.mark.parametrize(("options", "dtype"), [({"cache_type": "f16"}, "float16"), ({"cache_type": "f32"}, "float32")])
def test_the_cache_holds_what_was_chosen(model_path: Path, options: dict[str, Any], dtype: str) -> None:
    with irkit.Session(model_path, **options) as session:
        text = session.generate(PROMPT, temperature=0, num_predict=6).text
        arrays = session._cache.arrays
        assert arrays is not None
        assert {str(layer.dtype) for layer in (*arrays.keys, *arrays.values)} == {dtype}
        assert text.startswith(" Paris")


def test_exact_sessions_keep_float32_unless_told(model_path: Path) -> None:
    with irkit.Session(model_path, precision="exact") as session:
        assert str(session.model.load().result().cache_dtype) == "float32"
    with pytest.raises(OptionError, match="cache_type"):
        irkit.Session(model_path, cache_type="q8_0")
