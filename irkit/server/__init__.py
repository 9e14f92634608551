"""The HTTP server: the verbs of a `Session` as routes, some of them in the shapes of Ollama's API."""

from irkit.server.app import create_app
from irkit.server.listen import Serving, serve

__all__ = ["Serving", "create_app", "serve"]
