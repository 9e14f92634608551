"""The models on this machine: one JSON manifest a model, and the files irkit fetched itself.

Everything lies below `home()`: `manifests/` holds the manifests, `models/` the fetched files. A manifest may
name a file anywhere; only files in `models/` are ever replaced or deleted. Manifests are written to a
temporary file and moved into place, and every change holds a lock, so processes may share one registry.
"""

import hashlib
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from filelock import FileLock
from platformdirs import user_data_path
from pydantic import AwareDatetime, TypeAdapter, ValidationError

from irkit import gguf
from irkit.errors import IrkitError, ModelFileError, ModelNotFoundError, OptionError
from irkit.hub.naming import OnlyName, check_name, clean_name, own_name, shown

# The numbering of general.file_type: llama_ftype in llama.cpp's include/llama.h, the labels as in file names.
_LABELS = """
    F32 F16 Q4_0 Q4_1 - - - Q8_0 Q5_0 Q5_1 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K
    IQ2_XXS IQ2_XS Q2_K_S IQ3_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ3_M IQ2_S IQ2_M IQ4_XS IQ1_M BF16 - - -
    TQ1_0 TQ2_0 MXFP4_MOE NVFP4 Q1_0
"""
FILE_TYPES = {number: label for number, label in enumerate(_LABELS.split()) if label != "-"}
# Set beside the number by tools that guessed it (LLAMA_FTYPE_GUESSED).
_GUESSED = 1024


@dataclass(frozen=True)
class Manifest:
    """A registered model; its JSON form is the file `manifests/<name>.json`.

    `size` is in bytes, `parameters` counts the weights of all tensors, `quantization` is the label people use
    ("Q4_K_M"), `sha256` is hexadecimal, `added_at` is in UTC (RFC 3339 in JSON), and `source` is what the
    model was pulled as, or None for a file registered in place.

    What a session of this name does unless it is told otherwise: `template` (Jinja) stands in for the file's own,
    `system` opens each conversation that brings no system message, and `options` holds fields of `GenerateOptions`,
    and `num_ctx`. `license` is its text, where the model came with one beside the file.

    `archive` is the sha256 of the wheel that the file was taken out of, where it is known.

    `path` is the first file of a split model; then `parts` are the sha256 of each file, `size` is that of all, and
    `sha256` is that of `parts`, one a line.
    """

    name: str
    path: Path
    size: int
    architecture: str
    parameters: int
    quantization: str
    sha256: str
    added_at: AwareDatetime
    source: str | None = None
    template: str | None = None
    system: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    license: str | None = None
    parts: tuple[str, ...] = ()
    archive: str | None = None


_JSON = TypeAdapter(Manifest)


def home() -> Path:
    """The folder of manifests and fetched models: $IRKIT_HOME, or else the platform's place for user data."""
    given = os.environ.get("IRKIT_HOME")
    return Path(given).expanduser().absolute() if given else user_data_path("irkit")


def models() -> list[Manifest]:
    """All registered models, sorted by name; a damaged manifest is left out with a warning that names it."""
    # Path.glob of a folder that is not there yields nothing.
    found = (_read(path) for path in (home() / "manifests").glob("[!.]*.json"))
    return sorted((manifest for manifest in found if manifest), key=lambda manifest: manifest.name)


def find(name: str) -> Manifest | None:
    """The model registered as `name` (upper and lower case are the same), or None.

    Raises:
        OptionError: `name` cannot be a model's name.
    """
    return _read(_manifest_path(check_name(name.lower())))


def add(path: str | Path, name: str | None = None) -> Manifest:
    """Registers a GGUF file where it lies, without copying it; `name` is by default the file's, cleaned up.

    Raises:
        ModelNotFoundError: there is no such file.
        ModelFileError: the file is no sound GGUF file.
        OptionError: the name cannot be a model's name, or belongs to another file.
    """
    file = as_path(path)
    if file is None:
        raise ModelNotFoundError(f"no file at {str(path)!r}")
    file = Path(os.path.abspath(file))
    manifest = describe(file, check_name(clean_name(file.stem)) if name is None else own_name(name))
    with _changing() as folder:
        holder = find(manifest.name)
        if holder is not None and holder.path.is_file() and not holder.path.samefile(file):
            raise OptionError(
                f"the name {manifest.name} belongs to {holder.path}: give another, or remove that model first"
            )
        _write(folder, manifest)
    return manifest


def put(manifest: Manifest) -> Manifest:
    """Registers `manifest`, in place of what had its name, unless a fetched file would then belong to no model.

    Raises:
        OptionError: the name cannot be a model's name, or is that of the only model with a file irkit fetched.
        IrkitError: the registry cannot be written.
    """
    check_name(manifest.name)
    with _changing() as folder:
        holder = find(manifest.name)
        if holder is not None and _is_last_owner(holder) and holder.path.resolve() != manifest.path.resolve():
            raise OptionError(f"{manifest.name} is a model that was fetched: give another name, or remove it first")
        _write(folder, manifest)
    return manifest


def publish(
    fetched: Sequence[Path],
    name: str,
    digests: Sequence[str],
    source: str,
    own: Mapping[str, Any] = MappingProxyType({}),
) -> Manifest:
    """Moves complete, verified files that were fetched as `source` into the registry as `name`.

    There is one, or all parts of a split model, with the sha256 of each; `own` are further fields of the manifest.

    Raises:
        ModelFileError: they are no sound GGUF file; nothing has been changed.
        IrkitError: the registry cannot be written.
    """
    described = describe(fetched[0], name, digests, source)
    with _changing() as folder:
        stem = _file_name(name)
        holder = find(name)
        if any(other.path in _kept(stem, len(fetched)) for other in models() if other.name != name):
            stem += f"~{described.sha256[:12]}"  # a copy keeps what there was
        kept = _kept(stem, len(fetched))
        old = files(holder.path) if holder is not None and _is_last_owner(holder) else []
        for source_file, file in zip(fetched, kept, strict=True):
            os.replace(source_file, file)
        manifest = replace(described, path=kept[0], **own)
        _write(folder, manifest)
        for file in set(old) - set(kept):
            file.unlink(missing_ok=True)
    return manifest


def files(path: Path) -> list[Path]:
    """All files of the model whose file, or first part, is `path`."""
    return [path.with_name(name) for name in gguf.part_names(path.name)] or [path]


def is_whole(manifest: Manifest) -> bool:
    """Whether a model's files are there, with as many bytes as they should have."""
    try:
        return sum(file.stat().st_size for file in files(manifest.path)) == manifest.size
    except OSError:
        return False


def remove(name: str) -> None:
    """Takes a model out of the registry, and deletes its file if irkit fetched it and no other model uses it.

    Raises:
        ModelNotFoundError: no model has this name.
        OptionError: `name` cannot be a model's name.
    """
    path = _manifest_path(check_name(name.lower()))
    with _changing():
        if not path.is_file():
            raise ModelNotFoundError(f"no model {shown(name)} in {path.parent}")
        manifest = _read(path)
        last = manifest is not None and _is_last_owner(manifest)
        path.unlink()
        for file in files(manifest.path) if manifest is not None and last else ():
            file.unlink(missing_ok=True)


def blob_path(name: str) -> Path:
    """Where the file of a model that irkit fetches as `name` lies."""
    return home() / "models" / f"{_file_name(name)}.gguf"


def _kept(stem: str, count: int) -> list[Path]:
    """Where a model of so many files that irkit fetches is kept."""
    names = [f"{stem}.gguf"] if count == 1 else gguf.part_names(f"{stem}-00001-of-{count:05}.gguf")
    return [home() / "models" / name for name in names]


def _manifest_path(name: str) -> Path:
    return home() / "manifests" / f"{_file_name(name)}.json"


def _file_name(name: str) -> str:
    # Windows keeps ":" for itself; no name holds "@" or "+".
    return name.replace(":", "@").replace("/", "+")


def as_path(model: str | Path) -> Path | None:
    """The file that `model` is the path of, if it is one."""
    if isinstance(model, OnlyName):
        return None
    text = os.path.expanduser(model)
    # Unlike Path.is_file, this is merely false for NUL characters and over-long names.
    return Path(text) if os.path.isfile(text) else None


def _is_last_owner(manifest: Manifest) -> bool:
    """Whether irkit keeps this model's file, and no other model uses it."""
    file = manifest.path.resolve()
    if not (file.is_relative_to((home() / "models").resolve()) and file.is_file()):
        return False
    return not any(other.path.resolve() == file for other in models() if other.name != manifest.name)


def _read(path: Path) -> Manifest | None:
    try:
        manifest = _JSON.validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.errors()[0]["msg"]
        warnings.warn(f"the manifest {path} is damaged and left out: {reason}", stacklevel=1)
        return None
    if path.name != _manifest_path(manifest.name).name:
        warnings.warn(f"the manifest {path} is damaged and left out: it names {manifest.name!r}", stacklevel=1)
        return None
    return manifest


def _write(folder: Path, manifest: Manifest) -> None:
    # The lock is held, so one name does for all; a killed process's leftover is overwritten.
    temporary = folder / ".new.tmp"
    with open(temporary, "wb") as file:
        file.write(_JSON.dump_json(manifest, indent=2))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, _manifest_path(manifest.name))


@contextmanager
def _changing() -> Iterator[Path]:
    """Holds the registry's lock; yields the folder of manifests."""
    folder = home() / "manifests"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            yield folder
    except OSError as error:
        raise IrkitError(f"the registry in {home()} cannot be changed: {error.strerror or error}") from error


def describe(file: Path, name: str, digests: Sequence[str] | None = None, source: str | None = None) -> Manifest:
    """The manifest of a GGUF file as `name`, unregistered; `digests` are the sha256 of its parts, where known.

    Raises:
        ModelFileError: the file is no sound GGUF file.
    """
    with gguf.open(file) as opened:
        architecture = opened.metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise ModelFileError(f"{file}: the key general.architecture is missing or no string")
        file_type = opened.metadata.get("general.file_type")
        quantization = FILE_TYPES.get(file_type & ~_GUESSED) if isinstance(file_type, int) else None
        if quantization is None:
            by_format = Counter[str]()
            for tensor in opened.tensors.values():
                by_format[tensor.format] += tensor.nbytes
            quantization = by_format.most_common(1)[0][0] if by_format else "unknown"
        if digests is None:
            digests = [_sha256(path) for path in opened.paths]
        split = len(digests) > 1
        return Manifest(
            name=name,
            path=file,
            size=opened.size,
            architecture=architecture,
            parameters=sum(math.prod(tensor.shape) for tensor in opened.tensors.values()),
            quantization=quantization,
            sha256=hashlib.sha256("\n".join(digests).encode()).hexdigest() if split else digests[0],
            added_at=datetime.now(UTC),
            source=source,
            parts=tuple(digests) if split else (),
        )


def _sha256(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
