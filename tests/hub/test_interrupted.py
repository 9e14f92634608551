"""Pulls that are killed, that meet each other, or that find what another has left."""

import hashlib
import os
import signal
import subprocess
import sys
import time

import pytest
from misbehaving import FakeHub, cut_after, fetched, left_over, pull, stall_after

from irkit.errors import PullError
from irkit.hub import home, models

_PULL = "import sys; from irkit import hub; print(hub.pull(sys.argv[1], allow_private=True).sha256)"


def test_a_killed_pull_goes_on_in_another_process(hub: FakeHub, address: str, model: bytes) -> None:
    hub.script = [stall_after(700_000)]
    process = subprocess.Popen([sys.executable, "-c", _PULL, address])
    partial = home() / "models" / "tiny.gguf.partial"
    deadline = time.monotonic() + 30
    while not (partial.exists() and partial.stat().st_size == 700_000):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert models() == []

    pull(address)
    assert fetched() == model
    assert hub.gets() == [None, "bytes=700000-"]


def test_a_pull_killed_before_publishing_fetches_nothing_again(
    hub: FakeHub, address: str, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("irkit.hub.registry.publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pull(address)
    assert left_over() == ["tiny.gguf.partial", "tiny.gguf.partial.json"]
    pull(address)
    assert fetched() == model
    assert hub.gets() == [None]


@pytest.mark.parametrize("sidecar", ["", "{", "[]", '{"url": 1}'])
def test_a_partial_file_of_unknown_origin_is_not_trusted(
    hub: FakeHub, address: str, model: bytes, sidecar: str
) -> None:
    (home() / "models").mkdir(parents=True)
    (home() / "models" / "tiny.gguf.partial").write_bytes(b"rubbish")
    (home() / "models" / "tiny.gguf.partial.json").write_text(sidecar)
    pull(address)
    assert fetched() == model
    assert hub.gets() == [None]


_PULL_LISTED = """
import sys
from irkit import hub
from irkit.hub.catalog import HubFile, Model

size, sha256 = sys.argv[1:]
hub.CATALOG["tiny"] = Model("tiny", "tiny", (HubFile("org/repo", "tiny.gguf"),), int(size), sha256)
print(hub.pull("tiny").sha256)
"""


def test_a_partial_file_from_another_address_is_not_gone_on_with(hub: FakeHub, address: str, model: bytes) -> None:
    hub.script = [cut_after(1000), *[cut_after(0)] * 4]
    with pytest.raises(PullError, match="given up"):
        pull(address)
    assert left_over() == ["tiny.gguf.partial", "tiny.gguf.partial.json"]
    hub.files["/other/tiny.gguf"] = model
    pull(hub.url + "/other/tiny.gguf")
    assert fetched() == model
    assert hub.gets()[-1] is None


def test_two_pulls_at_once_fetch_a_model_once(hub: FakeHub, model: bytes) -> None:
    hub.files["/org/repo/resolve/main/tiny.gguf"] = model
    digest = hashlib.sha256(model).hexdigest()
    command = [sys.executable, "-c", _PULL_LISTED, str(len(model)), digest]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=30)[0] for process in running] == [digest + "\n"] * 2
    assert fetched() == model
    assert len(hub.seen) == 1


def test_the_second_pull_waits_and_says_so(hub: FakeHub, address: str, model: bytes) -> None:
    hub.script = [stall_after(1000)]
    first = subprocess.Popen([sys.executable, "-c", _PULL, address])
    while not (home() / "models" / "tiny.gguf.partial").exists():
        time.sleep(0.01)
    reports: list[str] = []

    def progress(done: int, total: int | None, what: str) -> None:
        reports.append(what)
        hub.released.set()
        first.kill()

    pull(address, progress=progress)
    first.wait()
    assert reports[0] == "waiting for another pull of tiny"
    assert fetched() == model
