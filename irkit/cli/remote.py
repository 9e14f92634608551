"""What is asked of a server that runs, by Ollama's API: which models it holds, and to let go of one."""

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from irkit.errors import IrkitError, ModelNotFoundError, OptionError

_TIMEOUT = 30.0
"""Seconds: a server that lets go of a model ends its answers first."""
_FOR_EVER = 365 * 24 * 3600


def address() -> str:
    """Where the server is: IRKIT_HOST, which may leave out everything but a host or a port, or the default.

    Raises:
        OptionError: IRKIT_HOST is no address.
    """
    given = os.environ.get("IRKIT_HOST", "").strip()
    try:
        parts = urlsplit(given if "://" in given else f"http://{given}")
        host, port = parts.hostname or "127.0.0.1", parts.port or {"https": 443}.get(parts.scheme, 11434)
    except ValueError:
        parts, host, port = urlsplit(""), "", 0
    if parts.scheme not in ("http", "https") or parts.username or parts.path.strip("/") or parts.query:
        raise OptionError(f"IRKIT_HOST is {given!r}, and can be HOST, HOST:PORT or http://HOST:PORT")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # where it listens is not where it is reached
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def running() -> list[dict[str, Any]]:
    """The models that the server holds: `name`, `size` in bytes, `context_length`, `expires_at`, as far as it says.

    Raises:
        IrkitError: no server answers, or not in this way.
    """
    models = _ask("GET", "/api/ps").get("models")
    if not isinstance(models, list) or not all(isinstance(model, dict) and "name" in model for model in models):
        raise IrkitError(f"what answers at {address()} is no server of models")
    return models


def stop(model: str) -> None:
    """Have the server let go of a model, and cancel what it makes with it.

    Raises:
        ModelNotFoundError: the server knows no such model.
        IrkitError: no server answers, or not in this way.
    """
    _ask("POST", "/api/generate", {"model": model, "keep_alive": 0, "stream": False})


def until(expires_at: Any) -> str:
    """When a model will be let go of, as words: `in 4 min`, `never`; empty where the server does not say."""
    try:
        seconds = (datetime.fromisoformat(expires_at) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError):
        return ""
    if seconds > _FOR_EVER:
        return "never"
    if seconds < 1:
        return "now"
    unit, name = next(pair for pair in ((86400, "days"), (3600, "h"), (60, "min"), (1, "s")) if seconds >= pair[0])
    return f"in {seconds / unit:.0f} {name}"


def _ask(method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    import httpx

    where, key = address(), os.environ.get("IRKIT_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        # A proxy would look for this machine's server on its own.
        with httpx.Client(trust_env=False, timeout=_TIMEOUT, headers=headers) as client:
            answer = client.request(method, where + path, json=body)
    except httpx.ConnectError:
        raise IrkitError(f"no server answers at {where}; irkit serve starts one, IRKIT_HOST names another") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise IrkitError(f"{where}: {str(error) or type(error).__name__}") from None
    try:
        told = answer.json()
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise IrkitError(f"what answers at {where} is no server of models (status {answer.status_code})")
    if answer.is_error:
        message = str(told.get("error", f"status {answer.status_code}"))
        raise (ModelNotFoundError if answer.status_code == 404 else IrkitError)(f"{where}: {message}")
    return told
