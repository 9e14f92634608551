"""Running the application on a socket, until it is stopped."""

import contextlib
import socket
import sys
import threading
import time
from html import escape

import uvicorn
from fastapi import FastAPI

from irkit.errors import OptionError
from irkit.options import ServeOptions
from irkit.server import memory
from irkit.server.app import create_app
from irkit.server.security import api_key, is_loopback
from irkit.session import Session

GRACE_SECONDS = 5
"""How long the last responses may take when the server stops."""


OPEN_TO_ALL = "warning: whoever can reach this address can use the server; --api-key or IRKIT_API_KEY asks for a key"


class _Server(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Streams end here; uvicorn would wait for them to be made.
        await self.config.app.state.sessions.close()  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]
        await super().shutdown(sockets)


def serve(options: ServeOptions) -> None:
    """Serve until Ctrl-C, having said on stderr where.

    Raises:
        OptionError: the address cannot be listened on, because it is in use for example.
    """
    memory.settle()
    with _listening(options) as listening:
        print(f"irkit serves on {_url(listening)}", file=sys.stderr, flush=True)
        if not is_loopback(options.host) and not api_key(options):
            print(f"irkit: {OPEN_TO_ALL}", file=sys.stderr, flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # which uvicorn passes on when it has shut down
            _server(create_app(options)).run(sockets=[listening])


class Serving:
    """A server that runs beside the program, on a session's loaded model.

    It is a context manager, and ends with its session.
    """

    def __init__(self, options: ServeOptions, session: Session) -> None:
        self.options = options
        app = create_app(options)
        self.model: str = app.state.sessions.lend(session)
        """The name that requests give the model."""
        listening = _listening(options)
        self.url = _url(listening)
        self._server = _server(app)
        self._thread = threading.Thread(target=self._server.run, args=([listening],), name="irkit-server", daemon=True)
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.005)

    @property
    def running(self) -> bool:
        """Whether it answers."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Cancels the answers that are being made, and stops."""
        self._server.should_exit = True
        self._thread.join(2 * GRACE_SECONDS)

    def __enter__(self) -> "Serving":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<irkit serves {self.model} on {self.url}>" if self.running else "<stopped server>"

    def _repr_html_(self) -> str:
        from irkit import reprs

        if not self.running:
            return reprs.out(reprs.note(["the server is stopped"]))
        addresses = {"Ollama's clients": self.url, "OpenAI's clients": f"{self.url}/v1", "model": self.model}
        return reprs.out(f"<b>Serving</b> {escape(self.model)}", reprs.table(addresses.items()))


def _listening(options: ServeOptions) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family)
    except OSError as error:
        reason = error.strerror or error
        raise OptionError(f"cannot listen on {options.host} port {options.port}: {reason}") from None


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if listening.family == socket.AF_INET6 else f"http://{host}:{port}"


def _server(app: FastAPI) -> _Server:
    return _Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE_SECONDS))
