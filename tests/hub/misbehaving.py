"""A web server on the loopback that keeps to no rule it is told to break, and a small model for it to serve."""

import contextlib
import functools
import hashlib
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import gguf
import numpy as np

from irkit import hub
from irkit.hub import find, home

PATH = "/tiny.gguf"

pull = functools.partial(hub.pull, allow_private=True)
"""As at the command line, where the user may name this machine."""

Answer = Callable[["Handler", bytes], None]


@dataclass
class FakeHub:
    """Serves `files` (path -> bytes); each GET first uses up one of `script`, if any is left."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    script: list[Answer] = field(default_factory=list)
    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    says_ranges: bool = False
    """Whether it says that it can send ranges; large files are then fetched in pieces."""
    released: threading.Event = field(default_factory=threading.Event)

    def gets(self, header: str = "Range") -> list[str | None]:
        """The value of `header` in each GET so far."""
        return [headers.get(header) for method, _, headers in self.seen if method == "GET"]


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._note()
        self.head(200 if self.path in self.hub.files else 404)

    def do_GET(self) -> None:
        self._note()
        content = self.hub.files.get(self.path)
        if content is None:
            self.head(404, {"Content-Length": "0"})
        elif self.hub.script:
            self.hub.script.pop(0)(self, content)
        else:
            obey(self, content)

    def _note(self) -> None:
        self.hub.seen.append((self.command, self.path, dict(self.headers.items())))

    def head(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()

    def etag(self, content: bytes) -> str:
        return self.hub.etags.get(self.path, f'"{hashlib.md5(content).hexdigest()}"')


def obey(handler: Handler, content: bytes, *, cut: int | None = None) -> None:
    """Does what HTTP says, ranges included; `cut` closes the connection after so many bytes of the body."""
    etag = handler.etag(content)
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
    first, end, status, headers = 0, len(content), 200, {"ETag": etag}
    if handler.hub.says_ranges:
        headers["Accept-Ranges"] = "bytes"
    if wanted and handler.headers.get("If-Range", etag) == etag:
        first, status = int(wanted[1]), 206
        if first >= len(content):
            return handler.head(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"})
        end = int(wanted[2]) + 1 if wanted[2] else end
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
    handler.head(status, headers | {"Content-Length": str(end - first)})
    with contextlib.suppress(ConnectionError):  # who only wanted to know the size has left
        handler.wfile.write(content[first : end if cut is None else first + cut])
    return None


def cut_after(count: int) -> Answer:
    return lambda handler, content: obey(handler, content, cut=count)


def status(code: int, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, content: handler.head(code, {"Content-Length": "0"} | named)


def whole(handler: Handler, content: bytes) -> None:
    """All of the file with status 200, whatever range was asked for."""
    handler.head(200, {"ETag": handler.etag(content), "Content-Length": str(len(content))})
    handler.wfile.write(content)


def stall_after(count: int) -> Answer:
    """Goes quiet after `count` bytes, until the test ends."""

    def answer(handler: Handler, content: bytes) -> None:
        obey(handler, content, cut=count)
        handler.wfile.flush()
        handler.hub.released.wait(60)

    return answer


def write_gguf(path: Path, *, file_type: int | None = 0, rows: int = 64, seed: int = 0) -> Path:
    """A sound GGUF file of `rows` x 256 float32 weights and as many zeros in F16 again."""
    writer = gguf.GGUFWriter(path, "llama")
    if file_type is not None:
        writer.add_file_type(file_type)
    weights = np.random.default_rng(seed).normal(size=(rows, 256)).astype(np.float32)
    writer.add_tensor("token_embd.weight", weights)
    writer.add_tensor("output.weight", np.zeros((rows, 256), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def left_over() -> list[str]:
    """What a pull has left in the models' folder, the locks aside."""
    return sorted(path.name for path in (home() / "models").iterdir() if path.suffix != ".lock")


def fetched() -> bytes:
    manifest = find("tiny")
    assert manifest is not None
    assert left_over() == ["tiny.gguf"]
    assert manifest.sha256 == hashlib.sha256(manifest.path.read_bytes()).hexdigest()
    return manifest.path.read_bytes()
