"""Fixtures every test can use: the real default model, fetched by irkit's own code."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

import irkit
from irkit import hub


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The default model's file (98 MB), fetched on first use as a user's would be."""
    return hub.ensure("smollm2")


@pytest.fixture(scope="session")
def shared_session(model_path: Path) -> Iterator["irkit.Session"]:
    """One session of the default model for the whole run."""
    with irkit.Session(model_path) as session:
        yield session


@pytest.fixture(scope="session")
def exact_session(model_path: Path) -> Iterator["irkit.Session"]:
    """The same in exact precision: what it computes does not depend on how a text is divided into calls."""
    with irkit.Session(model_path, precision="exact") as session:
        yield session


@pytest.fixture
def session(shared_session: "irkit.Session") -> "irkit.Session":
    """The shared session with nothing in its cache."""
    shared_session.reset()
    shared_session.model.submit(lambda: None).result()  # it was queued
    return shared_session


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers of random weights, width 64, over 258 tokens: `write_model` of the engine's tests."""
    spec = importlib.util.spec_from_file_location("small_models", Path(__file__).parent / "engine" / "conftest.py")
    assert spec
    assert spec.loader
    small_models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small_models)
    return small_models.write_model(tmp_path_factory.mktemp("models") / "tiny.gguf")
