"""The models that other programs have on this machine, to be run where they lie: Ollama's, LM Studio's, the Hugging
Face cache's. They are only ever read.

Ollama keeps `manifests/HOST/NAMESPACE/MODEL/TAG`, JSON that names layers, and `blobs/sha256-HEX`; LM Studio
`PUBLISHER/MODEL/FILE.gguf`; the cache `models--ORG--REPO/snapshots/COMMIT/FILE`, links to files named by their sha256.
`IRKIT_STORES=0` leaves all of them alone.
"""

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from irkit import gguf
from irkit.errors import IrkitError, ModelFileError, OptionError
from irkit.hub import naming, ollama
from irkit.hub.naming import Name, check_name, clean_name
from irkit.hub.registry import Manifest, describe

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LONGEST = 1 << 20
"""The most bytes of one of Ollama's manifests, or of a layer that is text."""
_NO_MODEL = "clip"
"""The architecture of what turns images into vectors for a model."""


@dataclass(frozen=True)
class Found:
    """A model of another program, before its file is opened."""

    name: str
    path: Path
    store: str
    """Whose it is: ollama, lmstudio or hf."""
    sha256: str = ""
    """As far as it is known without reading all of the file."""
    texts: tuple[tuple[str, Path], ...] = ()
    """Ollama's layers that are text: their kind, and their file."""
    origin: Name | None = None
    """Where it came from, as far as its place says it."""
    known_as: str = ""
    """What its program calls it."""


@dataclass(frozen=True)
class Damaged:
    """What another program has and nobody can read."""

    known_as: str
    """What its program calls the model."""
    path: Path
    """The file that is the matter."""
    cause: Literal["gone", "forbidden", "damaged"]
    reason: str


@dataclass(frozen=True)
class Folder:
    """Where a program keeps models."""

    store: str
    path: Path
    variable: str = ""
    """The environment variable that says so, if one does."""


def folders() -> list[Folder]:
    """All folders that are looked at, for each program first the one that it would use now."""
    if os.environ.get("IRKIT_STORES") == "0":
        return []
    home = Path.home()
    return [
        _folder("ollama", {"OLLAMA_MODELS": ""}, home / ".ollama" / "models"),
        # Where Ollama runs as a service of Linux, it has a home of its own.
        Folder("ollama", Path("/usr/share/ollama/.ollama/models")),
        Folder("lmstudio", home / ".lmstudio" / "models"),
        Folder("lmstudio", home / ".cache" / "lm-studio" / "models"),
        _folder(
            "hf",
            {"HF_HUB_CACHE": "", "HUGGINGFACE_HUB_CACHE": "", "HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"},
            home / ".cache" / "huggingface" / "hub",
        ),
    ]


def _folder(store: str, variables: Mapping[str, str], otherwise: Path) -> Folder:
    """The folder that the first of `variables` that is set names, or what is said of it below that folder."""
    for variable, below in variables.items():
        if given := os.environ.get(variable):
            return Folder(store, Path(given).expanduser() / below, variable)
    return Folder(store, otherwise)


def found() -> dict[str, Found]:
    """What other programs have, by name. A name that two use goes to the first; the other gets a tag of its own."""
    models: dict[str, Found] = {}
    files = set[Path]()
    for model in (model for folder in folders() for model in _models(folder)):
        if isinstance(model, Damaged):
            continue
        try:
            name = check_name(model.name)
            if name in models:
                name = check_name(f"{name.partition(':')[0]}:{model.store}")
            file = model.path.resolve(strict=True)
        except (OptionError, OSError):
            continue
        if file not in files or model.store == "ollama":  # where two names of a file may differ in all else
            files.add(file)
            models.setdefault(name, replace(model, name=name))
    return models


def manifest(model: Found) -> Manifest | None:
    """What `model` is; None where its file cannot be read, or is no model by itself."""
    made = _read(model)
    return None if isinstance(made, Damaged) or made.architecture == _NO_MODEL else made


def examine(folder: Folder) -> Iterator[Manifest | Damaged]:
    """What is in `folder`, each file once, Ollama's by each of its names: the models, and what cannot be read.

    Of a file only the beginning is read, which says where all else must lie.
    """
    files = set[str]()
    for model in _models(folder):
        if isinstance(model, Damaged):
            yield model
            continue
        file = os.path.realpath(model.path)
        if file in files and model.store != "ollama":
            continue
        files.add(file)
        for _, path in model.texts:
            try:
                path.stat()
            except OSError as error:
                yield _damaged(model.known_as, path, error)
        made = _read(model)
        if isinstance(made, Damaged) or made.architecture != _NO_MODEL:
            yield made


def damaged(name: str) -> Damaged | None:
    """What is the matter with the model of another program that irkit would call `name`, if there is one."""
    models = (model for folder in folders() for model in _models(folder))
    of_name = (_read(model) for model in models if isinstance(model, Found) and model.name == name)
    return next((made for made in of_name if isinstance(made, Damaged)), None)


def _read(model: Found) -> Manifest | Damaged:
    try:
        status = model.path.stat()
        return _described(model, status.st_mtime_ns, status.st_size)
    except (OSError, IrkitError) as error:
        return _damaged(model.known_as, model.path, error)


def _damaged(known_as: str, path: Path, error: Exception) -> Damaged:
    cause = error.__context__ if isinstance(error, ModelFileError) else error  # the system's error, where it is one
    path = Path(cause.filename) if isinstance(cause, OSError) and cause.filename else path
    if isinstance(cause, FileNotFoundError):
        return Damaged(known_as, path, "gone", f"its file {path} is gone")
    if isinstance(cause, PermissionError):
        return Damaged(known_as, path, "forbidden", f"there is no permission to read {path}")
    return Damaged(known_as, path, "damaged", str(error))


@lru_cache(maxsize=512)
def _described(model: Found, changed: int, nbytes: int) -> Manifest:
    """Its manifest; `changed` and `nbytes` tell whether the file is still the one that was looked at."""
    digests = [model.sha256] * max(len(gguf.part_names(model.path.name)), 1)
    made = describe(model.path, model.name, digests, source=model.store)
    texts = {kind: _text(path) for kind, path in model.texts}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # who only lists models need not know what of Ollama's has no counterpart
        own = ollama.own({kind: text for kind, text in texts.items() if text is not None}, model.name)
    added = datetime.fromtimestamp(changed / 1e9, UTC)
    return replace(made, sha256=model.sha256, parts=(), added_at=added, **own)


def _models(folder: Folder) -> Iterator[Found | Damaged]:
    by_store = {"ollama": _ollama, "lmstudio": _lm_studio, "hf": _hugging_face}
    return by_store[folder.store](folder.path)


def _ollama(folder: Path) -> Iterator[Found | Damaged]:
    paths = _files(folder / "manifests", "*/*/*/*")
    # A name without a host means Ollama's own registry.
    for path in sorted(paths, key=lambda path: path.parts[-4] != "registry.ollama.ai"):
        *_, host, namespace, model, tag = path.parts
        prefix = "" if host == "registry.ollama.ai" else f"{host}/"
        known_as = f"{prefix}{'' if not prefix and namespace == 'library' else f'{namespace}/'}{model}:{tag}"
        try:
            layers = TypeAdapter(ollama.Manifest).validate_json(_content(path)).layers
        except OSError as error:
            yield _damaged(known_as, path, error)
            continue
        except ValidationError as error:
            reason = f"its manifest {path} is damaged: {error.errors()[0]['msg']}"
            yield Damaged(known_as, path, "damaged", reason)
            continue
        by_kind = {layer.mediaType.removeprefix(ollama.LAYER): layer.digest[len("sha256:") :] for layer in layers}
        if "model" not in by_kind or "adapter" in by_kind:
            continue
        blobs = {kind: folder / "blobs" / f"sha256-{digest}" for kind, digest in by_kind.items()}
        name = Name(host, *map(clean_name, (namespace, model, tag))).own
        origin = naming.parse(f"{host}/{namespace}/{model}:{tag}".lower())
        texts = tuple((kind, blobs[kind]) for kind in ("template", "system", "params", "license") if kind in blobs)
        yield Found(name, blobs["model"], "ollama", by_kind["model"], texts, origin, known_as)


def _lm_studio(folder: Path) -> Iterator[Found]:
    for path in _files(folder, "*/*/*.gguf"):
        place = "/".join(path.parts[-3:])
        yield Found(_name(path), path, "lmstudio", origin=_of_hub(place), known_as=place)


def _hugging_face(folder: Path) -> Iterator[Found]:
    for path in sorted(_files(folder, "models--*/snapshots/*/**/*.gguf"), key=_changed, reverse=True):
        repo, _, _, *inside = path.relative_to(folder).parts
        known_as = f"{repo.removeprefix('models--').replace('--', '/')} {'/'.join(inside)}"
        blob = Path(os.path.realpath(path)).name
        digest = blob if _SHA256.fullmatch(blob) else ""
        origin = _of_hub("/".join([*repo.split("--")[1:], *inside]))
        yield Found(_name(path), path, "hf", digest, origin=origin, known_as=known_as)


def _of_hub(path: str) -> Name | None:
    """Where a file came from that is kept as ORG/REPO/FILE."""
    return naming.parse(f"{naming.HUB}/{path}".lower())


def _name(path: Path) -> str:
    stem = path.stem
    return clean_name(stem[: -len("-00001-of-00001")] if gguf.part_names(path.name) else stem)


def _files(folder: Path, pattern: str) -> list[Path]:
    """The files in `folder`, in order, also those that are gone behind their links; of split models the first parts."""
    try:
        paths = sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))
    except OSError:
        return []
    paths = [path for path in paths if os.path.isfile(path) or not os.path.exists(path)]
    return [path for path in paths if path.name in (gguf.part_names(path.name) or [path.name])[:1]]


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0


def _text(path: Path) -> str | None:
    try:
        content = _content(path)
    except OSError:
        return None
    return content.decode("utf-8", "replace") if len(content) <= _LONGEST else None


def _content(path: Path) -> bytes:
    """The bytes of a file; of one that is too long to be read, some more than may be."""
    with open(path, "rb") as file:
        return file.read(_LONGEST + 1)
