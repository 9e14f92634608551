"""Who may talk to a server that listens on this machine only.

A page in a browser can reach a loopback address, and by DNS rebinding even as its own origin
(CVE-2024-28224). So the Host header must name this machine or its own network, and only origins on this
machine, or of desktop applications, may read the answers.
"""

import ipaddress
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from irkit.server.errors import Fault

LOCAL_ORIGINS = r"https?://(localhost|127\.0\.0\.1|\[::1\]|0\.0\.0\.0)(:\d+)?|(app|file|tauri|vscode-[\w-]+)://.*"
"""A pattern of the origins that may read answers."""

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


def _address(text: str) -> Any:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
