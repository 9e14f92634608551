"""A small model, opened."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import irkit
from irkit.engine.runtime import Runtime


@pytest.fixture(scope="session")
def tiny(write_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[irkit.Session]:
    """Two layers of four heads with biases in the second, exact; nothing is compiled ahead."""
    path = write_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf", biases=True)
    with pytest.MonkeyPatch.context() as patched:
        for ahead in ("prepare", "_reader"):
            patched.setattr(Runtime, ahead, lambda *arguments, **options: None)
        with irkit.Session(path, precision="exact") as session:
            session.model.load().result()
            patched.undo()  # it lasts as long as the tests of all modules
            yield session
