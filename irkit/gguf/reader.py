"""Opening a GGUF file: its metadata, its table of tensors, and the tensors' bytes.

Source of the layout: the GGUF specification (docs/gguf.md in ggml-org/ggml). The file is mapped, not read,
and its whole structure is checked on opening: nothing a `File` is asked for later can lie outside it.
"""

import difflib
import math
import mmap
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import numpy as np

from irkit.errors import ModelFileError
from irkit.gguf.cursor import U32, U64, Cursor, shown
from irkit.gguf.formats import BY_NUMBER
from irkit.gguf.metadata import SMALLEST_ENTRY, Metadata, read_metadata
from irkit.gguf.quants import Bytes, Floats, dequantize

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_LONGEST_NAME = 63
_PART = re.compile(r"-([0-9]{5})-of-([0-9]{5})\.gguf", re.IGNORECASE)
_MOST_PARTS = 999
# What a tensor with an empty name and no dimensions takes in the table.
_SMALLEST_TENSOR = U64.size + U32.size + U32.size + U64.size


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file.

    `shape` is in numpy's order (the reverse of the file's), `format` its GGUF name, such as "Q4_K"; its bytes
    are the `nbytes` from byte `offset` of the file, which in a split model is its `part`, counted from 0.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    offset: int
    nbytes: int
    part: int = 0


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class File:
    """An open GGUF file; a context manager.

    `version` is the GGUF version, `metadata` holds the values by key, `tensors` the tensors by name, in the
    file's order. Arrays made from a file stay valid after it is closed; anything else is then a `ValueError`.

    A model that was split into several files is one `File`: `paths` are its parts, the first of them `path`, and
    `size` is the bytes of all.
    """

    path: Path
    version: int
    metadata: Metadata
    tensors: Mapping[str, TensorInfo]
    paths: tuple[Path, ...]
    size: int
    _parts: tuple[memoryview, ...]

    def tensor(self, name: str) -> TensorInfo:
        """What `tensors` holds for `name`.

        Raises:
            ModelFileError: If there is no such tensor; the message gives the nearest names.
        """
        if name not in self.tensors:
            near = difflib.get_close_matches(name, self.tensors)
            hint = f"; near are {', '.join(map(shown, near))}" if near else ""
            raise ModelFileError(f"{self.path}: there is no tensor {shown(name)}{hint}")
        return self.tensors[name]

    def raw(self, name: str) -> Bytes:
        """The bytes of a tensor, as a read-only view of the file: uint8 [nbytes].

        Raises:
            ModelFileError: If there is no such tensor.
        """
        info = self.tensor(name)
        return np.frombuffer(self._parts[info.part][info.offset : info.offset + info.nbytes], np.uint8)

    def forget(self, name: str) -> None:
        """Give the memory of a tensor's pages back to the system, which reads them anew if they are looked at again.

        Does nothing on systems that know no such advice.

        Raises:
            ModelFileError: If there is no such tensor.
        """
        info = self.tensor(name)
        first = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (info.offset + info.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
        mapped = self._parts[info.part].obj
        if size > 0 and isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED, first, size)

    def dequantize(self, name: str, out: Floats | None = None) -> Floats:
        """The values of a tensor: float32, of the tensor's shape; written to `out`, if given.

        Raises:
            ModelFileError: If there is no such tensor.
            UnsupportedModelError: If there is no code for the tensor's format.
            OptionError: If `out` is not a writeable, C-contiguous float32 array of the tensor's shape.
        """
        info = self.tensor(name)
        return dequantize(self.raw(name), info.format, info.shape, out)

    def close(self) -> None:
        """Lets go of the file; what arrays still look at stays mapped until the last of them is gone."""
        for part in self._parts:
            part.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"<GGUF version {self.version}, {str(self.path)!r}: "
            f"{len(self.metadata)} metadata keys, {len(self.tensors)} tensors>"
        )


def open(path: str | os.PathLike[str]) -> File:
    """Opens a GGUF file of version 2 or 3; one that holds only a vocabulary, and no tensors, is fine.

    The parts of a split model lie beside the first of them, which is the one to open.

    Raises:
        ModelFileError: If there is no file, or anything in it is not what the format allows; the message says
            which part, and at which byte.
    """
    path = Path(path)
    first = _open_part(path)
    count = first.metadata.value("split.count", int, 0)
    if count <= 1:
        return first
    if first.metadata.value("split.no", int) != 0:
        raise ModelFileError(f"{path}: is one part of a split model; the first is the one to open")
    names = part_names(path.name)
    if len(names) != count or path.name != names[0]:
        raise ModelFileError(
            f"{path}: is the first of {count} parts of a model, so its name must end in -00001-of-{count:05}.gguf"
        )
    tensors = dict(first.tensors)
    parts = [first]
    for number, name in enumerate(names[1:], 1):
        part = _open_part(path.with_name(name))
        if (part.metadata.value("split.no", int), part.metadata.value("split.count", int)) != (number, count):
            raise ModelFileError(f"{part.path}: is not part {number + 1} of {count} of a model")
        if twice := tensors.keys() & part.tensors.keys():
            raise ModelFileError(f"{part.path}: tensor {shown(min(twice))} is in another part as well")
        tensors |= {name: replace(info, part=number) for name, info in part.tensors.items()}
        parts.append(part)
    if first.metadata.value("split.tensors.count", int, len(tensors)) != len(tensors):
        raise ModelFileError(f"{path}: the parts have {len(tensors)} tensors, not as many as split.tensors.count says")
    return replace(
        first,
        tensors=MappingProxyType(tensors),
        paths=tuple(part.path for part in parts),
        size=sum(part.size for part in parts),
        _parts=tuple(part._parts[0] for part in parts),
    )


def part_names(name: str) -> list[str]:
    """The names of all files of the split model that the file `name` is a part of; none if it is no such part."""
    found = _PART.search(name)
    if not found or found.end() != len(name) or not 0 < int(found[1]) <= int(found[2]) <= _MOST_PARTS:
        return []
    return [f"{name[: found.start()]}-{i:05}-of-{found[2]}{name[-5:]}" for i in range(1, int(found[2]) + 1)]


def _open_part(path: Path) -> File:
    cursor = Cursor(path, _map(path))
    version = _read_version(cursor)
    tensor_count = cursor.count(_SMALLEST_TENSOR, "number of tensors")
    entry_count = cursor.count(SMALLEST_ENTRY, "number of metadata entries")
    metadata = Metadata(path, cursor.data, read_metadata(cursor, entry_count))
    alignment = metadata.value("general.alignment", int, 32)
    if alignment <= 0 or alignment & (alignment - 1):
        raise ModelFileError(f"{path}: metadata key 'general.alignment' is {alignment}, not a power of two")
    tensors = MappingProxyType(_read_tensors(cursor, tensor_count, alignment))
    return File(path, version, metadata, tensors, (path,), len(cursor.data), (cursor.data,))


def _map(path: Path) -> memoryview:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ModelFileError(f"{path}: is a directory, not a file")
        # Opening a pipe or a device could block, or never end.
        if not stat.S_ISREG(status.st_mode):
            raise ModelFileError(f"{path}: is not a regular file")
        if not status.st_size:
            raise ModelFileError(f"{path}: the file is empty")
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError:
        raise ModelFileError(f"{path}: the file does not exist") from None
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot be read: {error}") from None


def _read_version(cursor: Cursor) -> int:
    magic = bytes(cursor.data[: len(_MAGIC)])
    if magic != _MAGIC:
        raise cursor.error("magic", 0, f"a GGUF file begins with {_MAGIC}, this one with {magic}")
    cursor.skip(len(_MAGIC), "magic")
    at = cursor.position
    version = cursor.number(U32, "version")
    if version & 0xFFFF == 0:
        raise cursor.error("version", at, "big-endian byte order is not supported, only little-endian")
    if version not in _VERSIONS:
        raise cursor.error("version", at, f"GGUF version {version} is not supported, only 2 and 3")
    return version


def _read_tensors(cursor: Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    rows = [(cursor.position, _read_tensor(cursor, index)) for index in range(count)]
    base = _padded(cursor.position, alignment)
    end = 0
    tensors: dict[str, TensorInfo] = {}
    for at, row in rows:
        where = f"tensor {shown(row.name)}"
        if row.name in tensors:
            raise cursor.error(where, at, "the name is there twice")
        if row.offset % alignment:
            raise cursor.error(where, at, f"its offset, {row.offset}, is not a multiple of {alignment}")
        info = replace(row, offset=base + row.offset)
        if info.offset + info.nbytes > len(cursor.data):
            problem = f"its {info.nbytes} bytes from {info.offset} reach past the end, at {len(cursor.data)}"
            raise cursor.error(where, at, problem)
        if row.offset != end:
            raise cursor.error(where, at, f"its offset is {row.offset}, the tensors before it end at {end}")
        end = _padded(row.offset + row.nbytes, alignment)
        tensors[row.name] = info
    return tensors


def _read_tensor(cursor: Cursor, index: int) -> TensorInfo:
    """Reads a row of the table of tensors; its offset counts from the end of the table, padded."""
    at = cursor.position
    name = cursor.string(f"tensor {index}, name")
    where = f"tensor {shown(name)}"
    if cursor.position - at - U64.size > _LONGEST_NAME:
        raise cursor.error(where, at, f"the name is longer than {_LONGEST_NAME} bytes")
    dimensions = cursor.number(U32, f"{where}, number of dimensions")
    if dimensions > _MOST_DIMENSIONS:
        raise cursor.error(where, at, f"it has {dimensions} dimensions, more than {_MOST_DIMENSIONS}")
    shape = tuple(cursor.number(U64, f"{where}, dimensions") for _ in range(dimensions))[::-1]
    if 0 in shape:
        raise cursor.error(where, at, f"shape {shape} has a dimension of zero")
    number = cursor.number(U32, f"{where}, format")
    known = BY_NUMBER.get(number)
    if known is None:
        raise cursor.error(where, at, f"there is no tensor format {number}")
    blocks, rest = divmod(math.prod(shape), known.block_size)
    if rest or (shape and shape[-1] % known.block_size):
        problem = f"shape {shape} does not divide into {known.name} blocks of {known.block_size}"
        raise cursor.error(where, at, problem)
    offset = cursor.number(U64, f"{where}, offset")
    return TensorInfo(name, shape, known.name, offset, blocks * known.block_bytes)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
