"""What a server's answer to a download says, and which answers may be better at the next try."""

import email.utils
import re
import time
from typing import TYPE_CHECKING

from irkit.errors import PullError

if TYPE_CHECKING:
    import httpx

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RETRIED_STATUS = frozenset({429, 500, 502, 503, 504})


class TryAgainError(Exception):
    """This try failed, the next may not; `wait` is how many seconds the server asked for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def check_status(response: "httpx.Response", url: str) -> None:
    """Makes sure that an answer to a request for `url` has the file, or a range of it, as it is.

    Raises:
        PullError: it has not.
        TryAgainError: it has not, and may have at the next try.
    """
    status, host = response.status_code, response.url.host
    if status in _RETRIED_STATUS:
        raise TryAgainError(f"the server answers {status}", _retry_after(response))
    if status in (401, 403):
        raise PullError(f"{host} answers {status}: no such file, or one that needs a token (HF_TOKEN)")
    if status == 404:
        raise PullError(f"{host} has no such file: {response.url.path}")
    if status not in (200, 206):
        raise PullError(f"{host} answers {status} {response.reason_phrase}")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise PullError(f"{host} sends the file compressed, though it was asked not to")
    if url.startswith("https:") and response.url.scheme != "https":
        raise PullError(f"{host} is a redirect from https to {response.url.scheme}, which is not followed")


def _retry_after(response: "httpx.Response") -> float | None:
    """Seconds, from the two forms of Retry-After: a number of seconds, or a date."""
    value = response.headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def total_size(response: "httpx.Response", first: int, last: int | None = None) -> int | None:
    """The size of the whole file; None if the answer does not say, or is another range than `first` to `last`, or to
    the end."""
    if response.status_code == 200:
        length = response.headers.get("Content-Length", "")
        return int(length) if length.isdecimal() else None
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if not found:
        return None
    begin, end, total = map(int, found.groups())
    return total if begin == first and end == (total - 1 if last is None else last) else None


def strong_etag(response: "httpx.Response") -> str | None:
    """What stands for these very bytes, if the server has such a thing."""
    etag = response.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else None


def linked_digest(response: "httpx.Response") -> str | None:
    """The sha256 that a Hugging Face hub names."""
    # The hub names the digest in the redirect to the host that has the bytes.
    for answer in (*response.history, response):
        digest = answer.headers.get("X-Linked-Etag", "").strip('"').lower()
        if _SHA256.fullmatch(digest):
            return digest
    return None
