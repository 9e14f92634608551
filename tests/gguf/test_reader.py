"""Reading sound files: small ones the `gguf` package wrote, and the real model as that package reads it."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import irkit.gguf
from irkit.errors import ModelFileError, OptionError, UnsupportedModelError

SCALARS = {
    "uint8": 200, "int8": -100, "uint16": 60000, "int16": -30000, "uint32": 4 * 10**9,
    "int32": -(2 * 10**9), "uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.5, "float64": 1e300,
    "bool": True, "string": "wörd ▁",
}  # fmt: skip
NUMBERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64")
TENSORS = {
    "weights": np.arange(6, dtype=np.float32).reshape(1, 2, 3),
    "halves": np.array([[1.5, -2], [65504, 6e-8]], np.float16),
    "whole numbers": np.array([1, -2, 3], np.int32),
}


def array_of(kind: str) -> np.ndarray:
    return np.array([0, 1, SCALARS[kind]], np.dtype(kind))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with every type of value, scalar and in arrays, and four tensors."""
    path = tmp_path / "written.gguf"
    writer = gguf.GGUFWriter(path, "test")
    for kind, value in SCALARS.items():
        getattr(writer, f"add_{kind}")(f"scalar.{kind}", value)
    for kind in NUMBERS:
        sub_type = gguf.GGUFValueType[kind.upper()]
        writer.add_key_value(f"array.{kind}", array_of(kind).tolist(), gguf.GGUFValueType.ARRAY, sub_type)
    writer.add_array("array.bool", [True, False, True])
    writer.add_array("array.string", ["", "a", "▁long" * 100])
    for name, values in TENSORS.items():
        writer.add_tensor(name, values)
    blocks = gguf.quants.quantize(
        np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64), gguf.GGMLQuantizationType.Q5_1
    )
    writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q5_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(path: Path) -> Iterator[irkit.gguf.File]:
    with irkit.gguf.open(path) as file:
        yield file


def test_scalars(file: irkit.gguf.File) -> None:
    for kind, value in SCALARS.items():
        read = file.metadata[f"scalar.{kind}"]
        assert read == value
        assert type(read) is type(value)


def test_arrays_of_numbers(file: irkit.gguf.File) -> None:
    for kind in NUMBERS:
        read = file.metadata.value(f"array.{kind}", np.ndarray)
        assert read.dtype == np.dtype(kind)
        assert np.array_equal(read, array_of(kind))
        assert not read.flags.writeable
        assert not read.flags.owndata


def test_arrays_of_bools_and_strings(file: irkit.gguf.File) -> None:
    read = file.metadata.value("array.bool", np.ndarray)
    assert read.dtype == bool
    assert read.tolist() == [True, False, True]
    assert file.metadata["array.string"] == ["", "a", "▁long" * 100]


def test_metadata_is_a_mapping_in_the_order_of_the_file(file: irkit.gguf.File, path: Path) -> None:
    keys = [key for key in gguf.GGUFReader(path).fields if not key.startswith("GGUF.")]
    assert list(file.metadata) == keys
    assert len(file.metadata) == len(keys)
    assert "scalar.int8" in file.metadata
    assert "scalar" not in file.metadata
    assert file.metadata.get("scalar") is None
    with pytest.raises(KeyError, match=r"scalar\.int"):
        file.metadata["scalar.int"]
    shown = repr(file.metadata).splitlines()
    assert "scalar.int8 = -100" in shown
    assert "array.int8 = [0, 1, -100]" in shown


@pytest.mark.parametrize(
    ("key", "kind", "expected"),
    [
        ("scalar.uint8", int, 200),
        ("scalar.uint8", float, 200.0),
        ("scalar.float32", float, 0.5),
        ("scalar.bool", bool, True),
        ("scalar.string", str, "wörd ▁"),
        ("array.string", list[str], ["", "a", "▁long" * 100]),
    ],
)
def test_typed_values(file: irkit.gguf.File, key: str, kind: type, expected: Any) -> None:
    read = file.metadata.value(key, kind)
    assert read == expected
    assert type(read) is type(expected)
    assert file.metadata.value("missing", kind, None) is None


@pytest.mark.parametrize(
    ("key", "kind", "message"),
    [
        ("scalar.bool", int, "'scalar.bool' holds true or false, not an integer"),
        ("scalar.float32", int, "'scalar.float32' holds a number, not an integer"),
        ("scalar.string", float, "'scalar.string' holds a string, not a number"),
        ("scalar.uint8", bool, "'scalar.uint8' holds an integer, not true or false"),
        ("array.int8", list[str], "'array.int8' holds an array of numbers, not an array of strings"),
        ("array.string", np.ndarray, "'array.string' holds an array of strings, not an array of numbers"),
        ("missing", str, "'missing' is missing"),
    ],
)
def test_typed_values_that_are_not(file: irkit.gguf.File, key: str, kind: type, message: str) -> None:
    with pytest.raises(ModelFileError, match=f"written.gguf: metadata key {message}"):
        file.metadata.value(key, kind)
    if key != "missing":
        with pytest.raises(ModelFileError, match=message):
            file.metadata.value(key, kind, None)


def test_tensors(file: irkit.gguf.File, path: Path) -> None:
    assert list(file.tensors) == [*TENSORS, "blocks"]
    assert [info.format for info in file.tensors.values()] == ["F32", "F16", "I32", "Q5_1"]
    for name in ("weights", "halves"):
        info, values = file.tensors[name], TENSORS[name]
        assert info == irkit.gguf.TensorInfo(name, values.shape, info.format, info.offset, values.nbytes)
        assert path.read_bytes()[info.offset : info.offset + info.nbytes] == values.tobytes()
        assert np.array_equal(file.dequantize(name), values.astype(np.float32))
    assert file.tensors["blocks"].shape == (2, 64)
    assert np.allclose(file.dequantize("blocks").ravel(), np.linspace(-1, 1, 128), atol=0.04)


def test_raw_is_a_view(file: irkit.gguf.File) -> None:
    raw = file.raw("weights")
    assert raw.dtype == np.uint8
    assert not raw.flags.owndata
    assert not raw.flags.writeable
    assert np.array_equal(raw.view("<f4"), TENSORS["weights"].ravel())


@pytest.mark.parametrize("odd", ["", "a\0b", "\0" * 9, "x" * 256, "y" * 70000, "\x07" + "\0" * 7, "Ġ▁wörd", None])
@pytest.mark.parametrize("at", [0, 1, 1500, 2999])
def test_a_long_list_is_read_as_a_short_one_is(tmp_path: Path, odd: str | None, at: int) -> None:
    """Long lists are read many strings at a time, as far as these are short and hold no zeros."""
    strings = [f"token {number} ▁" for number in range(3000)]
    if odd is not None:
        strings[at] = odd
    path = tmp_path / "strings.gguf"
    writer = gguf.GGUFWriter(path, "test")
    writer.add_array("strings", strings)
    writer.add_uint32("after", 7)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with irkit.gguf.open(path) as file:
        assert file.metadata["strings"] == strings
        assert file.metadata["after"] == 7
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"token 1500 ", b"token \xff500 "))
    with irkit.gguf.open(path) as file:
        expected = [text.replace("token 1500", "token \ufffd500") for text in strings]
        assert file.metadata["strings"] == expected
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ModelFileError):
        irkit.gguf.open(path)


def test_dequantize_into_given_memory(file: irkit.gguf.File) -> None:
    out = np.empty((2, 2), np.float32)
    assert file.dequantize("halves", out=out) is out
    assert np.array_equal(out, TENSORS["halves"].astype(np.float32))
    with pytest.raises(OptionError, match="out: must be"):
        file.dequantize("weights", out=out)


def test_a_format_that_cannot_be_dequantized_still_opens(file: irkit.gguf.File) -> None:
    assert file.tensors["whole numbers"].shape == (3,)
    assert file.raw("whole numbers").view("<i4").tolist() == [1, -2, 3]
    with pytest.raises(UnsupportedModelError, match="I32 cannot be dequantized; supported are F32"):
        file.dequantize("whole numbers")


@pytest.mark.parametrize("ask", [irkit.gguf.File.tensor, irkit.gguf.File.raw, irkit.gguf.File.dequantize])
def test_a_tensor_that_is_not_there(file: irkit.gguf.File, ask: Any) -> None:
    with pytest.raises(ModelFileError, match=r"written.gguf: there is no tensor 'wieghts'; near are 'weights'"):
        ask(file, "wieghts")


def test_arrays_outlive_the_file(path: Path) -> None:
    with irkit.gguf.open(path) as file:
        raw, array = file.raw("weights"), file.metadata.value("array.uint16", np.ndarray)
    assert np.array_equal(raw.view("<f4"), TENSORS["weights"].ravel())
    assert np.array_equal(array, array_of("uint16"))
    for ask in (lambda: file.raw("weights"), lambda: file.metadata["scalar.int8"]):
        with pytest.raises(ValueError, match="released"):
            ask()
    file.close()


def test_version_2_has_the_same_layout(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:4] + (2).to_bytes(4, "little") + content[8:])
    with irkit.gguf.open(str(path)) as file:
        assert file.version == 2
        assert file.metadata["scalar.string"] == "wörd ▁"
        assert np.array_equal(file.dequantize("weights"), TENSORS["weights"])


@pytest.mark.parametrize("alignment", [1, 8, 256])
def test_alignment(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "aligned.gguf"
    writer = gguf.GGUFWriter(path, "test")
    writer.add_custom_alignment(alignment)
    tensors = {name: np.full(3 + i, i, np.float32) for i, name in enumerate("abc")}
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with irkit.gguf.open(path) as file:
        for name, values in tensors.items():
            assert file.tensors[name].offset % alignment == 0
            assert np.array_equal(file.dequantize(name), values)


def test_a_file_of_a_vocabulary_alone(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([b"a", b"\xff\xfe", "▁".encode()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with irkit.gguf.open(path) as file:
        assert not file.tensors
        assert file.metadata["general.architecture"] == "llama"
        assert file.metadata["tokenizer.ggml.tokens"] == ["a", "\ufffd\ufffd", "▁"]


def test_the_real_model_as_the_gguf_package_reads_it(model_path: Path) -> None:
    theirs = gguf.GGUFReader(model_path)
    with irkit.gguf.open(model_path) as file:
        fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
        assert list(file.metadata) == list(fields)
        for key, field in fields.items():
            ours = file.metadata[key]
            assert (ours.tolist() if isinstance(ours, np.ndarray) else ours) == field.contents(), key
        assert len(file.metadata.value("tokenizer.ggml.tokens", list[str])) == 49152
        assert list(file.tensors) == [tensor.name for tensor in theirs.tensors]
        for tensor in theirs.tensors:
            shape = tuple(tensor.shape.tolist())[::-1]
            expected = (tensor.name, shape, tensor.tensor_type.name, tensor.data_offset, tensor.n_bytes)
            info = file.tensors[tensor.name]
            assert (info.name, info.shape, info.format, info.offset, info.nbytes) == expected
        for tensor in (t for t in theirs.tensors if t.name in ("token_embd.weight", "blk.7.attn_k.weight")):
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(file.dequantize(tensor.name).view(np.uint32), values.view(np.uint32))


def test_opening_the_real_model_decodes_nothing(model_path: Path) -> None:
    """Its strings alone would take 10 MB: what opening costs is not a matter of the vocabulary's memory."""
    tracemalloc.start()
    try:
        file = irkit.gguf.open(model_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    file.close()
    assert peak < 1 << 19
