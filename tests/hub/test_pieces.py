"""Large files, fetched in pieces several at a time, from servers that keep to no rule."""

import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from misbehaving import (
    PATH,
    Answer,
    FakeHub,
    Handler,
    cut_after,
    fetched,
    left_over,
    obey,
    pull,
    stall_after,
    status,
    whole,
    write_gguf,
)

from irkit.errors import PullError
from irkit.hub import home, models, pieces

PIECE = 200_000


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> None:
    """The model of 1.5 MB is eight pieces."""
    for module in ("pieces", "download"):
        monkeypatch.setattr(f"irkit.hub.{module}.PIECE", PIECE)
    monkeypatch.setattr("irkit.hub.pieces.FROM", 4 * PIECE)
    monkeypatch.setattr("irkit.hub.download._NOTED_EVERY", 50_000)
    hub.says_ranges = True


def asked(hub: FakeHub) -> list[tuple[int, int]]:
    """The ranges that were asked for, in order of their beginning."""
    found = (re.fullmatch(r"bytes=(\d+)-(\d+)", value or "") for value in hub.gets())
    return sorted((int(match[1]), int(match[2])) for match in found if match)


def cover(ranges: list[tuple[int, int]], size: int) -> bool:
    return all(after == before + 1 for (_, before), (after, _) in itertools.pairwise(ranges)) and (
        ranges[0][0] == 0 and ranges[-1][1] == size - 1
    )


def test_pieces_come_side_by_side_each_once(hub: FakeHub, address: str, model: bytes) -> None:
    at_once, most, lock = 0, 0, threading.Lock()

    def slowly(handler: Handler, content: bytes) -> None:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.05)
        obey(handler, content)
        with lock:
            at_once -= 1

    hub.script = [obey, *[slowly] * 20]
    reports: list[int] = []
    pull(address, progress=lambda done, total, what: reports.append(done))
    assert fetched() == model
    assert hub.gets()[0] is None
    assert hub.gets("If-Range")[1:] == [f'"{hashlib.md5(model).hexdigest()}"'] * 8
    assert len(asked(hub)) == 8
    assert cover(asked(hub), len(model))
    assert 1 < most <= pieces.AT_ONCE
    assert reports == sorted(reports)
    assert reports[-1] == len(model)


def other_range(handler: Handler, content: bytes) -> None:
    handler.headers.replace_header("Range", "bytes=0-99")
    obey(handler, content)


def careless(handler: Handler, content: bytes) -> None:
    """Another file's bytes, where If-Range asked for none of them."""
    handler.headers.replace_header("If-Range", '"other"')
    handler.hub.etags[PATH] = '"other"'
    obey(handler, content)
    del handler.hub.etags[PATH]


def too_much(handler: Handler, content: bytes) -> None:
    handler.head(
        206,
        {
            "ETag": handler.etag(content),
            "Content-Range": f"bytes {handler.headers['Range'][6:]}/{len(content)}",
        },
    )
    handler.wfile.write(content)


@pytest.mark.parametrize(
    "script",
    [
        [cut_after(0)],
        [cut_after(70_000)] * 3,
        [obey, cut_after(1), obey, cut_after(70_000), cut_after(0)],
        [status(503), status(429, Retry_After="0")],
        [stall_after(70_000)],
        [whole],
        [obey, obey, other_range],
        [obey, careless],
        [too_much],
        [status(416)],
        [status(206)],
    ],
    ids=[
        *("cut at the start", "cuts", "cuts between", "503 and 429", "stall", "200 for a range", "another range"),
        *("another file", "more than asked for", "416", "206 without Content-Range"),
    ],
)
def test_faults_are_got_over(hub: FakeHub, address: str, model: bytes, script: list[Answer]) -> None:
    hub.script = [obey, *script]
    pull(address)
    assert fetched() == model
    assert left_over() == ["tiny.gguf"]


def test_what_is_here_of_a_piece_is_not_asked_for_again(hub: FakeHub, address: str, model: bytes) -> None:
    hub.script = [obey, *[cut_after(70_000)] * 8]
    pull(address)
    assert fetched() == model
    begun = Counter(first % PIECE for first, _ in asked(hub))
    assert begun[0] >= 8
    assert begun[70_000] >= 1


def test_a_file_that_changes_meanwhile_is_fetched_anew(
    hub: FakeHub, address: str, model: bytes, tmp_path: Path
) -> None:
    newer = write_gguf(tmp_path / "newer.gguf", rows=1000, seed=9).read_bytes()

    def change(handler: Handler, content: bytes) -> None:
        hub.files[PATH] = newer
        obey(handler, newer)

    hub.script = [obey, obey, obey, change]
    pull(address)
    assert fetched() == newer


def test_wrong_bytes_are_fetched_once_more(hub: FakeHub, address: str, model: bytes) -> None:
    digest = hashlib.sha256(model).hexdigest()
    damaged = bytes([model[0] ^ 1]) + model[1:]

    def wrong(handler: Handler, content: bytes) -> None:
        obey(handler, damaged)

    hub.etags[PATH] = '"same"'
    hub.files["/org/repo/resolve/main/tiny.gguf"] = model
    hub.etags["/org/repo/resolve/main/tiny.gguf"] = '"same"'

    def linked(handler: Handler, content: bytes) -> None:
        handler.head(
            200,
            {
                "X-Linked-Etag": f'"{digest}"',
                "ETag": '"same"',
                "Accept-Ranges": "bytes",
                "Content-Length": str(len(model)),
            },
        )

    hub.script = [linked, *[wrong] * 8]
    pull("hf.co/org/repo/tiny.gguf")
    assert fetched() == model
    (home() / "models" / "tiny.gguf").unlink()
    hub.script = [linked, *[wrong] * 8, linked, *[wrong] * 8]
    with pytest.raises(PullError, match=f"should have the sha256 {digest}, but have "):
        pull("hf.co/org/repo/tiny.gguf")
    assert left_over() == []


_PULL = """
import sys
from irkit import hub
import irkit.hub.download, irkit.hub.pieces
irkit.hub.pieces.PIECE = irkit.hub.download.PIECE = 200_000
irkit.hub.pieces.FROM = 800_000
irkit.hub.download._NOTED_EVERY = 1
hub.pull(sys.argv[1], allow_private=True)
"""


def test_a_killed_pull_goes_on_with_every_piece(hub: FakeHub, address: str, model: bytes) -> None:
    hub.script = [obey, *[stall_after(70_000)] * 4]
    process = subprocess.Popen([sys.executable, "-c", _PULL, address])
    sidecar = home() / "models" / "tiny.gguf.partial.json"
    deadline = time.monotonic() + 60

    def noted() -> int:
        return sum(json.loads(sidecar.read_text())["pieces"].values()) if sidecar.exists() else 0

    while noted() < 280_000:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    hub.released.set()
    assert models() == []
    hub.seen.clear()
    hub.script.clear()
    pull(address)
    assert fetched() == model
    assert [first for first, _ in asked(hub)][:5] == [70_000, 270_000, 470_000, 670_000, 800_000]


@pytest.mark.parametrize("sidecar", ["[]", '{"0": "x"}', '{"0": -5}', '{"-1": 7}', '{"0": 99999999}', '{"99": 1}', "3"])
def test_notes_that_are_wrong_do_no_harm(hub: FakeHub, address: str, model: bytes, sidecar: str) -> None:
    (home() / "models").mkdir(parents=True)
    told = {"url": address, "etag": f'"{hashlib.md5(model).hexdigest()}"', "size": len(model), "sha256": None}
    (home() / "models" / "tiny.gguf.partial").write_bytes(b"x" * 10)
    note = json.dumps(told | {"pieces": json.loads(sidecar)})
    (home() / "models" / "tiny.gguf.partial.json").write_text(note)
    pull(address)
    assert fetched() == model


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_disk_that_fills_up_is_one_sentence(address: str) -> None:
    partial = home() / "models" / "tiny.gguf.partial"
    partial.parent.mkdir(parents=True)
    partial.symlink_to("/dev/full")
    with pytest.raises(PullError, match=r"tiny\.gguf\.partial: No space left on device"):
        pull(address)
    assert models() == []
    assert left_over() == []


def test_a_small_file_or_one_without_a_strong_etag_comes_in_one_piece(
    hub: FakeHub, address: str, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.etags[PATH] = 'W/"weak"'
    pull(address)
    assert (fetched(), hub.gets()) == (model, [None])
