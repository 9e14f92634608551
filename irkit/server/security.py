"""Who may talk to the server.

A page in a browser can reach a loopback address, and by DNS rebinding even as its own origin
(CVE-2024-28224). So the Host header must name this machine or its own network. A page can also send what it cannot
read the answer to: only pages of the server itself, of this machine and of desktop applications may ask for anything.
"""

import hmac
import ipaddress
import os
import re
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from irkit.options import ServeOptions
from irkit.server.errors import Fault

LOCAL_ORIGINS = r"https?://(localhost|127\.0\.0\.1|\[::1\]|0\.0\.0\.0)(:\d+)?|(app|file|tauri|vscode-[\w-]+)://.*"
"""A pattern of the origins whose pages may always use a server."""

OPEN_PATHS = {"/", "/api/health"}
"""What needs no key: it says that the server runs, and no more."""

_LOCAL_SUFFIXES = (".localhost", ".local", ".internal")


def is_loopback(host: str) -> bool:
    """Whether a server that listens on `host` is reached from this machine only."""
    address = _address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def is_local(host: str) -> bool:
    """Whether a Host header names this machine or something on its own network."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() and not host.endswith("]") else host
    name = name.lower().rstrip(".")
    address = _address(name.removeprefix("[").removesuffix("]"))
    if address is not None:
        return address.is_loopback or address.is_private or address.is_unspecified
    return name == "localhost" or name.endswith(_LOCAL_SUFFIXES)


class LocalHostsOnly:
    """ASGI middleware that answers 403 to requests whose Host header is not local."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        app = self._app
        if scope["type"] == "http" and not is_local(Headers(scope=scope).get("host", "")):
            app = Fault("the Host header names no local address", 403).reply(scope["path"])
        await app(scope, receive, send)


def api_key(options: ServeOptions) -> str | None:
    """What requests must carry, if anything."""
    return options.api_key or os.environ.get("IRKIT_API_KEY") or None


def allowed_origins(more: Sequence[str]) -> str:
    """A pattern of the origins whose pages may use the server: the local ones and `more`, in which * is all."""
    return ".*" if "*" in more else "|".join([LOCAL_ORIGINS, *(re.escape(origin.rstrip("/")) for origin in more)])


class KnownOriginsOnly:
    """ASGI middleware that answers 403 to the pages of other origins than these and the server's own.

    A browser asks first (a CORS preflight) before most of what a page sends elsewhere, but not before a POST of plain
    text, which is read as JSON here.
    """

    def __init__(self, app: ASGIApp, origins: str) -> None:
        self._app = app
        self._origins = re.compile(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        app = self._app
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            origin, own = headers.get("origin"), headers.get("host", "")
            known = origin is None or self._origins.fullmatch(origin)
            if not known and origin not in (f"http://{own}", f"https://{own}"):
                app = Fault("this origin may not use the server", 403).reply(scope["path"])
        await app(scope, receive, send)


class WithKeyOnly:
    """ASGI middleware that answers 401 to requests without the key, but for `OPEN_PATHS`."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        app = self._app
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._carried(Headers(scope=scope)):
            refused = Fault("a key is needed: Authorization: Bearer KEY", 401)
            app = refused.reply(scope["path"], {"WWW-Authenticate": "Bearer"})
        await app(scope, receive, send)

    def _carried(self, headers: Headers) -> bool:
        kind, _, key = headers.get("authorization", "").partition(" ")
        # How long it takes says nothing about where two keys differ.
        return hmac.compare_digest(key.strip().encode(), self._key) and kind.lower() == "bearer"


def _address(text: str) -> Any:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
