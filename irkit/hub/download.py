"""One file over HTTP, into one file on disk, however often the connection breaks.

The bytes go to a `.partial` file; beside it a `.partial.json` keeps what the server said of the file, so that
a later process can go on where this one was killed. A range is asked for with If-Range (RFC 9110, section
13.1.5): a server whose file has changed sends all of it, and the download starts over. A large file is fetched in
pieces, several at the same time, where the server can send ranges.
"""

import hashlib
import json
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from irkit.errors import PullError
from irkit.hub.addresses import open_client
from irkit.hub.answers import TryAgainError, check_status, linked_digest, strong_etag, total_size
from irkit.hub.pieces import PIECE, NotAsAskedError, can_divide, fetch, length

if TYPE_CHECKING:
    import httpx

# Called as progress(bytes done, bytes in all or None, what is being done).
Progress = Callable[[int, int | None, str], None]

# How long a host may take to answer at all when there is another place to turn to.
ANSWER_SECONDS = 5.0
# Tries in a row that bring no byte, and the wait before the second of them, which doubles each time.
TRIES = 4
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0
# Bytes of pieces after which what is here is written down: a process that is killed loses no more.
_NOTED_EVERY = 1 << 20


@dataclass(frozen=True)
class _Remote:
    """What the server said of the file that a partial file is the beginning of."""

    url: str
    etag: str | None
    size: int | None
    sha256: str | None
    pieces: dict[int, int] | None = None
    """How many bytes of each piece are here, where several are fetched at once; else the file begins with what is."""


@dataclass(frozen=True)
class _Job:
    """The arguments of one `download`."""

    url: str
    partial: Path
    size: int | None
    sha256: str | None
    present: str | None
    report: Callable[[int, int | None], None]
    in_order: threading.Event
    """Set once the server has turned out to send no ranges as they are asked for."""


class _WrongBytesError(Exception):
    """All bytes are here, but they do not have the digest they should have."""


def download(
    url: str,
    partial: Path,
    *,
    headers: Mapping[str, str],
    what: str,
    size: int | None = None,
    sha256: str | None = None,
    present: str | None = None,
    progress: Progress | None = None,
    allow_private: bool = False,
) -> str:
    """Fetches `url` into `partial`, going on with what an earlier call has left there; returns the sha256.

    The digest is checked against `sha256`, or else against the one a Hugging Face hub names in X-Linked-Etag.
    If the server names `present` as its digest, the caller has the file already: nothing is fetched. An
    Authorization among `headers` is not sent on to another host in a redirect. Private addresses are not fetched
    from, unless `allow_private` is set and that of `url` is one itself.

    Raises:
        PullError: saying what went wrong where; a partial file is left only if a later call can use it.
    """
    import httpx

    report = progress or (lambda done, total, what: None)
    job = _Job(url, partial, size, sha256, present, lambda done, total: report(done, total, what), threading.Event())
    try:
        with open_client(url, headers, allow_private=allow_private) as client:
            try:
                return _verified(client, job)
            except _WrongBytesError:
                return _verified(client, job)
    except BaseException as error:
        if not _resumable(job)[1]:
            discard(partial)
        if isinstance(error, (httpx.HTTPError, httpx.InvalidURL, _WrongBytesError)):
            raise PullError(f"{what}: {str(error) or type(error).__name__}") from error
        if isinstance(error, OSError):
            raise PullError(f"{what}: {error.filename or partial}: {error.strerror or error}") from error
        raise


def discard(partial: Path) -> None:
    """Deletes a partial file and what is known of it."""
    _sidecar(partial).unlink(missing_ok=True)
    _sidecar(partial).with_name(_sidecar(partial).name + ".tmp").unlink(missing_ok=True)
    partial.unlink(missing_ok=True)


def check_answers(url: str) -> None:
    """Makes sure that the server of `url` gives any answer within ANSWER_SECONDS.

    The limit holds for name lookup, every address of the host and the answer together, which the timeouts of
    a connection do not: behind a firewall that drops packets those add up to minutes.

    Raises:
        PullError: there was no answer.
    """
    import httpx

    outcome: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            httpx.head(url, timeout=ANSWER_SECONDS)
            outcome.put(None)
        except Exception as error:
            outcome.put(error)

    threading.Thread(target=ask, daemon=True).start()
    host = urlsplit(url).hostname
    try:
        error = outcome.get(timeout=ANSWER_SECONDS)
    except queue.Empty:
        raise PullError(f"{host} does not answer within {ANSWER_SECONDS:g} s") from None
    if error is not None:
        raise PullError(f"{host} cannot be reached: {error}") from error


def check_space(folder: Path, needed: int) -> None:
    """Makes sure that `needed` bytes fit on the disk of `folder`.

    Raises:
        PullError: they do not; the message names both sizes.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PullError(f"{folder} has {free / 1e6:,.0f} MB free, but {needed / 1e6:,.0f} MB are needed")


def _verified(client: "httpx.Client", job: _Job) -> str:
    remote = _complete(client, job)
    expected = job.sha256 or remote.sha256
    if expected is not None and expected == job.present:
        return expected
    with open(job.partial, "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if expected not in (None, digest):
        discard(job.partial)
        raise _WrongBytesError(f"the bytes should have the sha256 {expected}, but have {digest}")
    return digest


def _complete(client: "httpx.Client", job: _Job) -> _Remote:
    """Tries until the partial file holds all bytes of the file."""
    import httpx

    failures = 0
    while True:
        _, before = _resumable(job)
        try:
            return _try_once(client, job)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            # A server that has never been reached is not there; one that has been may come back.
            if before == 0:
                raise
            problem = TryAgainError(str(error) or "no connection")
        except (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError) as error:
            problem = TryAgainError(str(error) or type(error).__name__)
        except TryAgainError as error:
            problem = error
        _, after = _resumable(job)
        failures = 0 if after > before else failures + 1
        wait = FIRST_WAIT_SECONDS * 2 ** max(failures - 1, 0) if problem.wait is None else problem.wait
        if failures >= TRIES or wait > LONGEST_WAIT_SECONDS:
            asked = "" if problem.wait is None else f" and asks to wait {problem.wait:.0f} s"
            raise PullError(f"{urlsplit(job.url).hostname}: {problem}{asked}; given up")
        time.sleep(wait)


def _try_once(client: "httpx.Client", job: _Job) -> _Remote:
    remote, offset = _resumable(job)
    if remote is not None and offset == remote.size:
        return remote
    if remote is not None and remote.pieces is not None:
        return _fetch_pieces(client, job, remote)
    # Compressed bytes could neither be resumed nor counted.
    headers = {"Accept-Encoding": "identity"}
    if remote is not None and remote.etag and offset:
        headers |= {"Range": f"bytes={offset}-", "If-Range": remote.etag}
    with client.stream("GET", job.url, headers=headers) as response:
        if response.status_code == 416:
            discard(job.partial)
            raise TryAgainError("the server has fewer bytes than are here")
        check_status(response, job.url)
        total = total_size(response, offset)
        if response.status_code == 206 and not (remote and total and _continues(response, remote, total)):
            discard(job.partial)
            raise TryAgainError("the server sends another range than was asked for")
        if None not in (job.size, total) and total != job.size:
            raise PullError(f"{response.url.host} has a file of {total} bytes, not of {job.size} bytes")
        total = job.size if total is None else total
        if remote is None or response.status_code == 200:
            offset = 0
            remote = _Remote(job.url, strong_etag(response), total, job.sha256 or linked_digest(response))
            if remote.sha256 is not None and remote.sha256 == job.present:
                return remote
        check_space(job.partial.parent, (total or 0) - offset)
        in_pieces = not offset and can_divide(response, total) and not job.in_order.is_set()
        if not in_pieces:
            _write(response, job, remote, offset, total)
    return _fetch_pieces(client, job, replace(remote, pieces={})) if in_pieces else remote


def _fetch_pieces(client: "httpx.Client", job: _Job, remote: _Remote) -> _Remote:
    """Fetches the pieces that are missing, several at the same time."""
    assert remote.etag
    assert remote.size
    assert remote.pieces is not None
    here, noted = dict(remote.pieces), sum(remote.pieces.values())
    check_space(job.partial.parent, remote.size - noted)
    if not here:
        job.partial.write_bytes(b"")
        _note(job, remote)

    def note() -> None:
        nonlocal noted
        done = sum(here.values())
        job.report(done, remote.size)
        if done - noted >= _NOTED_EVERY:
            noted = done
            _note(job, replace(remote, pieces=here))

    try:
        fetch(client, job.url, job.partial, remote.etag, remote.size, here, note)
    except NotAsAskedError as error:
        job.in_order.set()
        here.clear()
        raise TryAgainError(str(error)) from None
    finally:
        if here:
            _note(job, replace(remote, pieces=here))
        else:
            discard(job.partial)
    return replace(remote, pieces=here)


def _note(job: _Job, remote: _Remote) -> None:
    """Keeps what is known of the partial file, whole at every moment."""
    sidecar = _sidecar(job.partial)
    temporary = sidecar.with_name(sidecar.name + ".tmp")
    temporary.write_text(json.dumps(asdict(remote)))
    os.replace(temporary, sidecar)


def _continues(response: "httpx.Response", remote: _Remote, total: int) -> bool:
    """Whether a range is one of the very file that the partial file began with."""
    return remote.size in (None, total) and strong_etag(response) in (None, remote.etag)


def _write(response: "httpx.Response", job: _Job, remote: _Remote, offset: int, total: int | None) -> None:
    with open(job.partial, "ab" if offset else "wb") as file:
        if not offset:
            _note(job, remote)
        job.report(offset, total)
        for chunk in response.iter_raw():
            offset += len(chunk)
            if total is not None and offset > total:
                raise PullError(f"{response.url.host} sends more than the {total} bytes of the file")
            file.write(chunk)
            job.report(offset, total)
        file.flush()
        os.fsync(file.fileno())
    if total is not None and offset < total:
        raise TryAgainError(f"the connection ended after {offset} of {total} bytes")


def _resumable(job: _Job) -> tuple[_Remote | None, int]:
    """What the partial file is the beginning of, and how many bytes it has; nothing if it is of no use."""
    try:
        remote = _Remote(**json.loads(_sidecar(job.partial).read_text()))
        done = job.partial.stat().st_size
        if remote.pieces is not None:
            size, told = remote.size or 0, {int(piece): int(held) for piece, held in remote.pieces.items()}
            remote = replace(
                remote, pieces={piece: max(min(held, length(piece, size)), 0) for piece, held in told.items()}
            )
            within = all(piece * PIECE + held <= done for piece, held in told.items())
            remote, done = (remote, sum((remote.pieces or {}).values())) if within else (None, 0)
    except (OSError, ValueError, TypeError, AttributeError):
        return None, 0
    return (remote, done) if remote and remote.url == job.url and remote.etag else (None, 0)


def _sidecar(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")
