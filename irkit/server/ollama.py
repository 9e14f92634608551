"""Ollama's API over the verbs of a `Session`: its requests, its streams of JSON lines, its names.

The shapes are those of https://github.com/ollama/ollama/blob/main/docs/api.md.
"""

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ConfigDict, Field, model_validator

import irkit
from irkit import hub
from irkit.as_json import as_json
from irkit.errors import IrkitError, OptionError
from irkit.options import Captures, Edits, EmbedOptions, GenerateOptions, LoadOptions, Options, parse
from irkit.results import Generation, Token
from irkit.server.captures import Format, bounded, sent
from irkit.server.requests import body_of, read
from irkit.server.sessions import Sessions, known
from irkit.server.streams import answer_lines, answer_once
from irkit.session import Session

API_VERSION = "0.33.0"
"""The release of Ollama whose API this follows: clients compare it with what they need."""

IGNORED = re.compile(
    "mirostat(_tau|_eta)?|tfs_z|penalize_newline|num_(keep|gpu|thread|batch)|main_gpu|low_vram|f16_kv|numa|"
    "logits_all|vocab_only|use_m(map|lock)|embedding_only"
)
"""Options that clients still send, and that have no meaning here."""

_DONE_REASONS = {"stop": "stop", "length": "length", "context": "length"}

_Kind = TypeVar("_Kind", bound=Options)
_log = logging.getLogger("irkit.server")


def _properties(*models: type[Options]) -> dict[str, Any]:
    """What the schemas of `models` say of their fields."""
    return {k: v for model in models for k, v in model.model_json_schema()["properties"].items()}


class _OllamaRequest(Options):
    model_config = ConfigDict(extra="ignore")

    model: str = ""
    """The name of a model."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None}


class _AnswerRequest(_OllamaRequest):
    stream: bool = True
    """Send the answer piece by piece, as lines of JSON, not as one object."""
    options: dict[str, Any] = Field({}, json_schema_extra={"properties": _properties(GenerateOptions, LoadOptions)})
    """How the answer is made, and how the model is opened."""
    keep_alive: float | str = 300
    """With an empty prompt, 0 lets go of the model."""
    logprobs: bool = False
    """Report the log-probability of each token."""
    top_logprobs: Any = Field(None, json_schema_extra=_properties(GenerateOptions)["top_logprobs"])
    format: Any = None
    """Not supported."""
    think: Any = None
    """Not supported."""
    capture: Captures = None
    edits: Edits = None
    capture_format: Format = "safetensors"


class GenerateRequest(_AnswerRequest):
    """The body of `POST /api/generate`."""

    prompt: str = ""
    """What to answer; if it is empty, the model is loaded."""
    system: str = ""
    """What the model is told before the prompt."""
    raw: bool = False
    """Continue the prompt as it is, without the chat template."""
    suffix: Any = None
    """Not supported."""
    template: Any = None
    """Not supported."""
    context: Any = None
    """Not supported."""
    images: Any = None
    """Not supported."""


class ChatRequest(_AnswerRequest):
    """The body of `POST /api/chat`."""

    messages: list[dict[str, Any]] = Field([])
    """The conversation; if it is empty, the model is loaded."""
    tools: list[dict[str, Any]] = Field([])
    """Tools the model may call, as JSON schemas."""


class EmbedRequest(_OllamaRequest):
    """The body of `POST /api/embed`."""

    input: str | list[str] = Field([])
    """One text or several."""
    options: dict[str, Any] = Field({}, json_schema_extra={"properties": _properties(EmbedOptions, LoadOptions)})
    """How vectors are made, and how the model is opened."""
    dimensions: Any = None
    """Not supported."""


class DeleteRequest(_OllamaRequest):
    """The body of `DELETE /api/delete`."""

    name: str = ""
    """The name of a model, as older clients call it."""


@dataclass(frozen=True)
class _Answer:
    """One answer on its way to a client, who sees its text as `shape` puts it."""

    asked: _AnswerRequest
    session: Session
    generation: Generation
    shape: Callable[[str], dict[str, Any]]
    began: float

    async def objects(self, *, captures: bool = True) -> AsyncIterator[dict[str, Any]]:
        """An object for each piece of text, and the last one, with counts and times."""
        async for token in self.generation:
            entries: dict[str, Any] = {"logprobs": [_logprob(self.session, token)]} if self.asked.logprobs else {}
            if captures and token.captures is not None:
                entries["captures"] = await self._sent(token.captures)
            if token.text or entries:
                yield self._object(token.text) | entries
        if self.generation.tail:
            yield self._object(self.generation.tail)
        yield self._last()

    async def one(self) -> dict[str, Any]:
        """The whole answer."""
        pieces = [piece async for piece in self.objects(captures=False)]
        entries = [entry for piece in pieces for entry in piece.get("logprobs", ())]
        whole = pieces[-1] | self.shape(self.generation.text) | ({"logprobs": entries} if entries else {})
        if self.asked.capture is not None:
            whole["captures"] = await self._sent([token.captures for token in self.generation.tokens])
        return whole

    async def _sent(self, captures: Any) -> Any:
        return await to_thread.run_sync(sent, captures, self.asked.capture_format)

    def _object(self, text: str) -> dict[str, Any]:
        return _head(self.asked) | self.shape(text) | {"done": False}

    def _last(self) -> dict[str, Any]:
        reason, stats = self.generation.finish_reason, self.generation.stats
        if reason not in _DONE_REASONS:
            raise IrkitError("the answer was cancelled")
        return self._object("") | {
            "done": True,
            "done_reason": _DONE_REASONS[reason],
            "total_duration": _ns(time.perf_counter() - self.began),
            "load_duration": _ns(stats.load_seconds),
            "prompt_eval_count": stats.prompt_tokens,
            "prompt_eval_duration": _ns(stats.prefill_seconds),
            "eval_count": stats.tokens,
            "eval_duration": _ns(stats.decode_seconds),
        }


def router(sessions: Sessions, budget: int) -> APIRouter:
    """Ollama's routes, over `sessions`; what an answer captures may take as many bytes as `budget`."""
    routes = APIRouter(prefix="/api", tags=["ollama"])

    @routes.post("/generate", openapi_extra=body_of(GenerateRequest))
    async def generate(request: Request) -> Response:
        """Answer a prompt."""
        asked = await read(request, GenerateRequest)
        _refuse(asked, "suffix", "template", "context", "images", "format", "think")
        if asked.raw:
            ask = partial(Session.generate, prompt=asked.prompt)
        else:
            opening = [{"role": "system", "content": asked.system}] if asked.system else []
            messages = [*opening, {"role": "user", "content": asked.prompt}]
            ask = partial(Session.respond, messages=messages)
        return await answer(request, asked, ask if asked.prompt else None, lambda text: {"response": text})

    @routes.post("/chat", openapi_extra=body_of(ChatRequest))
    async def chat(request: Request) -> Response:
        """Answer a conversation."""
        asked = await read(request, ChatRequest)
        _refuse(asked, "format", "think")
        if any(message.get("images") for message in asked.messages):
            raise OptionError("images are not supported")
        ask = partial(Session.respond, messages=asked.messages, tools=asked.tools or None)
        return await answer(
            request,
            asked,
            ask if asked.messages else None,
            lambda text: {"message": {"role": "assistant", "content": text}},
        )

    async def answer(
        request: Request,
        asked: _AnswerRequest,
        ask: Callable[..., Generation] | None,
        shape: Callable[[str], dict[str, Any]],
    ) -> Response:
        began = time.perf_counter()
        top = {"top_logprobs": asked.top_logprobs} if asked.logprobs else {}
        options, load = _picked(asked.options | top, GenerateOptions)
        if ask is None and asked.keep_alive in (0, "0", "0s"):
            await sessions.close(asked.model)
            return JSONResponse(_head(asked) | shape("") | {"done": True, "done_reason": "unload"})
        session = await sessions.get(asked.model, load)
        if ask is None:
            await asyncio.wrap_future(session.model.load())
            return JSONResponse(_head(asked) | shape("") | {"done": True, "done_reason": "load"})
        taps = bounded({"capture": asked.capture, "edits": asked.edits}, budget)
        generation = await to_thread.run_sync(lambda: ask(session, **taps, **options.model_dump(exclude_unset=True)))
        made = _Answer(asked, session, generation, shape, began)
        if asked.stream:
            return await answer_lines(request, generation, made.objects())
        return await answer_once(request, generation, made.one())

    @routes.post("/embed", openapi_extra=body_of(EmbedRequest))
    async def embed(request: Request) -> Response:
        """Turn texts into vectors."""
        began = time.perf_counter()
        asked = await read(request, EmbedRequest)
        _refuse(asked, "dimensions")
        options, load = _picked(asked.options, EmbedOptions)
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        session = await sessions.get(asked.model, load)
        opened = time.perf_counter()
        vectors = await sessions.compute(lambda: session.embed(texts, **dict(options)))
        counts = await sessions.compute(lambda: sum(len(session.tokenize(text)) for text in texts))
        return JSONResponse(
            {
                "model": asked.model,
                "embeddings": as_json(vectors),
                "total_duration": _ns(time.perf_counter() - began),
                "load_duration": _ns(opened - began),
                "prompt_eval_count": counts,
            }
        )

    @routes.head("/tags", include_in_schema=False)
    @routes.get("/tags")
    def tags() -> dict[str, Any]:
        """List the models on the server's machine."""
        return {"models": [_tag(manifest) for manifest in hub.models()]}

    @routes.delete("/delete", openapi_extra=body_of(DeleteRequest))
    async def delete(request: Request) -> Response:
        """Remove a model."""
        asked = await read(request, DeleteRequest)
        name = await to_thread.run_sync(known, asked.model or asked.name)
        await sessions.close(name)
        await to_thread.run_sync(hub.remove, name)
        return Response()

    @routes.head("/version", include_in_schema=False)
    @routes.get("/version")
    def version() -> dict[str, str]:
        """Say which version of Ollama's API this is, and of irkit."""
        return {"version": API_VERSION, "irkit": irkit.__version__}

    return routes


def _picked(options: Mapping[str, Any], kind: type[_Kind]) -> tuple[_Kind, LoadOptions]:
    """The fields of `kind`, and of `LoadOptions`, in the `options` of a request; what nothing has is logged."""
    given = {name: value for name, value in options.items() if value is not None}
    known = kind.model_fields | LoadOptions.model_fields | GenerateOptions.model_fields
    unknown = [name[:80] for name in given if name not in known and not IGNORED.fullmatch(name)]
    if unknown:
        _log.warning("unknown options, left out: %s", ", ".join(unknown))
    return _parse_some(kind, given), _parse_some(LoadOptions, given)


def _parse_some(kind: type[_Kind], given: Mapping[str, Any]) -> _Kind:
    return parse(kind, {name: value for name, value in given.items() if name in kind.model_fields})


def _refuse(asked: Options, *names: str) -> None:
    # To answer as if they had not been asked for would be worse than to say so.
    for name in names:
        if getattr(asked, name):
            raise OptionError(f'"{name}" is not supported')


def _head(asked: _AnswerRequest) -> dict[str, Any]:
    now = datetime.now(UTC)
    return {"model": asked.model, "created_at": now.isoformat().replace("+00:00", "Z")}


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _logprob(session: Session, token: Token) -> dict[str, Any]:
    def entry(id: int, logprob: float | None) -> dict[str, Any]:
        tokenizer = session.model.tokenizer
        # A token may hold part of a character: its bytes say which.
        return {"token": session.detokenize([id]), "logprob": logprob, "bytes": [*tokenizer.token_bytes(id)]}

    tops = [entry(top.id, top.logprob) for top in token.top]
    return entry(token.id, token.logprob) | {"top_logprobs": tops}


def _tag(manifest: hub.Manifest) -> dict[str, Any]:
    return {
        "name": manifest.name,
        "model": manifest.name,
        "modified_at": manifest.added_at.isoformat(),
        "size": manifest.size,
        "digest": manifest.sha256,
        "details": {
            "parent_model": "",
            "format": "gguf",
            "family": manifest.architecture,
            "families": [manifest.architecture],
            "parameter_size": f"{manifest.parameters / 1e6:.1f}M",
            "quantization_level": manifest.quantization,
        },
    }
