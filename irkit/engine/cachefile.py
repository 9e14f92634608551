"""KV caches in files: safetensors, with keys and values `[layer, kv_head, position, d_head]` and the token ids.

Its metadata holds one JSON document under the key `irkit.cache`, which says of which model they are and has a checksum
of each array. The container is described at https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from irkit.errors import ContextFullError, ModelFileError, OptionError
from irkit.tracefile import replacing, sha256

if TYPE_CHECKING:
    from collections.abc import Sequence

    from irkit.engine.model import Model

_KEY = "irkit.cache"
_STORED = {"float32": ("F32", np.float32), "float16": ("F16", np.float16), "bfloat16": ("U16", np.uint16)}
"""How each type of cache is stored; numpy has no bfloat16, so its bits are."""
Kind = Literal["clean", "edited", "dropped", "dropped and edited"]


class _Document(BaseModel):
    """The metadata of a cache's file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[1]
    model: str
    """The name of the model's file."""
    sha256: str
    """Of the model's file."""
    precision: Literal["fast", "exact"]
    dtype: Literal["float32", "float16", "bfloat16"]
    provenance: Kind
    crc32: dict[Literal["keys", "values", "ids"], int]


def save(path: str | Path, model: Model, keys: np.ndarray, values: np.ndarray, ids: Sequence[int], kind: str) -> None:
    """Write keys and values `[layer, kv_head, position, d_head]` and their tokens, whole or not at all.

    Raises:
        OptionError: the file cannot be written, or the model's file is gone.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    stored = _STORED[str(keys.dtype)][1]
    arrays = {"keys": keys.view(stored), "values": values.view(stored), "ids": np.array(ids, np.int32)}
    try:
        document = _Document(
            format=1,
            model=model.path.name,
            sha256=sha256(model.path),
            precision=model.precision,
            dtype=str(keys.dtype),  # pyright: ignore[reportArgumentType]
            provenance=kind,  # pyright: ignore[reportArgumentType]
            crc32={name: zlib.crc32(array.data) for name, array in arrays.items()},  # pyright: ignore[reportArgumentType]
        )
        with replacing(Path(path)) as partial:
            save_file(arrays, partial, {_KEY: document.model_dump_json()})
    except (OSError, SafetensorError) as error:
        raise OptionError(f"{path}: the cache cannot be written: {error}") from None


def load(path: str | Path, model: Model, dtype: str, n_ctx: int) -> tuple[np.ndarray, np.ndarray, list[int], Kind]:
    """Keys, values, ids and provenance of a cache of `model`, whose arrays are of type `dtype`.

    Types and shapes are checked before an array is read.

    Raises:
        ContextFullError: it holds more than `n_ctx` tokens.
        ModelFileError: it cannot be read, is damaged, or of another model, precision or type.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            opened: Any = file
            text = (opened.metadata() or {}).get(_KEY)
            if text is None:
                raise ValueError(f"its metadata has no {_KEY}")
            document = _Document.model_validate_json(text)
            length = _checked(opened, document, model, dtype)
            if length > n_ctx:
                raise ContextFullError(f"{path} holds {length} tokens; the context holds {n_ctx}")
            arrays = {name: opened.get_tensor(name) for name in ("keys", "values", "ids")}
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ModelFileError(f"{path}: its metadata is wrong at {place[:80] or 'the top'}: {first['msg']}") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelFileError(f"{path}: no KV cache that can be used here: {error}") from None
    for name, array in arrays.items():
        if zlib.crc32(array.data) != document.crc32.get(name):  # pyright: ignore[reportArgumentType]
            raise ModelFileError(f"{path}: {name} is damaged: its checksum differs")
    ids = arrays["ids"].tolist()
    if not all(0 <= token < model.config.d_vocab for token in ids):
        raise ModelFileError(f"{path}: it holds token ids outside the vocabulary of {model.config.d_vocab}")
    keys, values = (arrays[name].view(np.dtype(dtype)) for name in ("keys", "values"))
    if not all(np.isfinite(part).all() for part in (keys, values)):
        raise ModelFileError(f"{path}: it holds numbers that are not finite")
    return keys, values, ids, document.provenance


def _checked(file: Any, document: _Document, model: Model, dtype: str) -> int:
    """How many tokens the file holds; its arrays have the types and shapes of the model's cache.

    Raises:
        ValueError: they have not, or are of another model.
    """
    if document.sha256 != sha256(model.path):
        raise ValueError(f"it is of the model {document.model[:80]!r}, which has another sha256 than {model.path.name}")
    if (document.precision, document.dtype) != (model.precision, dtype):
        raise ValueError(
            f"it was computed in {document.precision} precision and holds {document.dtype}, "
            f"the session computes in {model.precision} and holds {dtype}"
        )
    if set(file.keys()) != {"keys", "values", "ids"}:
        raise ValueError("its arrays are not keys, values and ids")
    kinds = {name: file.get_slice(name) for name in ("keys", "values", "ids")}
    (length, *more) = kinds["ids"].get_shape() or [0]
    config = model.config
    layers = _STORED[dtype][0], [config.n_layers, config.n_kv_heads, length, config.d_head]
    expected = {"keys": layers, "values": layers, "ids": ("I32", [length])}
    for name, (kind, shape) in expected.items():
        found = kinds[name].get_dtype(), list(kinds[name].get_shape())
        if found != (kind, shape) or more or not length:
            raise ValueError(f"{name} is {found[0]} {found[1]}, not {kind} {shape}")
    return length
