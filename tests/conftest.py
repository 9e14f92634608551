"""Fixtures every test can use: the real default model, fetched by irkit's own code."""

from pathlib import Path

import pytest

from irkit import hub


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The default model's file (98 MB), fetched on first use as a user's would be."""
    return hub.ensure("smollm2")
