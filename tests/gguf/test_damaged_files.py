"""GGUF files as hostile input: a damaged or lying file is one clear error, and costs next to no memory."""

import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import irkit.gguf
from irkit.errors import ModelFileError, UnsupportedModelError
from irkit.gguf.formats import BY_NAME

U8, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 5, 6, 7, 8, 9, 10
HUGE = [2**31, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 1]


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: bytes) -> bytes:
    return u64(len(text)) + text


def entry(key: bytes, kind: int, payload: bytes) -> bytes:
    return string(key) + u32(kind) + payload


def array(kind: int, count: int, payload: bytes) -> bytes:
    return u32(kind) + u64(count) + payload


def tensor(
    name: bytes = b"t",
    dims: tuple[int, ...] = (8,),
    number: int = 0,
    offset: int = 0,
    n_dims: int | None = None,
) -> bytes:
    dimensions = len(dims) if n_dims is None else n_dims
    return string(name) + u32(dimensions) + b"".join(map(u64, dims)) + u32(number) + u64(offset)


def gguf_file(
    entries: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = bytes(32),
    *,
    alignment: int = 32,
    head: bytes = b"GGUF" + u32(3),
    n_tensors: int | None = None,
    n_entries: int | None = None,
) -> bytes:
    """A file that is sound unless a part of it is not; `data` follows the padded table of tensors."""
    tensor_count = len(tensors) if n_tensors is None else n_tensors
    entry_count = len(entries) if n_entries is None else n_entries
    table = head + u64(tensor_count) + u64(entry_count) + b"".join(entries) + b"".join(tensors)
    return table + (bytes(-len(table) % alignment) + data if tensors else b"")


def sound() -> bytes:
    """A file of a kilobyte with all types of values and several tensors; its last byte is a weight."""
    widths = [1, 1, 2, 2, 4, 4, 4, 1, None, None, 8, 8, 8]
    entries = [entry(b"general.architecture", STRING, string(b"test"))]
    for kind, width in enumerate(widths):
        if width is not None:
            entries.append(entry(b"scalar.%d" % kind, kind, bytes(range(width))))
            entries.append(entry(b"array.%d" % kind, ARRAY, array(kind, 3, bytes(range(3 * width)))))
    entries.append(entry(b"strings", ARRAY, array(STRING, 3, string(b"") + string(b"ab") + string(b"\xff"))))
    entries.append(entry(b"nothing", ARRAY, array(F32, 0, b"")))
    entries.append(entry(b"no strings", ARRAY, array(STRING, 0, b"")))
    tensors = (
        tensor(b"plain", (4, 2), BY_NAME["F32"].number, 0),
        tensor(b"scalar", (), BY_NAME["F16"].number, 32),
        tensor(b"blocks", (32, 2), BY_NAME["Q4_0"].number, 64),
        tensor(b"no code", (256,), BY_NAME["IQ2_XS"].number, 128),
        tensor(b"super-blocks", (256, 1, 1, 1), BY_NAME["Q6_K"].number, 224),
    )
    data = np.random.default_rng(0).integers(0, 256, 224 + 210, np.uint8).tobytes()
    return gguf_file(tuple(entries), tensors, data)


SOUND = sound()


def read_all(path: Path) -> None:
    """Asks an opened file for everything in it."""
    with irkit.gguf.open(path) as file:
        for key, value in file.metadata.items():
            assert isinstance(key, str)
            assert isinstance(value, int | float | str | list | np.ndarray)
        for name, info in file.tensors.items():
            assert file.raw(name).size == info.nbytes
            if info.format in irkit.gguf.QUANTS:
                assert file.dequantize(name).shape == info.shape
            else:
                with pytest.raises(UnsupportedModelError, match=info.format):
                    file.dequantize(name)


def refused(path: Path, content: bytes, message: str) -> None:
    """Opening a file of `content` fails with `message`, and takes no memory to speak of."""
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError, match=message) as error:
            irkit.gguf.open(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert str(path) in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 300
    assert peak < 1 << 18


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bad.gguf"


def test_the_file_the_tests_damage_is_sound(path: Path) -> None:
    path.write_bytes(SOUND)
    read_all(path)
    with irkit.gguf.open(path) as file:
        assert file.metadata["strings"] == ["", "ab", "\ufffd"]
        assert file.metadata["no strings"] == []
        assert file.metadata.value("nothing", np.ndarray).shape == (0,)
        assert file.metadata["scalar.7"] is False
        assert file.dequantize("scalar").shape == ()
        assert file.tensors["super-blocks"].shape == (1, 1, 1, 256)


def test_truncation_at_every_byte(path: Path) -> None:
    path.write_bytes(SOUND)
    for size in range(len(SOUND) - 1, 0, -1):
        os.truncate(path, size)
        with pytest.raises(ModelFileError, match=r"bad\.gguf: .*\(byte \d+\): "):
            irkit.gguf.open(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGU", r"magic \(byte 0\): a GGUF file begins with b'GGUF', this one with b'GGU'"),
        (b"PK\x03\x04" + SOUND[4:], r"magic \(byte 0\): .* this one with b'PK\\x03\\x04'"),
        (
            gguf_file(head=b"GGUF" + u32(1)),
            r"version \(byte 4\): GGUF version 1 is not supported, only 2 and 3",
        ),
        (gguf_file(head=b"GGUF" + u32(4)), r"version \(byte 4\): GGUF version 4 is not supported"),
        (gguf_file(head=b"GGUF" + struct.pack(">I", 3)), r"version \(byte 4\): big-endian byte order is not"),
        (SOUND[:12], r"number of tensors \(byte 8\): it takes 8 bytes, but only 4 are left"),
        (gguf_file()[:16], r"number of metadata entries \(byte 16\): it takes 8 bytes, but only 0 are left"),
    ],
    ids=["short", "magic", "version 1", "version 4", "big-endian", "no tensor count", "no entry count"],
)
def test_heads(path: Path, content: bytes, message: str) -> None:
    refused(path, content, message)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry(b"", U32, u32(1))], r"metadata entry 0 \(byte 24\): the key is empty"),
        ([entry(b"a", U8, b"1")] * 2, r"metadata key 'a' \(byte 38\): the key is there twice"),
        ([entry(b"a", 13, bytes(8))], r"metadata key 'a' \(byte 33\): there is no value type 13"),
        ([entry(b"a", ARRAY, array(99, 1, b"1"))], r"key 'a' \(byte 37\): there is no value type 99"),
        (
            [entry(b"a", ARRAY, array(ARRAY, 0, b""))],
            r"key 'a' \(byte 37\): arrays of arrays are not supported",
        ),
        ([entry(b"a", U64, b"1234")], r"key 'a' \(byte 37\): it takes 8 bytes, but only 4 are left"),
        ([entry(b"a", STRING, u64(5) + b"four")], r"key 'a' \(byte 45\): it takes 5 bytes, but only 4"),
        (
            [entry(b"a", ARRAY, array(STRING, 2, string(b"xyz") + u64(9) + b"12345678"))],
            r"key 'a', string 1 \(byte 60\): it reaches past the end of the file",
        ),
        (
            [entry(b"a" * 90, ARRAY, array(STRING, 3, string(b"12345678") + string(b"12345678")))],
            r"key 'a{77}\.\.\.', string 2 \(byte 170\): it reaches past the end of the file",
        ),
        ([entry(b"general.alignment", U32, u32(0))], r"key 'general.alignment' is 0, not a power of two"),
        ([entry(b"general.alignment", U32, u32(48))], r"key 'general.alignment' is 48, not a power of two"),
        (
            [entry(b"general.alignment", I32, struct.pack("<i", -8))],
            r"'general.alignment' is -8, not a power",
        ),
        (
            [entry(b"general.alignment", STRING, string(b"32"))],
            r"'general.alignment' holds a string, not an int",
        ),
    ],
)
def test_metadata(path: Path, entries: list[bytes], message: str) -> None:
    refused(path, gguf_file(tuple(entries)), message)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([tensor(b"t" * 64)], r"tensor 't{64}' \(byte 24\): the name is longer than 63 bytes"),
        ([tensor(), tensor()], r"tensor 't' \(byte 57\): the name is there twice"),
        ([tensor(dims=(1,) * 5)], r"tensor 't' \(byte 24\): it has 5 dimensions, more than 4"),
        ([tensor(n_dims=2**32 - 1)], r"tensor 't' \(byte 24\): it has 4294967295 dimensions, more than 4"),
        ([tensor(dims=(8, 0))], r"tensor 't' \(byte 24\): shape \(0, 8\) has a dimension of zero"),
        ([tensor(number=4)], r"tensor 't' \(byte 24\): there is no tensor format 4"),
        ([tensor(number=2**32 - 1)], r"tensor 't' \(byte 24\): there is no tensor format 4294967295"),
        ([tensor(dims=(16, 2), number=2)], r"tensor 't' .* \(2, 16\) does not divide into Q4_0 blocks of 32"),
        ([tensor(dims=(), number=2)], r"tensor 't' .* shape \(\) does not divide into Q4_0 blocks of 32"),
        ([tensor(dims=(2**32, 2**32))], r"tensor 't' .* its 73786976294838206464 bytes .* past the end"),
        ([tensor(dims=(2**62,) * 4)], r"tensor 't' .* bytes from 96 reach past the end, at 128"),
        ([tensor(dims=(9,))], r"tensor 't' .* its 36 bytes from 64 reach past the end, at 96"),
        ([tensor(offset=64)], r"tensor 't' .* its 32 bytes from 128 reach past the end, at 96"),
        ([tensor(offset=2**64 - 32)], r"tensor 't' .* 32 bytes from 18446744073709551648 reach past"),
        ([tensor(offset=4)], r"tensor 't' \(byte 24\): its offset, 4, is not a multiple of 32"),
        ([tensor(), tensor(b"u")], r"'u' \(byte 57\): its offset is 0, the tensors before it end at 32"),
    ],
)
def test_tensors(path: Path, tensors: list[bytes], message: str) -> None:
    refused(path, gguf_file(tensors=tuple(tensors)), message)


def test_a_gap_between_tensors(path: Path) -> None:
    tensors = (tensor(b"t", (1,)), tensor(b"u", (1,), offset=64))
    refused(path, gguf_file(tensors=tensors, data=bytes(96)), "its offset is 64, the tensors before it end at 32")


@pytest.mark.parametrize("count", HUGE)
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("tensors", r"number of tensors \(byte 8\): {} items cannot fit in the \d+ bytes that follow"),
        (
            "entries",
            r"number of metadata entries \(byte 16\): {} items cannot fit in the \d+ bytes that follow",
        ),
        ("key", r"metadata entry 0, key \(byte 32\): it takes {} bytes, but only \d+ are left"),
        ("string", r"metadata key 'a' \(byte 45\): it takes {} bytes, but only \d+ are left"),
        ("numbers", r"metadata key 'a' \(byte 41\): {} items cannot fit in the \d+ bytes that follow"),
        ("strings", r"metadata key 'a' \(byte 41\): {} items cannot fit in the \d+ bytes that follow"),
        ("string in an array", r"key 'a', string 0 \(byte 49\): it reaches past the end of the file"),
        ("name", r"tensor 0, name \(byte 32\): it takes {} bytes, but only \d+ are left"),
    ],
)
def test_huge_counts_cost_nothing(path: Path, place: str, message: str, count: int) -> None:
    room = bytes(1000)
    content = {
        "tensors": gguf_file(n_tensors=count) + room,
        "entries": gguf_file(n_entries=count) + room,
        "key": gguf_file((u64(count) + room,)),
        "string": gguf_file((entry(b"a", STRING, u64(count) + room),)),
        "numbers": gguf_file((entry(b"a", ARRAY, array(F32, count, room)),)),
        "strings": gguf_file((entry(b"a", ARRAY, array(STRING, count, room)),)),
        "string in an array": gguf_file((entry(b"a", ARRAY, array(STRING, 2, u64(count) + room)),)),
        "name": gguf_file(tensors=(u64(count) + room,)),
    }
    refused(path, content[place], message.format(count))


def test_names_that_are_not_utf8_stay_readable(path: Path) -> None:
    path.write_bytes(gguf_file((entry(b"\xffkey", BOOL, b"\x02"),), (tensor(b"\xc3\x28"),)))
    with irkit.gguf.open(path) as file:
        assert dict(file.metadata) == {"\ufffdkey": True}
        assert file.dequantize("\ufffd(").tolist() == [0] * 8


def test_control_characters_do_not_reach_the_terminal(path: Path) -> None:
    path.write_bytes(gguf_file((entry(b"\x1b[2J", 77, b""),)))
    with pytest.raises(ModelFileError) as error:
        irkit.gguf.open(path)
    assert "\x1b" not in str(error.value)
    assert r"'\x1b[2J'" in str(error.value)


def test_paths_that_are_no_model_files(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    os.mkfifo(tmp_path / "pipe")
    for name, message in {
        "missing.gguf": "missing.gguf: the file does not exist",
        "empty.gguf": "empty.gguf: the file is empty",
        "": "is a directory, not a file",
        "pipe": "pipe: is not a regular file",
        "empty.gguf/inside": "cannot be read: .*Not a directory",
        "\0": "cannot be read: embedded null",
    }.items():
        with pytest.raises(ModelFileError, match=message):
            irkit.gguf.open(tmp_path / name)


numbers = st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1]) | st.integers(0, 300)
positions = st.integers(0, len(SOUND) - 1)
edits = st.lists(
    st.one_of(
        st.tuples(st.just("overwrite"), positions, st.binary(min_size=1, max_size=4)),
        st.tuples(st.just("overwrite"), positions, st.builds(u64, numbers)),
        st.tuples(st.just("overwrite"), positions, st.integers(0, 255).map(u32)),
        st.tuples(st.just("insert"), positions, st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("cut"), positions, st.binary(max_size=0)),
        st.tuples(st.just("remove"), positions, st.binary(min_size=1, max_size=40)),
    ),
    min_size=1,
    max_size=4,
)


def edited(changes: list[tuple[str, int, bytes]]) -> bytes:
    content = bytearray(SOUND)
    for kind, at, new in changes:
        match kind:
            case "overwrite":
                content[at : at + len(new)] = new
            case "insert":
                content[at:at] = new
            case "cut":
                del content[at:]
            case "remove":
                del content[at : at + len(new)]
    return bytes(content)


@settings(max_examples=1500)
@given(changes=edits)
@example(changes=[("overwrite", 8, u64(0))])
def test_any_damage_is_an_error_or_harmless(tmp_path_factory: pytest.TempPathFactory, changes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.gguf"
    content = edited(changes)
    path.write_bytes(content)
    tracemalloc.start()
    try:
        read_all(path)
    except ModelFileError as error:
        assert str(error).startswith(f"{path}: ")  # noqa: PT017 - both ways out are right
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 1 << 18
