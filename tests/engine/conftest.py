"""What the engine's tests share."""

import pytest

from irkit.engine.runtime import Runtime


@pytest.fixture
def nothing_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is loaded without the programs that an answer would begin with: only what is called is compiled."""
    for ahead in ("prepare", "_reader"):
        monkeypatch.setattr(Runtime, ahead, lambda *arguments, **options: None)
