"""The models that other programs have on this machine, to be run where they lie: Ollama's, LM Studio's, the Hugging
Face cache's. They are only ever read.

Ollama keeps `manifests/HOST/NAMESPACE/MODEL/TAG`, JSON that names layers, and `blobs/sha256-HEX`; LM Studio
`PUBLISHER/MODEL/FILE.gguf`; the cache `models--ORG--REPO/snapshots/COMMIT/FILE`, links to files named by their sha256.
`IRKIT_STORES=0` leaves all of them alone.
"""

import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from irkit import gguf
from irkit.errors import IrkitError, OptionError
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


def found() -> dict[str, Found]:
    """What other programs have, by name. A name that two use goes to the first; the other gets a tag of its own."""
    models: dict[str, Found] = {}
    if os.environ.get("IRKIT_STORES") == "0":
        return models
    files = set[Path]()
    for model in (*_ollama(), *_lm_studio(), *_hugging_face()):
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
    try:
        status = model.path.stat()
        made = _described(model, status.st_mtime_ns, status.st_size)
    except (OSError, IrkitError):
        return None
    return None if made.architecture == _NO_MODEL else made


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


def _ollama() -> Iterator[Found]:
    given = os.environ.get("OLLAMA_MODELS")
    own = Path(given).expanduser() if given else Path.home() / ".ollama" / "models"
    # Where Ollama runs as a service of Linux, it has a home of its own.
    for folder in (own, Path("/usr/share/ollama/.ollama/models")):
        paths = _files(folder / "manifests", "*/*/*/*")
        # A name without a host means Ollama's own registry.
        for path in sorted(paths, key=lambda path: path.parts[-4] != "registry.ollama.ai"):
            *_, host, namespace, model, tag = path.parts
            try:
                content = (_text(path) or "").encode()
                layers = TypeAdapter(ollama.Manifest).validate_json(content).layers
            except ValidationError:
                continue
            by_kind = {layer.mediaType.removeprefix(ollama.LAYER): layer.digest[len("sha256:") :] for layer in layers}
            if "model" not in by_kind or "adapter" in by_kind:
                continue
            blobs = {kind: folder / "blobs" / f"sha256-{digest}" for kind, digest in by_kind.items()}
            name = Name(host, *map(clean_name, (namespace, model, tag))).own
            origin = naming.parse(f"{host}/{namespace}/{model}:{tag}".lower())
            texts = tuple((kind, blobs[kind]) for kind in ("template", "system", "params", "license") if kind in blobs)
            yield Found(name, blobs["model"], "ollama", by_kind["model"], texts, origin)


def _lm_studio() -> Iterator[Found]:
    for folder in (Path.home() / ".lmstudio" / "models", Path.home() / ".cache" / "lm-studio" / "models"):
        for path in _files(folder, "*/*/*.gguf"):
            yield Found(_name(path), path, "lmstudio", origin=_of_hub("/".join(path.parts[-3:])))


def _hugging_face() -> Iterator[Found]:
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    folder = Path(os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or Path(home, "hub"))
    newest = sorted(_files(folder.expanduser(), "models--*/snapshots/*/**/*.gguf"), key=_changed, reverse=True)
    for path in newest:
        blob = path.resolve().name
        repo, _, _, *file = path.relative_to(folder.expanduser()).parts
        origin = _of_hub("/".join([*repo.split("--")[1:], *file]))
        yield Found(_name(path), path, "hf", blob if _SHA256.fullmatch(blob) else "", origin=origin)


def _of_hub(path: str) -> Name | None:
    """Where a file came from that is kept as ORG/REPO/FILE."""
    return naming.parse(f"{naming.HUB}/{path}".lower())


def _name(path: Path) -> str:
    stem = path.stem
    return clean_name(stem[: -len("-00001-of-00001")] if gguf.part_names(path.name) else stem)


def _files(folder: Path, pattern: str) -> list[Path]:
    """The files in `folder`, in order; of split models the first parts."""
    try:
        paths = [path for path in sorted(folder.glob(pattern)) if path.is_file()]
    except OSError:
        return []
    return [path for path in paths if path.name in (gguf.part_names(path.name) or [path.name])[:1]]


def _changed(path: Path) -> float:
    return path.stat().st_mtime


def _text(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            content = file.read(_LONGEST + 1)
    except OSError:
        return None
    return content.decode("utf-8", "replace") if len(content) <= _LONGEST else None
