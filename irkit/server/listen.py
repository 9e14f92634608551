"""Running the application on a socket, until it is stopped."""

import contextlib
import socket
import sys

import uvicorn

from irkit.errors import OptionError
from irkit.options import ServeOptions
from irkit.server.app import create_app

GRACE_SECONDS = 5
"""How long the last responses may take when the server stops."""


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
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        listening = socket.create_server((options.host, options.port), family=family)
    except OSError as error:
        reason = error.strerror or error
        raise OptionError(f"cannot listen on {options.host} port {options.port}: {reason}") from None
    with listening:
        host = f"[{options.host}]" if family == socket.AF_INET6 else options.host
        print(f"irkit serves on http://{host}:{listening.getsockname()[1]}", file=sys.stderr, flush=True)
        config = uvicorn.Config(create_app(options), log_level="warning", timeout_graceful_shutdown=GRACE_SECONDS)
        with contextlib.suppress(KeyboardInterrupt):  # which uvicorn passes on when it has shut down
            _Server(config).run(sockets=[listening])
