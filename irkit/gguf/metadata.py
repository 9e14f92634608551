"""The key-value part of a GGUF file: checked when the file is opened, decoded when a value is asked for.

Source of the layout: the GGUF specification (docs/gguf.md in ggml-org/ggml).
"""

import reprlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, get_origin, overload

import numpy as np
import numpy.typing as npt

from irkit.errors import ModelFileError
from irkit.gguf.cursor import U32, U64, Cursor, shown, string_starts

Value: TypeAlias = int | float | bool | str | npt.NDArray[Any] | list[str]

_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS = {
    number: np.dtype(code)
    for number, code in {
        0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "u1",
        10: "<u8", 11: "<i8", 12: "<f8",
    }.items()
}  # fmt: skip
# What the shortest key (one byte) with the shortest value takes.
SMALLEST_ENTRY = U64.size + 1 + U32.size + 1

_KINDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "an array of strings",
    np.ndarray: "an array of numbers",
}
_REQUIRED: Any = object()

_T = TypeVar("_T")
_D = TypeVar("_D")


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a value lies: bytes `start` to `stop`; of an array, `type` is that of its `count` items."""

    type: int
    start: int
    stop: int
    count: int | None


class Metadata(Mapping[str, Value]):
    """The metadata of a GGUF file, by key.

    Values are `int`, `float`, `bool`, `str`, `list[str]`, or a one-dimensional numpy array (a read-only view
    of the file, unless of bools). They are decoded anew each time: keep a long list, do not ask for it twice.
    """

    def __init__(self, path: Path, data: memoryview, entries: Mapping[str, Entry]) -> None:
        self._path = path
        self._data = data
        self._entries = entries

    def __getitem__(self, key: str) -> Value:
        entry = self._entries[key]
        raw = self._data[entry.start : entry.stop]
        if entry.type == _STRING:
            return str(raw, "utf-8", "replace") if entry.count is None else _strings(bytes(raw), entry.count)
        numbers = np.frombuffer(raw, _NUMBERS[entry.type])
        if entry.type == _BOOL:
            numbers = numbers != 0
        return numbers[0].item() if entry.count is None else numbers

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __repr__(self) -> str:
        plain = ((key, value.tolist() if isinstance(value, np.ndarray) else value) for key, value in self.items())
        return "\n".join(f"{key} = {reprlib.repr(value)}" for key, value in plain)

    @overload
    def value(self, key: str, kind: type[_T]) -> _T: ...

    @overload
    def value(self, key: str, kind: type[_T], default: _D) -> _T | _D: ...

    def value(self, key: str, kind: type[Any], default: Any = _REQUIRED) -> Any:
        """The value of `key`, if it is of a `kind`; `default`, if it is given and the key is missing.

        Args:
            key: The full name of the key.
            kind: `int`, `float` (an integer counts too, and becomes one), `bool`, `str`, `list[str]` or
                `np.ndarray`.
            default: What stands for a missing key, of whatever type.

        Raises:
            ModelFileError: If the value is of another kind, or missing and there is no `default`.
        """
        if key not in self:
            if default is _REQUIRED:
                raise ModelFileError(f"{self._path}: metadata key {shown(key)} is missing")
            return default
        value = self[key]
        wanted = get_origin(kind) or kind
        if wanted is float and type(value) is int:
            return float(value)
        if type(value) is not wanted:
            raise ModelFileError(
                f"{self._path}: metadata key {shown(key)} holds {_KINDS[type(value)]}, not {_KINDS[wanted]}"
            )
        return value


def read_metadata(cursor: Cursor, count: int) -> dict[str, Entry]:
    """Moves `cursor` past `count` entries, and returns where the value of each key lies.

    Raises:
        ModelFileError: If anything in them is not what the format allows.
    """
    entries: dict[str, Entry] = {}
    for index in range(count):
        start = cursor.position
        where = f"metadata entry {index}"
        key = cursor.string(f"{where}, key")
        if not key:
            raise cursor.error(where, start, "the key is empty")
        where = f"metadata key {shown(key)}"
        if key in entries:
            raise cursor.error(where, start, "the key is there twice")
        entries[key] = _read_entry(cursor, where)
    return entries


def _read_entry(cursor: Cursor, where: str) -> Entry:
    at = cursor.position
    kind = cursor.number(U32, f"{where}, type")
    is_array = kind == _ARRAY
    if is_array:
        at = cursor.position
        kind = cursor.number(U32, f"{where}, type of the items")
        if kind == _ARRAY:
            raise cursor.error(where, at, "arrays of arrays are not supported")
    if kind != _STRING and kind not in _NUMBERS:
        raise cursor.error(where, at, f"there is no value type {kind}")
    width = U64.size if kind == _STRING else _NUMBERS[kind].itemsize
    if is_array:
        count = cursor.count(width, where)
        start = cursor.position
        if kind == _STRING:
            cursor.skip_strings(count, where)
        else:
            cursor.skip(count * width, where)
    else:
        count = None
        start = cursor.skip(cursor.number(U64, where) if kind == _STRING else width, where)
    return Entry(kind, start, cursor.position, count)


def _strings(raw: bytes, count: int) -> list[str]:
    # Nearly always each length can be made one byte of zero, which separates what is then decoded in one piece.
    starts = string_starts(memoryview(raw))
    if len(starts) == count:
        text = np.frombuffer(raw, np.uint8).copy()
        text[starts] = 0
        kept = text != 0
        if np.count_nonzero(kept) == len(raw) - U64.size * count:
            kept[starts] = True
            with suppress(UnicodeDecodeError):
                return str(text[kept].data, "utf-8").split("\0")[1:]
    strings = []
    position = 0
    for _ in range(count):
        start = position + U64.size
        position = start + U64.unpack_from(raw, position)[0]
        strings.append(raw[start:position].decode("utf-8", "replace"))
    return strings
