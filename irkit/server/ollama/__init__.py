"""Ollama's API over the verbs of a `Session` and the registry: its requests, its streams of JSON lines, its names.

The shapes are those of https://github.com/ollama/ollama/blob/main/docs/api.md.
"""

from fastapi import APIRouter

from irkit.server.ollama import answers, models
from irkit.server.sessions import Sessions


def router(sessions: Sessions, budget: int) -> APIRouter:
    """Ollama's routes, over `sessions`; what an answer captures may take as many bytes as `budget`."""
    routes = APIRouter(prefix="/api", tags=["ollama"])
    routes.include_router(answers.router(sessions, budget))
    routes.include_router(models.router(sessions))
    return routes
