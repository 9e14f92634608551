"""A tiny model, opened in exact precision, and its weights for computing independently."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import irkit

_spec = importlib.util.spec_from_file_location("engine_conftest", Path(__file__).parents[1] / "engine" / "conftest.py")
assert _spec is not None
assert _spec.loader is not None
_engine: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_engine)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[irkit.Session]:
    """Two layers of four heads with biases in the second, random weights, 258 tokens; nothing compiled ahead."""
    path = _engine.write_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf", biases=True)
    with pytest.MonkeyPatch.context() as patched:
        for ahead in ("prepare", "_reader"):
            patched.setattr(_engine.Runtime, ahead, lambda *arguments, **options: None)
        with irkit.Session(path, precision="exact") as session:
            session.model.load().result()
            yield session
