"""An empty registry for each test, and servers that misbehave on request."""

import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from misbehaving import PATH, FakeHub, Handler, write_gguf


@pytest.fixture
def make_hub() -> Iterator[Callable[[], FakeHub]]:
    started = []

    def make() -> FakeHub:
        hub = FakeHub()
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        started.append((hub, server))
        return hub

    yield make
    for hub, server in started:
        hub.released.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub(make_hub: Callable[[], FakeHub], monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """A server that is also the Hugging Face hub of this test."""
    hub = make_hub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    return hub


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty registry, no patience, and nothing of the user's settings."""
    for name in ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("IRKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("irkit.hub.download.FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr("irkit.hub.addresses.READ_SECONDS", 0.3)
    monkeypatch.setattr("irkit.hub.ollama.HOST", "http://127.0.0.1:9")
    return tmp_path / "home"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that a download wants to wait, which takes none."""
    waits: list[float] = []
    monkeypatch.setattr("irkit.hub.download.time", SimpleNamespace(sleep=waits.append))
    return waits


@pytest.fixture
def model(tmp_path: Path) -> bytes:
    """The bytes of a small model: about 1.5 MB, so that they take many reads."""
    return write_gguf(tmp_path / "served.gguf", rows=1000).read_bytes()


@pytest.fixture
def address(hub: FakeHub, model: bytes) -> str:
    hub.files[PATH] = model
    return hub.url + PATH
