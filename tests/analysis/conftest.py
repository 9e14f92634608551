"""The small models of the engine's tests, and one of them opened."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import irkit
from irkit.engine.runtime import Runtime

_FILE = Path(__file__).parent.parent / "engine" / "conftest.py"


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    """Writes one: see the engine's `write_model`."""
    spec = importlib.util.spec_from_file_location("engine_conftest", _FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_model


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
