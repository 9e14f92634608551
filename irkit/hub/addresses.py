"""Which machines a pull may turn to: no private one, by whatever name or redirect, unless the user named one."""

import ipaddress
import socket
import urllib.request
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from irkit.errors import PullError

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0

_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def open_client(url: str, headers: Mapping[str, str], *, allow_private: bool) -> "httpx.Client":
    """What fetches `url`. Only where that is `allow_private`, and itself on a private address, may others be.

    Each request, redirects included, is looked at twice: by the host's name, and, when the connection stands and
    before anything is sent, by the address that the name turned out to have (which a second lookup could change).
    A proxy, if the user's environment names one, makes its connections itself: then names alone are looked at.
    """
    import httpx

    private = allow_private and is_private(urlsplit(url).hostname or "")
    proxied = bool(set(urllib.request.getproxies()) - {"no"})

    def connected(event: str, info: Mapping[str, Any]) -> None:
        if event == "connection.connect_tcp.complete":
            address = str(info["return_value"].get_extra_info("server_addr")[0])
            if _is_private_address(address):
                info["return_value"].close()
                raise PullError(f"{address} is a private address, which is not fetched from")

    def look(request: httpx.Request) -> None:
        if private:
            return
        if _is_private_name(request.url.host) or (proxied and is_private(request.url.host)):
            raise PullError(f"{request.url.host} is a private address, which is not fetched from")
        if not proxied:
            request.extensions["trace"] = connected

    timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
    return httpx.Client(follow_redirects=True, timeout=timeout, headers=headers, event_hooks={"request": [look]})


def is_safe(url: str) -> bool:
    """Whether nobody on the way can read or change what comes from there."""
    return urlsplit(url).scheme == "https" or is_here(url)


def is_here(url: str) -> bool:
    """Whether an address is one of this machine."""
    return urlsplit(url).hostname in ("localhost", "127.0.0.1")


def is_private(host: str) -> bool:
    """Whether a host, by its name or any address that it has here, is this machine or one of a private network."""
    if _is_private_name(host):
        return True
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return any(_is_private_address(str(entry[4][0])) for entry in found)


def _is_private_name(host: str) -> bool:
    host = host.strip("[]").rstrip(".").lower()
    return host == "localhost" or host.endswith((".localhost", ".local", ".internal")) or _is_private_address(host)


def _is_private_address(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        address = inner or address
    return not address.is_global or address.is_multicast
