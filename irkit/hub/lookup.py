"""Models by name or path: those of the registry, and behind them those of other programs."""

import difflib
import os
from pathlib import Path

from irkit.errors import ModelNotFoundError, OptionError
from irkit.hub import registry, stores
from irkit.hub.catalog import CATALOG
from irkit.hub.registry import Manifest, as_path, shown


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
    """The model of this name (upper and lower case are the same), or None; a registered one goes first.

    Raises:
        OptionError: `name` cannot be a model's name.
    """
    manifest = registry.find(name)
    other = None if manifest else stores.found().get(name.lower())
    return stores.manifest(other) if other else manifest


def remove(name: str) -> None:
    """Takes a model out of the registry, and deletes its file if irkit fetched it and no other model uses it.

    Raises:
        ModelNotFoundError: no model has this name.
        OptionError: `name` cannot be a model's name, or is that of another program's model.
    """
    if registry.find(name) is None and (other := find(name)):
        raise OptionError(f"{other.name} belongs to another program ({other.source}): remove it there")
    try:
        registry.remove(name)
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
    if isinstance(model, Path) or not separators.isdisjoint(text) or text.lower().endswith(".gguf"):
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
    near = difflib.get_close_matches(name.lower(), names(), n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return ModelNotFoundError(
        f"no model {shown(name)}: no such file in {Path.cwd()}, no such name in {registry.home() / 'manifests'}{hint}"
    )
