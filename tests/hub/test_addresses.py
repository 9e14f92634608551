"""Pulls are not turned against this machine or its network: by a name, a redirect or a lookup that lies."""

import socket
from collections.abc import Callable
from typing import Any

import pytest
from misbehaving import PATH, FakeHub, pull, status

from irkit import hub as models
from irkit.errors import PullError
from irkit.hub.addresses import is_private


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST.", "a.localhost", "nas.local", "metadata.google.internal", "127.0.0.1", "127.1.2.3"),
        *("10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1"),
        *("::1", "[::1]", "fe80::1%eth0", "fd00::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::", "::"),
        *("255.255.255.255", "ff02::1"),
    ],
)
def test_private(host: str) -> None:
    assert is_private(host)


@pytest.mark.parametrize("host", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "host.invalid", "", "a" * 300])
def test_not_private(host: str) -> None:
    assert not is_private(host)


@pytest.mark.parametrize("named", ["127.0.0.1", "localhost"])
def test_this_machine_must_be_named_and_allowed(hub: FakeHub, address: str, named: str) -> None:
    for name in (address, f"{hub.url}/library/x:1"):
        with pytest.raises(PullError, match=f"{named} is a private address"):
            models.pull(name.replace("127.0.0.1", named))
    assert hub.seen == []
    assert pull(address).name == "tiny"


def test_the_hub_that_the_user_set_may_be_private(hub: FakeHub, model: bytes) -> None:
    hub.files["/org/repo/resolve/main/tiny.gguf"] = model
    assert models.pull("hf.co/org/repo/tiny.gguf").name == "tiny"


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes 127.0.0.1 look like a public address, but for one host."""

    def except_for(host: str) -> None:
        def is_private(name: str) -> bool:
            return name == host

        monkeypatch.setattr("irkit.hub.addresses._is_private_name", is_private)
        monkeypatch.setattr("irkit.hub.addresses._is_private_address", is_private)

    return except_for


@pytest.mark.parametrize("allowed", [False, True])
def test_a_redirect_from_a_public_to_a_private_address_is_not_followed(
    hub: FakeHub, make_hub: Callable[[], FakeHub], model: bytes, public: Callable[[str], None], allowed: bool
) -> None:
    inner = make_hub()
    inner.files[PATH] = hub.files[PATH] = model
    hub.script = [status(302, Location=inner.url.replace("127.0.0.1", "localhost") + PATH)]
    public("localhost")
    with pytest.raises(PullError, match="localhost is a private address"):
        models.pull(hub.url + PATH, allow_private=allowed)
    assert inner.seen == []


def test_a_name_that_turns_out_to_be_this_machine_gets_no_request(
    hub: FakeHub, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files["/v2/library/x/manifests/1"] = b"{}"
    look_up = socket.getaddrinfo
    port = int(hub.url.rsplit(":", 1)[1])

    def lying(host: Any, *arguments: Any, **more: Any) -> Any:
        return look_up("127.0.0.1" if host in ("example.com", b"example.com") else host, port, *arguments[1:], **more)

    monkeypatch.setattr(socket, "getaddrinfo", lying)
    with pytest.raises(PullError, match=r"127\.0\.0\.1 is a private address"):
        models.pull("example.com/library/x:1")
    assert hub.seen == []
