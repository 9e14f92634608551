"""Models by name or path: those of the registry, and behind them those of other programs."""

import difflib
import os
from pathlib import Path

from irkit.errors import ModelNotFoundError, OptionError
from irkit.hub import huggingface, naming, registry, stores
from irkit.hub.catalog import CATALOG
from irkit.hub.naming import Name, shown
from irkit.hub.registry import Manifest, as_path


def models() -> list[Manifest]:
    """All models on this machine, sorted by name: the registered ones, and what other programs have beside them.

    A damaged manifest is left out with a warning that names it.
    """
    mine = registry.models()
    taken, files = {manifest.name for manifest in mine}, {manifest.path.resolve() for manifest in mine}
    others = (stores.manifest(other) for name, other in stores.found().items() if name not in taken)
    return sorted(
        [*mine, *(other for other in others if other and other.path.resolve() not in files)],
        key=lambda manifest: manifest.name,
    )


def names() -> list[str]:
    """The names of all models on this machine, and of those that irkit knows where to fetch."""
    return sorted({manifest.name for manifest in registry.models()} | stores.found().keys() | CATALOG.keys())


def find(name: str) -> Manifest | None:
    """The model that `name` means (upper and lower case are the same), or None; a registered one goes first.

    That is one that is called so, or that came from there: `me/tiny:1b`, `registry.ollama.ai/me/tiny:1b`,
    `hf.co/ORG/REPO:Q4_K_M`. Namespace `library`, tag `latest` and Ollama's registry may be left out, or not.

    Raises:
        OptionError: `name` cannot be a model's name.
    """
    asked = naming.named(name)
    if not asked.host:
        for own in (asked.own, f"{asked.own}:latest") if asked.tag == "latest" else (asked.own,):
            if here := registry.find(own):
                return here
        if other := stores.found().get(asked.own):
            return stores.manifest(other)
    fits = [(origin, model) for origin, model in _came_from(asked) if naming.means(asked, origin)]
    if asked.tag == "latest" and len({origin.file or origin.tag for origin, _ in fits}) > 1:
        usual = huggingface.USUAL
        fits = [fit for fit in fits if naming.labelled(fit[0].file or fit[0].tag, usual) or fit[0] == asked]
    model = fits[0][1] if fits else None
    return stores.manifest(model) if isinstance(model, stores.Found) else model


def _came_from(asked: Name) -> list[tuple[Name, Manifest | stores.Found]]:
    """The models from the place, or the repository, that `asked` names, and where each came from.

    Of registered ones, what was copied from a fetched model or made of it is another model.
    """
    pairs: list[tuple[Name | None, Manifest | stores.Found]] = []
    for model in registry.models():
        origin = naming.parse((model.source or "").lower())
        # Names had no namespaces once.
        if origin and model.name in (origin.own, origin.own.replace("/", "-")):
            pairs.append((origin, model))
    pairs += [(model.origin, model) for model in stores.found().values()]
    place = (asked.host, asked.namespace, asked.model)
    return [
        (origin, model) for origin, model in pairs if origin and (origin.host, origin.namespace, origin.model) == place
    ]


def remove(name: str) -> None:
    """Takes a model out of the registry, and deletes its file if irkit fetched it and no other model uses it.

    Raises:
        ModelNotFoundError: no model has this name.
        OptionError: `name` cannot be a model's name, or is that of another program's model.
    """
    found, asked = find(name), naming.named(name)
    if found is None and asked.host:
        raise not_found(name)
    own = found.name if found else asked.own  # which may be that of a damaged manifest
    if found and registry.find(own) is None:
        raise OptionError(f"{own} belongs to another program ({found.source}): remove it there")
    try:
        registry.remove(own)
    except ModelNotFoundError:
        raise not_found(name) from None


def resolve(model: str | Path) -> Path:
    """The file of a model given as a path or as a name; a path goes first.

    Raises:
        ModelNotFoundError: saying what was looked up, where, and which known names come near.
        OptionError: `model` can be neither a path nor a name.
    """
    file = as_path(model)
    if file is not None:
        return file
    text = str(model)
    separators = {"/", "\\", os.sep}
    like_path = not separators.isdisjoint(text) or text.lower().endswith(".gguf")
    if isinstance(model, Path) or (like_path and not naming.parse(text)):
        raise ModelNotFoundError(f"no file at {shown(text)}")
    manifest = find(text)
    if manifest is None:
        raise not_found(text)
    if not manifest.path.is_file():
        raise ModelNotFoundError(f"{manifest.name} is registered, but its file {manifest.path} is gone")
    return manifest.path


def manifest(model: str | Path) -> Manifest | None:
    """What `model` names; None for a path to a file, which goes first, and where there is none.

    Raises:
        OptionError: `model` can be neither a path nor a name.
    """
    if isinstance(model, Path) or as_path(model) is not None:
        return None
    return find(model)


def not_found(name: str) -> ModelNotFoundError:
    """What to raise where no model has `name`: it says where it was looked for, and which names come near."""
    asked = naming.parse(name.lower())
    if asked and (other := stores.damaged(asked.own)):
        return ModelNotFoundError(f"{name.lower()} belongs to another program, and cannot be read: {other.reason}")
    return ModelNotFoundError(
        f"no model {shown(name)}: no such file in {Path.cwd()}, no such name in {registry.home() / 'manifests'}"
        + near(name)
    )


def near(name: str) -> str:
    """How a message ends that no model has `name`: with the names that come near, if any do."""
    asked = naming.parse(name.lower())
    own, found = (asked.own, [model.name for _, model in _came_from(asked)]) if asked else (name.lower(), [])
    # A name of the catalog that was not fetched yet is the one that was asked for.
    others = set(names()) - {*found, name.lower().removesuffix(":latest")}
    hints = [*found, *difflib.get_close_matches(own, others, n=3, cutoff=0.5)][:3]
    return f"; did you mean {' or '.join(hints)}?" if hints else ""
