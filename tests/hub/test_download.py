"""Downloads from a server with every fault that real ones have shown; each ends in the very bytes, or an error."""

import email.utils
import gzip
import hashlib
import os
import time
from collections.abc import Callable
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
from irkit.hub import find, home, models


def test_a_sound_download_reports_progress_and_registers(hub: FakeHub, address: str, model: bytes) -> None:
    reports: list[tuple[int, int | None, str]] = []
    manifest = pull(address, progress=lambda *report: reports.append(report))
    assert fetched() == model
    assert manifest == find("tiny")
    assert (manifest.source, manifest.size) == (address, len(model))
    assert reports[0] == (0, len(model), "tiny from 127.0.0.1")
    assert reports[-1] == (len(model), len(model), "tiny from 127.0.0.1")
    assert [done for done, _, _ in reports] == sorted(done for done, _, _ in reports)
    assert hub.gets("Accept-Encoding") == ["identity"]


def wrong_range(handler: Handler, content: bytes) -> None:
    handler.head(
        206,
        {
            "ETag": handler.etag(content),
            "Content-Range": f"bytes 0-{len(content) - 1}/{len(content)}",
            "Content-Length": str(len(content)),
        },
    )
    handler.wfile.write(content)


def no_range(handler: Handler, content: bytes) -> None:
    handler.head(206, {"ETag": handler.etag(content), "Content-Length": str(len(content))})
    handler.wfile.write(content)


@pytest.mark.parametrize(
    ("script", "ranges"),
    [
        ([cut_after(0)], [None, None]),
        ([cut_after(500_000)], [None, "bytes=500000-"]),
        ([cut_after(500_000), cut_after(1), cut_after(0)], [None, "bytes=500000-", *["bytes=500001-"] * 2]),
        ([cut_after(100)] * 6, [None, *[f"bytes={n}00-" for n in range(1, 7)]]),
        ([cut_after(500_000), whole], [None, "bytes=500000-"]),
        ([cut_after(500_000), wrong_range], [None, "bytes=500000-", None]),
        ([cut_after(500_000), no_range], [None, "bytes=500000-", None]),
        ([cut_after(500_000), status(416)], [None, "bytes=500000-", None]),
        ([cut_after(500_000), status(503)], [None, "bytes=500000-", "bytes=500000-"]),
        ([status(503), status(429, Retry_After="0"), status(502)], [None] * 4),
        ([stall_after(500_000)], [None, "bytes=500000-"]),
    ],
    ids=[
        *("cut at the start", "cut", "cut again and again", "six cuts", "200 for a range", "another range"),
        *("206 without Content-Range", "416", "503 when resuming", "503, 429 and 502", "stall"),
    ],
)
def test_faults_are_got_over(
    hub: FakeHub, address: str, model: bytes, script: list[Answer], ranges: list[str | None]
) -> None:
    hub.script = script
    pull(address)
    assert fetched() == model
    assert hub.gets() == ranges


def test_a_file_that_changes_meanwhile_is_fetched_anew(
    hub: FakeHub, address: str, model: bytes, tmp_path: Path
) -> None:
    newer = write_gguf(tmp_path / "newer.gguf", rows=1000, seed=9).read_bytes()

    def cut_and_change(handler: Handler, content: bytes) -> None:
        obey(handler, content, cut=500_000)
        hub.files[PATH] = newer

    hub.script = [cut_and_change]
    pull(address)
    assert fetched() == newer
    assert hub.gets() == [None, "bytes=500000-"]
    assert hub.gets("If-Range") == [None, f'"{hashlib.md5(model).hexdigest()}"']


def test_a_range_of_another_version_is_not_joined_on(hub: FakeHub, address: str, tmp_path: Path) -> None:
    newer = write_gguf(tmp_path / "newer.gguf", rows=1000, seed=9).read_bytes()

    def careless(handler: Handler, content: bytes) -> None:
        """Heeds Range, but not If-Range."""
        hub.files[PATH] = newer
        handler.headers.replace_header("If-Range", handler.etag(newer))
        obey(handler, newer)

    hub.script = [cut_after(500_000), careless]
    pull(address)
    assert fetched() == newer


@pytest.mark.parametrize("etag", ['W/"weak"', ""])
def test_without_a_strong_etag_nothing_is_resumed_or_left(hub: FakeHub, address: str, etag: str) -> None:
    hub.etags[PATH] = etag
    hub.script = [cut_after(500_000)] * 4
    with pytest.raises(PullError, match="given up"):
        pull(address)
    assert hub.gets() == [None] * 4
    assert left_over() == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (status(404), r"127\.0\.0\.1 has no such file: /tiny\.gguf"),
        (status(401), "401: no such file, or one that needs a token"),
        (status(403), "403: no such file, or one that needs a token"),
        (status(418), "answers 418"),
        (status(302, Location="ftp://127.0.0.1/tiny.gguf"), "ftp"),
        (status(302, Location=PATH), "redirects"),
        (status(429, Retry_After="3600"), "answers 429 and asks to wait 3600 s; given up"),
        (status(503, Retry_After=email.utils.formatdate(time.time() + 9000)), "503 and asks to wait"),
        (status(503, Retry_After="9" * 400), "503 and asks to wait inf"),
        (cut_after(0), "given up"),
        (status(206, Content_Range="bytes " + "9" * 5000 + "-1/2"), "another range than was asked for"),
    ],
)
def test_faults_that_stay_end_in_one_sentence(
    hub: FakeHub, address: str, answer: Answer, message: str, waits: list[float]
) -> None:
    hub.script = [answer] * 30
    with pytest.raises(PullError, match=message) as caught:
        pull(address)
    assert "\n" not in str(caught.value)
    assert sum(waits) < 1
    assert left_over() == []
    assert models() == []


def test_a_compressed_body_is_refused(hub: FakeHub, address: str) -> None:
    def bomb(handler: Handler, content: bytes) -> None:
        body = gzip.compress(content)
        handler.head(200, {"Content-Encoding": "gzip", "Content-Length": str(len(body))})
        handler.wfile.write(body)

    hub.script = [bomb]
    with pytest.raises(PullError, match="compressed"):
        pull(address)


def test_a_file_that_is_no_model_is_not_registered(hub: FakeHub, address: str) -> None:
    hub.files[PATH] = b"<html>" * 100
    with pytest.raises(PullError, match="what was fetched is no model"):
        pull(address)
    assert left_over() == []
    assert models() == []


def test_a_server_that_is_not_there_fails_at_once(waits: list[float]) -> None:
    with pytest.raises(PullError, match=r"127\.0\.0\.1.*refused"):
        pull("http://127.0.0.1:9/tiny.gguf")
    assert waits == []


def test_a_server_that_goes_away_is_waited_for(hub: FakeHub, address: str, model: bytes) -> None:
    """A refused connection counts as final only before the first byte."""

    def leave(handler: Handler, content: bytes) -> None:
        obey(handler, content, cut=1000)
        handler.hub.script.append(status(307, Location="http://127.0.0.1:9/"))

    hub.script = [leave]
    pull(address)
    assert fetched() == model
    assert hub.gets() == [None, "bytes=1000-", "bytes=1000-"]


def test_a_redirect_is_followed_and_the_token_stays_with_the_hub(
    make_hub: Callable[[], FakeHub], hub: FakeHub, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    elsewhere = make_hub()
    elsewhere.files["/blob"] = model
    elsewhere.script = [cut_after(500_000)]
    hub.files["/org/repo/resolve/main/tiny.gguf"] = model
    digest = hashlib.sha256(model).hexdigest()
    # Another name of the same machine is another host.
    location = elsewhere.url.replace("127.0.0.1", "localhost") + "/blob"
    hub.script = [status(302, Location=location, X_Linked_Etag=f'"{digest}"')] * 2
    pull("hf.co/org/repo/tiny.gguf")
    assert fetched() == model
    assert hub.gets("Authorization") == ["Bearer hf_secret"] * 2
    assert elsewhere.gets("Authorization") == [None] * 2
    assert elsewhere.gets() == [None, "bytes=500000-"]


def test_the_token_is_sent_to_no_other_address(
    make_hub: Callable[[], FakeHub], hub: FakeHub, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    other = make_hub()
    other.files[PATH] = model
    pull(other.url + PATH)
    assert other.gets("Authorization") == [None]


def linked(digest: str) -> Answer:
    def answer(handler: Handler, content: bytes) -> None:
        handler.head(200, {"X-Linked-Etag": f'"{digest}"', "Content-Length": str(len(content))})
        handler.wfile.write(content)

    return answer


def test_wrong_bytes_are_fetched_once_more(hub: FakeHub, address: str, model: bytes) -> None:
    digest = hashlib.sha256(model).hexdigest()
    damaged = model[:-1] + bytes([model[-1] ^ 1])

    def wrong(handler: Handler, content: bytes) -> None:
        linked(digest)(handler, damaged)

    hub.script = [wrong, linked(digest)]
    pull(address)
    assert fetched() == model
    hub.script = [wrong, wrong]
    (home() / "models" / "tiny.gguf").unlink()
    with pytest.raises(PullError, match=f"should have the sha256 {digest}, but have "):
        pull(address)
    assert left_over() == []


def test_an_etag_that_is_no_sha256_is_no_digest(hub: FakeHub, address: str, model: bytes) -> None:
    hub.script = [linked("0123456789abcdef0123456789abcdef01234567")]
    pull(address)
    assert fetched() == model


def test_a_model_is_not_fetched_again_unless_it_changed(
    hub: FakeHub, address: str, model: bytes, tmp_path: Path
) -> None:
    digest = hashlib.sha256(model).hexdigest()
    first = pull(address)
    hub.script = [linked(digest)]
    reports: list[tuple[int, int | None, str]] = []
    assert pull(address, progress=lambda *report: reports.append(report)) == first
    assert reports == []

    newer = write_gguf(tmp_path / "newer.gguf", seed=9).read_bytes()
    hub.files[PATH] = newer
    hub.script = [linked(hashlib.sha256(newer).hexdigest())]
    assert pull(address).sha256 != first.sha256
    assert fetched() == newer


def test_a_damaged_file_is_fetched_again(hub: FakeHub, address: str, model: bytes) -> None:
    digest = hashlib.sha256(model).hexdigest()
    os.truncate(pull(address).path, 1000)
    hub.script = [linked(digest)]
    pull(address)
    assert fetched() == model


def test_a_disk_without_room_is_noticed_before(hub: FakeHub, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def huge(handler: Handler, content: bytes) -> None:
        handler.head(200, {"Content-Length": str(1 << 60), "ETag": '"huge"'})

    hub.script = [huge]
    with pytest.raises(PullError, match=r"MB free, but 1,152,921,504,607 MB are needed"):
        pull(address)
    assert left_over() == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_disk_that_fills_up_is_one_sentence(address: str) -> None:
    partial = home() / "models" / "tiny.gguf.partial"
    partial.parent.mkdir(parents=True)
    partial.symlink_to("/dev/full")
    with pytest.raises(PullError, match=r"tiny\.gguf\.partial: No space left on device"):
        pull(address)
    assert models() == []
    assert left_over() == []
