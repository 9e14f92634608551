"""The small models of the engine's tests."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

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
