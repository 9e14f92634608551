import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from irkit.options import ServeOptions
from irkit.server import create_app
from irkit.server.security import is_local, is_loopback

LOCAL = [
    *("localhost", "localhost:11434", "LOCALHOST", "127.0.0.1", "127.0.0.1:80", "[::1]", "[::1]:11434"),
    *("nas.local", "nas.local:11434", "host.docker.internal:11434", "app.localhost", "192.168.1.7", "10.0.0.1:1"),
]
FOREIGN = [
    *("", "evil.example", "evil.example:11434", "localhost.evil.example", "notlocalhost", "8.8.8.8", "local"),
    *("127.0.0.1.evil.example", "[2001:4860:4860::8888]", "evil.example:127.0.0.1", "xn--local", "0x7f000001"),
]


@pytest.mark.parametrize("host", LOCAL)
def test_local_hosts_are_served(client, host):
    assert client.get("/api/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", FOREIGN)
def test_other_hosts_are_refused(client, host):
    reply = client.get("/api/health", headers={"host": host})
    assert (reply.status_code, list(reply.json())) == (403, ["error"])


@given(st.text())
def test_any_host_header_is_judged(host):
    assert is_local(host) in (True, False)


def test_loopback():
    assert [
        h
        for h in ("127.0.0.1", "::1", "localhost", "127.9.9.9", "0.0.0.0", "::", "8.8.8.8", "nas.local")
        if is_loopback(h)
    ] == ["127.0.0.1", "::1", "localhost", "127.9.9.9"]


async def status(host: str, header: str) -> int:
    transport = httpx.ASGITransport(create_app(ServeOptions(host=host)))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        return (await client.get("/api/health", headers={"host": header})).status_code


@pytest.mark.parametrize(("host", "expected"), [("127.0.0.1", 403), ("0.0.0.0", 200)])
def test_only_a_server_for_this_machine_alone_is_picky(host, expected):
    import asyncio

    assert asyncio.run(status(host, "my.server.example")) == expected


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost:3000", True),
        ("https://127.0.0.1", True),
        ("http://[::1]:5173", True),
        ("app://obsidian.md", True),
        ("tauri://localhost", True),
        ("vscode-webview://abc", True),
        ("https://evil.example", False),
        ("http://localhost.evil.example", False),
        ("http://localhost:3000.evil.example", False),
        ("null", False),
    ],
)
def test_origins(client, origin, allowed):
    headers = {"origin": origin, "access-control-request-method": "POST"}
    reply = client.options("/api/chat", headers=headers)
    assert (reply.headers.get("access-control-allow-origin") == origin) is allowed
    assert ("access-control-allow-origin" in client.get("/api/tags", headers=headers).headers) is allowed
