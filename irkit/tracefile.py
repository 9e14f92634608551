"""Traces in files: safetensors, the arrays under their full hook names, and one JSON document as metadata.

The document, under the key `irkit.trace`, says which model, text, hook points and edits the arrays come from, and has
a checksum of each array; the key `crc32` has the document's own. What a reducer left as two arrays, values and
indices, is stored under the hook's name with `.values` and `.indices` behind it. The container is described at
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from irkit.errors import ModelFileError, OptionError
from irkit.trace import Largest, Provenance, Trace, Value, kept_axes

_KEY, _CHECKSUM = "irkit.trace", "crc32"
_LOGITS = "logits"
_TYPES = {"float32": "F32", "int32": "I32"}
_PAIRS = ("top_k", "lens")
"""The reducers that leave two arrays."""

Numbers = tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...]
Point = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_.]*$", max_length=64)]


class _Spec(BaseModel):
    """What was captured: the words of `Session.trace`, the layers and k by hook point."""

    model_config = ConfigDict(extra="forbid", strict=True)

    names: tuple[Point, ...]
    layers: dict[Point, Numbers]
    """Without the hook points that are in no layer."""
    heads: dict[Point, Numbers]
    positions: Numbers | None
    reduce: dict[Point, Literal["last", "mean", "norm", "entropy", "top_k", "lens"]]
    k: dict[Point, int]


class _Document(BaseModel):
    """The metadata of a trace's file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[1]
    irkit: str
    """The version that wrote it."""
    model: str
    file: str
    """The name of the model's file."""
    sha256: str
    """Of the model's file; empty where it was gone when the trace was saved."""
    precision: str
    n_layers: int = Field(ge=1, le=1 << 16)
    ids: tuple[Numbers, ...] = Field(min_length=1)
    strings: tuple[tuple[str, ...], ...]
    spec: _Spec
    edits: tuple[str, ...]
    """What was changed in the pass, in words."""
    crc32: dict[str, int]
    """Of each array: of its type and shape, written `F32 [1, 9, 14, 14]`, and then its bytes."""


def save(trace: Trace, path: str | Path) -> None:
    """Write `trace` into a file, which is there whole or not at all; what was there before is replaced.

    The sha256 of the model's file is worked out on the way, and is known to `trace.provenance` from then on.

    Raises:
        OptionError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    if not trace.provenance.sha256:
        with suppress(OSError):  # the model's file may be gone
            trace.provenance = replace(trace.provenance, sha256=sha256(Path(trace.provenance.path)))
    arrays = dict(_arrays(trace))
    text = _document(trace, arrays).model_dump_json()
    metadata = {_KEY: text, _CHECKSUM: str(zlib.crc32(text.encode()))}
    try:
        with replacing(Path(path)) as partial:
            save_file(arrays, partial, metadata)
    except (OSError, SafetensorError) as error:
        raise OptionError(f"{path}: the trace cannot be written: {error}") from None


def load_trace(path: str | Path) -> Trace:
    """The trace that `save` wrote; neither the model nor jax is needed. An array is read when it is asked for.

    Raises:
        ModelFileError: the file cannot be read, is damaged, or holds no trace; damage within an array is found, and
            raised, when that array is read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(path, framework="np")
        metadata, names = file.metadata() or {}, set(file.keys())
        slices = {name: file.get_slice(name) for name in names}
        kinds = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise ModelFileError(f"{path}: not a file of irkit's traces: {error}") from None
    try:
        document = _checked(metadata, kinds)
    except ValueError as error:
        raise ModelFileError(f"{path}: not a sound file of irkit's traces: {error}") from None

    def read(name: str) -> np.ndarray:
        try:
            array = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelFileError(f"{path}: {name} cannot be read: {error}") from None
        if _crc32(array) != document.crc32[name]:
            raise ModelFileError(f"{path}: {name} is damaged: its checksum differs")
        return array

    spec = document.spec
    source = Provenance(
        model=document.model,
        path=document.file,
        precision=document.precision,
        names=spec.names,
        reduce=spec.reduce,
        heads=spec.heads,
        positions=spec.positions,
        edits=document.edits,
        sha256=document.sha256,
    )
    nbytes = sum(4 * math.prod(shape) for _, shape in kinds.values())
    values = {full: _reader(read, parts) for full, parts in _parts(spec).items()}
    logits = cache(lambda: read(_LOGITS)) if _LOGITS in kinds else lambda: None
    return Trace(document.ids, document.strings, values, logits, source, document.n_layers, nbytes)


def _arrays(trace: Trace) -> Iterator[tuple[str, np.ndarray]]:
    for full, value in trace.items():
        if isinstance(value, Largest):
            yield f"{full}.values", np.ascontiguousarray(value.values, np.float32)
            yield f"{full}.indices", np.ascontiguousarray(value.indices, np.int32)
        else:
            yield full, np.ascontiguousarray(value, np.float32)
    if trace.has_logits:
        yield _LOGITS, np.ascontiguousarray(trace.logits, np.float32)


def _document(trace: Trace, arrays: Mapping[str, np.ndarray]) -> _Document:
    from irkit import __version__

    source, file = trace.provenance, Path(trace.provenance.path).name
    points = {full.split(".", 2)[2] if full.startswith("blocks.") else full: full for full in trace}
    spec = _Spec(
        names=tuple(points),
        layers={point: trace.layers(point) for point, full in points.items() if point != full},
        heads=dict(source.heads),
        positions=source.positions,
        reduce=dict(source.reduce),  # pyright: ignore[reportArgumentType]
        k={point: trace[full][0].shape[-1] for point, full in points.items() if isinstance(trace[full], Largest)},
    )
    return _Document(
        format=1,
        irkit=__version__,
        model=file if Path(source.model).name == file else source.model,  # a model may be named by its path
        file=file,
        sha256=source.sha256,
        precision=source.precision,
        n_layers=trace.n_layers,
        ids=trace.ids,
        strings=trace.strings,
        spec=spec,
        edits=source.edits,
        crc32={name: _crc32(array) for name, array in arrays.items()},
    )


def _checked(metadata: Mapping[str, str], kinds: Mapping[str, tuple[str, tuple[int, ...]]]) -> _Document:
    """The document of a file whose arrays are of these types and shapes.

    Raises:
        ValueError: what is wrong with it.
    """
    text = metadata.get(_KEY)
    if text is None:
        raise ValueError(f"its metadata has no {_KEY}")
    if metadata.get(_CHECKSUM) != str(zlib.crc32(text.encode())):
        raise ValueError("the checksum of its metadata differs")
    try:
        document = _Document.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"its metadata is wrong at {place[:80] or 'the top'}: {first['msg']}") from None
    spec, rows = document.spec, len(document.ids)
    if [len(row) for row in document.ids] != [len(row) for row in document.strings]:
        raise ValueError("its ids and strings differ in number")
    if any(layer >= document.n_layers for layers in spec.layers.values() for layer in layers):
        raise ValueError(f"it names a layer beyond its {document.n_layers}")
    expected = {name for parts in _parts(spec).values() for name in parts} | ({_LOGITS} & kinds.keys())
    if expected != kinds.keys() or expected != document.crc32.keys():
        raise ValueError("its arrays are not those that its metadata names")
    for name, (kind, _) in kinds.items():
        if kind != ("I32" if name.endswith(".indices") else "F32"):
            raise ValueError(f"{name} is of type {kind}")
    count = max(map(len, document.ids)) if spec.positions is None else len(spec.positions)
    for point in spec.names:
        known = {"b": rows, "pos": count, "query": count, "one": 1}
        known |= {"head": len(spec.heads[point])} if point in spec.heads else {}
        known |= {"k": spec.k[point]} if point in spec.k else {}
        axes = kept_axes(point, spec.reduce.get(point, "none"))
        shapes = {kinds[name][1] for full, parts in _parts(spec, [point]).items() for name in parts}
        for shape in shapes:
            fits = len(shape) == len(axes) and all(known.get(a, n) == n for a, n in zip(axes, shape, strict=True))
            if not fits or len(shapes) > 1:
                raise ValueError(f"{point} has the shape {list(shape)}")
    if _LOGITS in kinds and (len(kinds[_LOGITS][1]) != 3 or kinds[_LOGITS][1][0] != rows):
        raise ValueError(f"its logits have the shape {list(kinds[_LOGITS][1])}")
    return document


def _parts(spec: _Spec, points: Sequence[str] | None = None) -> dict[str, tuple[str, ...]]:
    """The arrays in the file of each full name."""
    found = {}
    for point in spec.names if points is None else points:
        layers = spec.layers.get(point)
        for full in [point] if layers is None else [f"blocks.{layer}.{point}" for layer in layers]:
            pair = spec.reduce.get(point) in _PAIRS
            found[full] = (f"{full}.values", f"{full}.indices") if pair else (full,)
    return found


def _reader(read: Callable[[str], np.ndarray], parts: tuple[str, ...]) -> Callable[[], Value]:
    return lambda: Largest(*map(read, parts)) if len(parts) == 2 else read(parts[0])


def _crc32(array: np.ndarray) -> int:
    start = f"{_TYPES[array.dtype.name]} {list(array.shape)}"
    return zlib.crc32(array.data, zlib.crc32(start.encode()))


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal; worked out once for each version of it.

    Raises:
        OSError: it cannot be read.
    """
    status = path.stat()
    return _digest(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=16)
def _digest(path: Path, *version: int) -> str:
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, which takes its place when the block has succeeded."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
