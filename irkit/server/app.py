"""The application: a route for each verb, the shapes of other APIs beside them, and one form for errors."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import PlainTextResponse, Response
from fastapi_offline import FastAPIOffline
from pydantic import Field, create_model
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import irkit
from irkit.engine.worker import DEVICE
from irkit.errors import IrkitError
from irkit.options import GenerateOptions, LoadOptions, Options, ServeOptions
from irkit.results import Generation
from irkit.server import memory, metrics, ollama, openai, tokens
from irkit.server.captures import Format, bounded, sent, without_traces
from irkit.server.errors import fault
from irkit.server.places import TakesPlace
from irkit.server.replies import json_response
from irkit.server.requests import body_of, read
from irkit.server.security import KnownOriginsOnly, LocalHostsOnly, WithKeyOnly, allowed_origins, api_key, is_loopback
from irkit.server.sessions import Sessions
from irkit.server.streams import answer_lines, answer_once
from irkit.trace import Trace
from irkit.verbs import REQUIRED, Parameter, Verb, load_parameters, verbs

WITHOUT_ROUTE = {"chat", "close", "generate", "embed"}
"""Verbs that need a terminal, close the server's sessions, or have their route in Ollama's shape."""


_COMPUTE_NOTHING = {"tokenize", "detokenize", "info", "reset"}


class CloseRequest(Options):
    """The body of `POST /api/close`."""

    model: str
    """The name of a model."""


def create_app(options: ServeOptions | None = None) -> FastAPI:
    """The ASGI application of `irkit serve`; on a loopback address it answers to local names only."""
    serving = options or ServeOptions()
    sessions = Sessions(serving)
    counts = metrics.Metrics(sessions)
    sessions.observer = counts.observe
    DEVICE.most = serving.parallel

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        giving_back = asyncio.create_task(memory.give_back())
        yield
        giving_back.cancel()
        await sessions.close()

    app = FastAPIOffline(title="irkit", version=irkit.__version__, lifespan=lifespan, redoc_url=None)
    app.state.sessions, app.state.metrics = sessions, counts
    for kind in (IrkitError, HTTPException, Exception):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    # Those added last come first.
    app.add_middleware(TakesPlace, places=sessions.places)
    if key := api_key(serving):
        app.add_middleware(WithKeyOnly, key=key)
    origins = allowed_origins(serving.origins)
    app.add_middleware(CORSMiddleware, allow_origin_regex=origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(KnownOriginsOnly, origins=origins)
    if is_loopback(serving.host):
        app.add_middleware(LocalHostsOnly)
    app.add_middleware(metrics.CountsRequests, metrics=counts)

    @app.head("/", include_in_schema=False)
    @app.get("/", response_class=PlainTextResponse)
    def root() -> str:
        """Say that the server runs."""
        return "Ollama is running"  # the very words that clients look for

    @app.get("/api/health")
    def health() -> dict[str, str]:
        """Say that the server answers."""
        return {"status": "ok"}

    @app.post("/api/close", openapi_extra=body_of(CloseRequest))
    async def close(request: Request) -> dict[str, Any]:
        """Cancel what is running with a model, and let go of it."""
        asked = await read(request, CloseRequest)
        await sessions.close(asked.model)
        return {"model": asked.model, "result": None}

    app.include_router(ollama.router(sessions, serving.budget))
    app.include_router(openai.router(sessions, serving.budget))
    app.include_router(tokens.router(sessions))
    app.include_router(metrics.router(counts))
    for verb in verbs().values():
        if verb.name not in WITHOUT_ROUTE:
            _add_verb(app, sessions, verb, serving.budget)
    return app


def request_model(verb: Verb) -> type[Options]:
    """The body of a verb's route: the model, the verb's parameters, and how the model is opened."""
    model, *load = load_parameters()
    fields: dict[str, Any] = {"model": (str, Field(description=model.help))}
    fields |= {parameter.name: _field(parameter) for parameter in (*verb.parameters, *load)}
    if verb.streams:
        fields["stream"] = (bool, Field(True, description="Send each token as a line of JSON, then the result."))
    if "capture" in fields:
        fields["capture_format"] = (Format, "safetensors")
    if verb.result is Trace:
        fields["format"] = (Format, "safetensors")
    return create_model(f"{verb.name.title()}Request", __base__=Options, **fields)


def _field(parameter: Parameter) -> tuple[Any, Any]:
    default = ... if parameter.default is REQUIRED else parameter.default
    return parameter.annotation, Field(default, description=parameter.help)


def _add_verb(app: FastAPI, sessions: Sessions, verb: Verb, budget: int) -> None:
    """Adds `POST /api/<verb>`, which replies {"model", "result"}, after the tokens if it streams.

    What it traces or captures may take as many bytes as `budget`.
    """
    body = request_model(verb)
    names = [parameter.name for parameter in verb.parameters]

    @app.post(f"/api/{verb.name}", name=verb.name, description=verb.summary, openapi_extra=body_of(body))
    async def call(request: Request) -> Response:
        asked: Any = await read(request, body)
        given: Mapping[str, Any] = dict(asked)
        load = LoadOptions(**{name: given[name] for name in LoadOptions.model_fields})
        session = await sessions.get(asked.model, load, computes=verb.name not in _COMPUTE_NOTHING)
        # What was left out is the model's own to set, if it has been made with options.
        wanted = [n for n in names if n not in GenerateOptions.model_fields or n in asked.model_fields_set]
        arguments = bounded({name: given[name] for name in wanted}, budget)
        ask = partial(getattr(session, verb.name), **arguments)
        if verb.streams:
            generation: Generation = await to_thread.run_sync(ask)
            put = partial(sent, format=asked.capture_format)
            if asked.stream:
                return await answer_lines(request, generation, _tokens(asked.model, generation, put))
            return await answer_once(request, generation, _result(asked.model, generation, put))

        def made() -> Response:
            return json_response({"model": asked.model, "result": sent(ask(), given.get("format", "json"))})

        return await sessions.compute(made)


async def _tokens(model: str, generation: Generation, put: Callable[[Any], Any]) -> AsyncIterator[dict[str, Any]]:
    async for token in generation:
        yield put(token) if token.captures is None else await to_thread.run_sync(put, token)
    yield await _result(model, generation, without_traces)


async def _result(model: str, generation: Generation, put: Callable[[Any], Any]) -> dict[str, Any]:
    async for _ in generation:
        pass  # its end is awaited without holding a thread
    return {"model": model, "result": await to_thread.run_sync(put, generation)}


async def _on_error(request: Request, error: Exception) -> Response:
    headers = error.headers if isinstance(error, HTTPException) else None
    return fault(error).reply(request.url.path, headers)  # the server logs what nobody expected


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody reads it
