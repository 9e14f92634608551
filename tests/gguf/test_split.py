"""Models in several files, as llama.cpp's gguf-split and the gguf package write them."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

import irkit
from irkit.errors import ModelFileError
from irkit.gguf import part_names


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """The first of the parts of a model with 5 tensors, two to a file but for the first, which has none."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2, small_first_shard=True)
    writer.add_description("whole")
    for number in range(5):
        writer.add_tensor(f"t{number}", np.full((3, 32), number, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "m-00001-of-00004.gguf"


def test_the_parts_are_one_model(split: Path) -> None:
    with irkit.gguf.open(split) as file:
        assert file.metadata["general.description"] == "whole"
        assert [file.dequantize(f"t{n}").tolist() for n in range(5)] == [np.full((3, 32), n).tolist() for n in range(5)]
        assert [info.part for info in file.tensors.values()] == [1, 1, 2, 2, 3]
        assert [path.name for path in file.paths] == part_names(split.name)
        assert file.size == sum(path.stat().st_size for path in split.parent.iterdir())
        file.forget("t4")
        assert file.dequantize("t4")[0, 0] == 4
    with pytest.raises(ValueError, match="released"):
        file.raw("t4")


def test_a_model_computes_the_same_in_parts(tiny_path: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    read = GGUFReader(tiny_path)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama", split_max_tensors=7)
    for field in read.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for tensor in read.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first = next(tmp_path.glob("tiny-00001-of-*.gguf"))
    with irkit.Session(tiny_path) as whole, irkit.Session(first) as parts:
        assert np.array_equal(whole.trace("he said", names=()).logits, parts.trace("he said", names=()).logits)
        assert parts.info().parameters == whole.info().parameters
        assert parts.info().size > first.stat().st_size


def _gone(split: Path) -> Path:
    split.with_name("m-00003-of-00004.gguf").unlink()
    return split


def _doubled(split: Path) -> Path:
    second, third = (split.with_name(f"m-0000{number}-of-00004.gguf") for number in (2, 3))
    content = second.read_bytes()
    third.write_bytes(content.replace(b"split.no\x02\x00\x00\x00\x01\x00", b"split.no\x02\x00\x00\x00\x02\x00"))
    return split


def _swapped(split: Path) -> Path:
    second, third = (split.with_name(f"m-0000{number}-of-00004.gguf") for number in (2, 3))
    second.write_bytes(third.read_bytes())
    return split


def _cut(split: Path) -> Path:
    last = split.with_name("m-00004-of-00004.gguf")
    last.write_bytes(last.read_bytes()[:-1])
    return split


def _miscounted(split: Path) -> Path:
    content = split.read_bytes()
    assert content.count(b"split.tensors.count\x05\x00\x00\x00\x05") == 1
    split.write_bytes(
        content.replace(b"split.tensors.count\x05\x00\x00\x00\x05", b"split.tensors.count\x05\x00\x00\x00\x06")
    )
    return split


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_gone, r"m-00003-of-00004\.gguf: the file does not exist"),
        (_doubled, r"m-00003-of-00004\.gguf: tensor 't0' is in another part as well"),
        (_swapped, r"m-00002-of-00004\.gguf: is not part 2 of 4"),
        (_cut, r"m-00004-of-00004\.gguf.*past the end"),
        (_miscounted, "the parts have 5 tensors, not as many"),
        (lambda split: split.with_name("m-00002-of-00004.gguf"), "the first is the one to open"),
        (lambda split: split.rename(split.with_name("m.gguf")), r"its name must end in -00001-of-00004\.gguf"),
    ],
)
def test_damaged_parts(split: Path, damage: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        irkit.gguf.open(damage(split))


@pytest.mark.parametrize(
    "name", ["m.gguf", "m-00000-of-00002.gguf", "m-00003-of-00002.gguf", "m-00001-of-99999.gguf", "-1-of-2.gguf"]
)
def test_what_is_no_part(name: str) -> None:
    assert part_names(name) == []
