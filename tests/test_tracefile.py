"""Traces in files: every bit comes back, and nothing but a sound file is taken."""

import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import irkit
from irkit import tracefile
from irkit.errors import ModelFileError, OptionError
from irkit.trace import Largest, Provenance, Trace, Value

N_LAYERS, D_MODEL, D_VOCAB = 3, 4, 7
IDS = [[5, 1, 2, 6], [3, 4]]
STRINGS = [["<s>", " a", "\n", "é"], ["b", " c"]]


def make(path: str = "", logits: bool = True, seed: int = 0) -> Trace:
    """A trace of two texts: patterns of two layers, a lens, positions' means, and something that is in no layer."""
    rng = np.random.default_rng(seed)

    def numbers(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    pattern = {f"blocks.{i}.attn.hook_pattern": numbers(2, 1, 4, 4) for i in (0, 2)}
    pattern["blocks.0.attn.hook_pattern"][0, 0, 0, :3] = -0.0, np.inf, np.float32(1e-45)
    lens = {
        f"blocks.{i}.hook_resid_post": Largest(numbers(2, 4, 3), rng.integers(0, D_VOCAB, (2, 4, 3)).astype(np.int32))
        for i in range(N_LAYERS)
    }
    arrays: dict[str, Value] = {**pattern, **lens, "blocks.1.hook_mlp_out": numbers(2, 1, D_MODEL)}
    arrays |= {"hook_embed": numbers(2, 4, D_MODEL), "blocks.2.ln1.hook_scale": numbers(2, 4, 1)}
    source = Provenance(
        "small", path, "exact", names=("attn.hook_pattern", "hook_resid_post"), heads={"attn.hook_pattern": (3,)},
        reduce={"hook_resid_post": "lens", "hook_mlp_out": "mean"}, edits=("scale('z', strength=0.0, layers=1)",),
    )  # fmt: skip
    kept = numbers(2, 4, D_VOCAB) if logits else None
    values = {name: (lambda value=value: value) for name, value in arrays.items()}
    return Trace(IDS, STRINGS, values, lambda: kept, source, N_LAYERS, 1234)


def same(one: Value, other: Value) -> bool:
    if isinstance(one, Largest) or isinstance(other, Largest):
        return type(one) is type(other) and all(map(same, one, other))
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    make().save(tmp_path / "t.safetensors")
    return tmp_path / "t.safetensors"


def test_every_bit_comes_back(file: Path) -> None:
    made, found = make(), irkit.load_trace(file)
    assert list(found) == list(made)
    assert all(same(found[name], made[name]) for name in made)
    assert same(found.logits, made.logits)
    assert (found.ids, found.strings, found.n_layers) == (made.ids, made.strings, N_LAYERS)
    assert found.nbytes == sum(array.nbytes for array in load_file(file).values())
    assert found.provenance.edits == made.provenance.edits
    assert found.provenance.reduce == made.provenance.reduce


def test_short_names_and_rows_as_before(file: Path) -> None:
    made, found = make(), irkit.load_trace(file)
    for key in ("pattern", ("pattern", -1), ("resid_post", 1), "resid_post", "embed", ("scale", 2, "ln1")):
        assert same(found[key], made[key])
    assert found.layers("pattern") == (0, 2)
    for row in (0, 1):
        assert same(found.row(row)["pattern"], made.row(row)["pattern"])
        assert same(found.row(row).logits, made.row(row).logits)
        found.row(row).save(file.with_name("row"))
        assert same(irkit.load_trace(file.with_name("row"))["resid_post"], made.row(row)["resid_post"])


def test_one_token_of_an_answer(tmp_path: Path) -> None:
    pattern = np.full((1, 2, 1, 9), 1 / 9, np.float32)
    source = Provenance("small", "", "fast", ("attn.hook_pattern",), positions=(8,))
    values = {"blocks.1.attn.hook_pattern": lambda: pattern}
    Trace([[4]], [[" x"]], values, lambda: None, source, 2, 0).save(tmp_path / "t")
    found = irkit.load_trace(tmp_path / "t")
    assert same(found["pattern", 1], pattern)
    assert not found.has_logits
    assert found.to_frame("pattern").index.get_level_values("token").tolist() == [" x", " x"]


def test_the_models_digest(tmp_path: Path) -> None:
    model = tmp_path / "folder" / "model.gguf"
    model.parent.mkdir()
    model.write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    made = make(str(model))
    made.save(tmp_path / "t")
    assert made.provenance.sha256 == digest
    found = irkit.load_trace(tmp_path / "t")
    assert (found.provenance.sha256, found.provenance.path) == (digest, "model.gguf")
    assert str(tmp_path).encode() not in (tmp_path / "t").read_bytes()
    found.save(tmp_path / "again")
    assert irkit.load_trace(tmp_path / "again").provenance.sha256 == digest


def test_the_document_names_what_was_asked_for(file: Path) -> None:
    header = file.read_bytes()
    document = json.loads(json.loads(header[8 : 8 + struct.unpack("<Q", header[:8])[0]])["__metadata__"]["irkit.trace"])
    assert (document["irkit"], document["model"], document["precision"]) == (irkit.__version__, "small", "exact")
    assert document["spec"]["layers"]["attn.hook_pattern"] == [0, 2]
    assert document["spec"]["heads"] == {"attn.hook_pattern": [3]}
    assert document["spec"]["k"] == {"hook_resid_post": 3}
    assert document["sha256"] == ""


def test_opens_without_jax(file: Path) -> None:
    code = f"""
import sys, irkit
t = irkit.load_trace({str(file)!r})
t["pattern"], t.logits
assert "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_file_is_replaced_whole_or_not_at_all(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = irkit.load_trace(file)
    make(seed=1).save(file)
    assert same(opened["pattern"], make()["pattern"])  # what is open stays what it was
    before = file.read_bytes()

    def full(*arguments: Any) -> None:
        Path(arguments[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OptionError, match="No space left"):
        make().save(file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be written"):
        make().save(tmp_path / "nowhere" / "t")


@pytest.mark.parametrize("name", ["nothing", "."])
def test_no_such_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelFileError, match="not a file of irkit's traces"):
        irkit.load_trace(tmp_path / name)


def opened(content: bytes, folder: Path) -> Trace:
    """The trace in a file of this content, every array of it read."""
    path = folder / "fuzzed"
    path.write_bytes(content)
    trace = irkit.load_trace(path)
    for name in trace:
        trace[name]
    if trace.has_logits:
        trace.logits  # noqa: B018
    return trace


FUZZ = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(cut=st.floats(0, 1, exclude_max=True))
def test_truncated_files(file: Path, cut: float) -> None:
    content = file.read_bytes()
    with pytest.raises(ModelFileError):
        opened(content[: int(cut * len(content))], file.parent)


@FUZZ
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), head=st.booleans())
@example(place=0.0, bit=0, head=True)
@example(place=0.999999, bit=7, head=False)
def test_a_flipped_bit_is_found(file: Path, place: float, bit: int, head: bool) -> None:
    content = bytearray(file.read_bytes())
    size = 8 + struct.unpack("<Q", content[:8])[0]
    at = int(place * size) if head else size + int(place * (len(content) - size))
    content[at] ^= 1 << bit
    try:
        trace = opened(bytes(content), file.parent)
    except ModelFileError:
        return
    made = make()  # padding of the header, or the order of keys: nothing that is read
    assert list(trace) == list(made)
    assert all(same(trace[name], made[name]) for name in made)
    assert trace.provenance.edits == made.provenance.edits


@FUZZ
@given(content=st.binary(max_size=200), length=st.integers(0, (1 << 64) - 1))
def test_wild_bytes(tmp_path: Path, content: bytes, length: int) -> None:
    for tried in (content, struct.pack("<Q", length) + content, struct.pack("<Q", len(content)) + content):
        with pytest.raises(ModelFileError):
            opened(tried, tmp_path)


NUMBERS = st.integers(-2, 9) | st.integers(-(1 << 70), 1 << 70)
WILD = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@FUZZ
@given(data=st.data(), dtype=st.sampled_from(["F32", "I32", "BF16", "F64", "F4", "x"]))
def test_wild_headers(tmp_path: Path, data: st.DataObject, dtype: str) -> None:
    tensor = {"dtype": dtype, "shape": data.draw(st.lists(NUMBERS, max_size=4)), "data_offsets": data.draw(WILD)}
    header = {"__metadata__": data.draw(WILD), "blocks.0.hook_resid_post": tensor, data.draw(st.text(max_size=3)): 1}
    text = json.dumps(header).encode()
    with pytest.raises(ModelFileError):
        opened(struct.pack("<Q", len(text)) + text + bytes(64), tmp_path)


def forge(file: Path, change: Callable[[Any], None], arrays: dict[str, np.ndarray] | None = None) -> bytes:
    """The file with its document changed, and its checksum right."""
    header = file.read_bytes()
    document = json.loads(json.loads(header[8 : 8 + struct.unpack("<Q", header[:8])[0]])["__metadata__"]["irkit.trace"])
    change(document)
    text = json.dumps(document)
    forged = file.with_name("forged")
    metadata = {"irkit.trace": text, "crc32": str(zlib.crc32(text.encode()))}
    save_file(load_file(file) if arrays is None else arrays, forged, metadata)
    return forged.read_bytes()


@FUZZ
@given(data=st.data())
def test_wild_documents(file: Path, data: st.DataObject) -> None:
    def change(document: Any) -> None:
        for _ in range(data.draw(st.integers(1, 3))):
            place = document
            while True:
                keys = list(place) if isinstance(place, dict) else range(len(place))
                key = data.draw(st.sampled_from(list(keys)))
                if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
                    break
                place = place[key]
            place[key] = data.draw(WILD)

    with_change = forge(file, change)
    try:
        trace = opened(with_change, file.parent)
    except ModelFileError:
        return
    for row in range(len(trace.ids)):
        assert repr(trace.row(row))
    assert trace._repr_html_()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=2), "format"),
        (lambda d: d.update(new=1), "new"),
        (lambda d: d.update(n_layers=2), "a layer beyond its 2"),
        (lambda d: d["ids"][0].append(1), "differ in number"),
        (lambda d: d["crc32"].pop("logits"), "not those that its metadata names"),
        (lambda d: d["spec"].update(positions=[0]), "has the shape"),
        (lambda d: d["spec"]["heads"].update({"attn.hook_pattern": [1, 2]}), "has the shape"),
        (lambda d: d["spec"]["reduce"].pop("hook_resid_post"), "not those that its metadata names"),
        (lambda d: d["spec"]["k"].update(hook_resid_post=9), "has the shape"),
    ],
)
def test_what_does_not_agree_is_refused(file: Path, change: Callable[[Any], None], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        opened(forge(file, change), file.parent)


def test_other_arrays_than_were_saved_are_found_when_read(file: Path) -> None:
    arrays = load_file(file)
    arrays["hook_embed"] = arrays["hook_embed"] + 1
    file.write_bytes(forge(file, lambda document: None, arrays))
    trace = irkit.load_trace(file)
    assert same(trace["pattern"], make()["pattern"])
    with pytest.raises(ModelFileError, match="hook_embed is damaged"):
        trace["embed"]
    arrays["hook_embed"] = arrays["hook_embed"].astype(np.float64)
    with pytest.raises(ModelFileError, match="type F64"):
        opened(forge(file, lambda document: None, arrays), file.parent)


def test_a_foreign_safetensors_file(tmp_path: Path) -> None:
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match=r"its metadata has no irkit\.trace"):
        irkit.load_trace(tmp_path / "model.safetensors")


def test_a_trace_without_arrays(tmp_path: Path) -> None:
    kept = np.ones((1, 1, 3), np.float32)
    Trace([[1]], [["a"]], {}, lambda: kept, Provenance("m", "", "fast"), 2, 0).save(tmp_path / "t")
    found = irkit.load_trace(tmp_path / "t")
    assert len(found) == 0
    assert same(found.logits, kept)
    assert tracefile.load_trace(str(tmp_path / "t")).has_logits
