"""Wheels on a Python package index, by its simple repository API (PEP 503 in HTML, PEP 691 in JSON).

pip can do more, and does it where its settings ask for more than one index. What this adds is an address, with a sha256
where the index gives one: a download from there can be gone on with.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urldefrag, urljoin, urlsplit

from irkit.errors import PullError
from irkit.hub import addresses, naming
from irkit.hub.answers import TryAgainError, check_status

_PYPI = "https://pypi.org/simple"
_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_LONGEST = 64 << 20
"""The most bytes of a page that lists a project's files."""
_SHA256 = re.compile(r"(?:^|&)sha256=([0-9a-f]{64})(?:&|$)")
_SETTING = re.compile(r"(?P<section>\S+?)\.(?P<name>[a-z-]+)='(?P<value>.*)'")
_FOR_PIP = ("extra-index-url", "find-links", "no-index", "proxy")
"""Settings that pip alone follows."""


@dataclass(frozen=True)
class Wheel:
    """A wheel that an index lists."""

    url: str
    sha256: str | None
    private: bool
    """Whether the index is on a private address, and may name others."""


@dataclass(frozen=True)
class _Link:
    name: str
    url: str
    sha256: str | None
    yanked: bool


def look_up(requirement: str) -> Wheel | None:
    """The wheel that `requirement` (`NAME` or `NAME==VERSION`) means; None where only pip knows how to look for it.

    It is the newest version that is no pre-release and was not withdrawn, unless it is named. Of several wheels of a
    version, one for all systems goes first: only data is taken out of it.

    Raises:
        PullError: the index cannot be read, or has no such wheel.
    """
    index = _index()
    if index is None:
        return None
    project, _, version = requirement.partition("==")
    page = f"{index.rstrip('/')}/{naming.project(project)}/"
    link = _choose(_links(*_get(page)), project, version)
    if link is None:
        raise PullError(f"{urlsplit(index).hostname} has no wheel of {requirement}")
    if not addresses.is_safe(link.url):
        raise PullError(f"{urlsplit(index).hostname} names an address that is not https: {link.url[:200]!r}")
    return Wheel(link.url, link.sha256, addresses.is_private(urlsplit(index).hostname or ""))


def digest_in(fragment: str) -> str | None:
    """The sha256 that stands behind the # of an address, as in links to packages."""
    found = _SHA256.search(fragment)
    return found[1] if found else None


def _index() -> str | None:
    """The one index that pip would ask, if it is one that can be asked without pip."""
    settings = _settings()
    index = settings.get("index-url") or _PYPI
    can_ask = addresses.is_safe(index) and not urlsplit(index).username
    return index if can_ask and not any(settings.get(name) for name in _FOR_PIP) else None


def _settings() -> dict[str, str]:
    """pip's settings for `pip download`, by name; without pip, those that variables of its name make."""
    if importlib.util.find_spec("pip") is None:
        variables = {name: name.removeprefix("PIP_").lower().replace("_", "-") for name in os.environ}
        return {setting: os.environ[name] for name, setting in variables.items() if name.startswith("PIP_")}
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    told = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace").stdout
    found = [match for line in told.splitlines() if (match := _SETTING.fullmatch(line))]
    # What a variable says goes before what files say of this command, and that before what they say of all.
    sections = "global", "download", ":env:"
    return {match["name"]: match["value"] for each in sections for match in found if match["section"] == each}


def _get(page: str) -> tuple[str, str]:
    """What a page says, and where it was at last."""
    import httpx

    headers = {"Accept": _ACCEPT, "Accept-Encoding": "identity"}
    body = bytearray()
    try:
        with (
            addresses.open_client(page, headers, allow_private=True) as client,  # it is the user's own setting
            client.stream("GET", page) as response,
        ):
            check_status(response, page)
            for piece in response.iter_raw():
                body += piece
                if len(body) > _LONGEST:
                    raise PullError(f"{response.url.host} lists more than {_LONGEST} bytes of files at {page}")
    except (httpx.HTTPError, httpx.InvalidURL, TryAgainError) as error:
        raise PullError(f"{page}: {str(error) or type(error).__name__}") from error
    return body.decode("utf-8", "replace"), str(response.url)


def _links(text: str, page: str) -> Iterator[_Link]:
    """The files that a page names, in either form; what is not as it should be is passed over."""
    if not text.lstrip().startswith("{"):
        parser = _Anchors()
        parser.feed(text)
        for href, attributes in parser.found:
            url, fragment = urldefrag(_joined(page, href))
            yield _Link(_last(url), url, digest_in(fragment), "data-yanked" in attributes)
        return
    try:
        files: Any = json.loads(text)["files"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise PullError(f"what {page} sends is no list of files") from None
    for file in files if isinstance(files, list) else ():
        if isinstance(file, dict) and isinstance(file.get("url"), str):
            hashes = file.get("hashes")
            digest = hashes.get("sha256") if isinstance(hashes, dict) else None
            url = urldefrag(_joined(page, file["url"])).url
            yield _Link(_last(url), url, digest_in(f"sha256={digest}"), bool(file.get("yanked")))


def _joined(page: str, href: str) -> str:
    try:
        return urljoin(page, href)
    except ValueError:
        return ""


def _last(url: str) -> str:
    try:
        return urlsplit(url).path.rpartition("/")[2]
    except ValueError:
        return ""


class _Anchors(HTMLParser):
    """Collects the links of a page, with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        if tag == "a" and href:
            self.found.append((href, dict(attrs)))


def _choose(links: Iterator[_Link], project: str, version: str) -> _Link | None:
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename
    from packaging.version import InvalidVersion, Version

    try:
        wanted = Version(version) if version else None
    except InvalidVersion:
        raise PullError(f"{version!r} is no version of a Python package") from None
    best: tuple[Any, _Link] | None = None
    for link in links:
        try:
            name, its, _, tags = parse_wheel_filename(link.name)
        except (InvalidWheelFilename, InvalidVersion):
            continue
        if name != naming.project(project) or (wanted is None and link.yanked) or wanted not in (None, its):
            continue
        order = (not its.is_prerelease, its, any(tag.platform == "any" for tag in tags), link.name)
        if best is None or order > best[0]:
            best = order, link
    return best[1] if best else None
