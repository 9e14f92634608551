"""Models made from others: a name of its own for a file, with a template, a system prompt and options."""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from irkit.errors import IrkitError, OptionError
from irkit.hub import lookup, registry
from irkit.hub.checked import checked_options, checked_template
from irkit.hub.download import check_space
from irkit.hub.naming import own_name

LEFT_OVER_SECONDS = 24 * 3600.0
"""A part of a file that was being sent, to which nothing came for so long, is of a process that was killed."""

_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")


def create(
    name: str,
    source: str | Path | registry.Manifest,
    *,
    template: str | None = None,
    system: str | None = None,
    options: Mapping[str, Any] | None = None,
    license: str | None = None,
) -> registry.Manifest:
    """Registers `name`: the file of `source`, with what a session of it does unless it is told otherwise.

    `source` is a GGUF file, the name of a model, or its manifest; what a model has of its own and is not given here is
    taken over, `options` one by one. The file stays where it is. `template` is Jinja, or one of the simple Go templates
    of Ollama's models; where such a one cannot be read, a warning says that the file's own is used. `options` are
    fields of `GenerateOptions`, and `num_ctx`, as values or as words. What had the name before is replaced.

    Raises:
        ModelNotFoundError, ModelFileError: there is no such model or file, or the file is damaged.
        OptionError: the name, the template or an option is none, or the name is that of the only model with a file
            that irkit fetched.
    """
    name = own_name(name)
    if isinstance(source, registry.Manifest):
        base = source
    else:
        path = lookup.resolve(source)
        base = lookup.manifest(source) or registry.describe(Path(os.path.abspath(path)), name)
    given = checked_options(options or {})
    return registry.put(
        replace(
            base,
            name=name,
            added_at=datetime.now(UTC),
            template=base.template if template is None else checked_template(template),
            system=base.system if system is None else system,
            options=base.options | given,
            license=base.license if license is None else license,
        )
    )


def copy(source: str, name: str) -> registry.Manifest:
    """Registers the model `source` under another name as well; both share its file.

    Raises:
        ModelNotFoundError: there is no model `source`.
        OptionError: a name cannot be a model's name, or `name` is that of the only model with a file irkit fetched.
    """
    manifest = lookup.find(source)
    if manifest is None:
        raise lookup.not_found(source)
    return registry.put(replace(manifest, name=own_name(name), added_at=datetime.now(UTC)))


def blob(digest: str) -> Path | None:
    """The file that was sent as `digest` ("sha256:" and 64 hexadecimal digits), if it is here.

    Raises:
        OptionError: `digest` is none.
    """
    path = _blob_path(digest)
    return path if path.is_file() else None


@contextmanager
def blob_writer(digest: str, size: int | None = None) -> Iterator[Callable[[bytes], None]]:
    """Takes a file piece by piece, for `create`: `with blob_writer(digest) as write: write(piece)`.

    It is there, whole, when the block ends; when that raises, or the bytes are not those of `digest`, nothing is left.
    What processes have left that were killed meanwhile is removed by a later call.

    Raises:
        OptionError: `digest` is none, or the bytes have another.
        PullError: the disk has no room for `size` bytes.
        IrkitError: the bytes cannot be written.
    """
    path = _blob_path(digest)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_over(path.parent)
        check_space(path.parent, size or 0)
        found = hashlib.sha256()
        with open(partial, "xb") as file:

            def write(piece: bytes) -> None:
                found.update(piece)
                file.write(piece)

            yield write
            file.flush()
            os.fsync(file.fileno())
        if found.hexdigest() != path.name.removeprefix("sha256-"):
            raise OptionError(f"the bytes sent as {digest} have the sha256 {found.hexdigest()}")
        os.replace(partial, path)
    except OSError as error:
        raise IrkitError(f"{error.filename or partial}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _remove_left_over(folder: Path) -> None:
    for path in folder.glob(".sha256-*"):
        with suppress(OSError):  # another process removes it too, or it is not ours
            if path.stat().st_mtime < time.time() - LEFT_OVER_SECONDS:
                path.unlink()


def _blob_path(digest: str) -> Path:
    found = _DIGEST.fullmatch(digest)
    if not found:
        raise OptionError(f"{digest[:80]!r} is no digest: it must be sha256: and 64 digits 0-9a-f")
    return registry.home() / "models" / "blobs" / f"sha256-{found[1]}"
