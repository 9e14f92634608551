"""A large file in pieces, several fetched at the same time: one connection is often slower than the line."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from irkit.hub.answers import TryAgainError, check_status, strong_etag, total_size

if TYPE_CHECKING:
    import httpx

PIECE = 16 << 20
"""Bytes of a piece; the last one may have fewer."""
AT_ONCE = 4
"""Pieces that are fetched at the same time."""
FROM = 4 * PIECE
"""Bytes from which a file is divided."""


class NotAsAskedError(Exception):
    """A range was asked for, and something else came: the server has another file now, or sends no ranges."""


def can_divide(response: "httpx.Response", total: int | None) -> bool:
    """Whether the server of this answer, all of a file of `total` bytes, says that it can send ranges of it."""
    ranges = response.headers.get("Accept-Ranges", "").lower() == "bytes"
    return ranges and strong_etag(response) is not None and total is not None and total >= FROM


def length(piece: int, size: int) -> int:
    """Bytes of a piece of a file of `size` bytes; none if there is no such piece."""
    return max(min(PIECE, size - piece * PIECE), 0) if piece >= 0 else 0


def fetch(
    client: "httpx.Client", url: str, file: Path, etag: str, size: int, here: dict[int, int], note: Callable[[], None]
) -> None:
    """Fetches what is missing of a file of `size` bytes to its places in `file`, which is there.

    `here` tells how many bytes of each piece are in their place, and is kept up; `note` is called whenever more are
    safe, never twice at the same time.

    Raises:
        TryAgainError, PullError, httpx.HTTPError: what the first piece that fails raises; what came before stays.
        NotAsAskedError: the server sends no such ranges.
    """
    lock, failed = threading.Lock(), threading.Event()

    def one(piece: int) -> None:
        begin = piece * PIECE
        at, end = begin + here.get(piece, 0), begin + length(piece, size)
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={at}-{end - 1}", "If-Range": etag}
        with client.stream("GET", url, headers=headers) as response, open(file, "r+b") as target:
            if response.status_code == 416:
                raise NotAsAskedError("the server has fewer bytes than it said")
            check_status(response, url)
            if response.status_code != 206:
                raise NotAsAskedError("the server sends all of the file where a range was asked for")
            if total_size(response, at, end - 1) != size or strong_etag(response) not in (None, etag):
                raise NotAsAskedError("the server sends another range than was asked for")
            target.seek(at)
            for chunk in response.iter_raw():
                if at + len(chunk) > end:
                    raise NotAsAskedError("the server sends more than was asked for")
                target.write(chunk)
                target.flush()  # what is noted outlives this process
                at += len(chunk)
                with lock:
                    here[piece] = at - begin
                    note()
                if failed.is_set():
                    return
            os.fsync(target.fileno())
        if at < end:
            raise TryAgainError(f"the connection ended after {at - begin} of {end - begin} bytes")

    def watched(piece: int) -> None:
        try:
            if not failed.is_set():
                one(piece)
        except BaseException:
            failed.set()
            raise

    missing = [piece for piece in range(-(-size // PIECE)) if here.get(piece, 0) < length(piece, size)]
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="irkit-pull") as pool:
        try:
            for future in [pool.submit(watched, piece) for piece in missing]:
                future.result()
        except BaseException:  # Ctrl-C too
            failed.set()
            raise
