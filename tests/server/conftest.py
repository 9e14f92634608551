"""A real server on a loopback port, with the real model behind it."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from irkit.engine import Model
from irkit.results import Generation
from irkit.server import create_app


@pytest.fixture(scope="session")
def url(model_path: Path) -> Iterator[str]:
    """Where the server listens; it knows the model as smollm2."""
    server = uvicorn.Server(uvicorn.Config(create_app(), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="session")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=120) as client:
        yield client


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Generation]:
    """Every answer that is begun during the test."""
    answers: list[Generation] = []
    begin = Model.generate

    def remembered(*arguments, **options):
        answers.append(begin(*arguments, **options))
        return answers[-1]

    monkeypatch.setattr(Model, "generate", remembered)
    return answers
