"""Ollama's routes that compute: generate, chat, embed and embeddings."""

import asyncio
import secrets
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from irkit import hub
from irkit.as_json import as_json
from irkit.errors import ContextFullError, IrkitError, OptionError
from irkit.options import EmbedOptions
from irkit.results import Generation
from irkit.server.captures import bounded, sent
from irkit.server.ollama.requests import (
    AnswerRequest,
    ChatRequest,
    EmbeddingsRequest,
    EmbedRequest,
    GenerateRequest,
    picked,
    refuse,
)
from irkit.server.openai.choices import logprob_entry
from irkit.server.replies import json_response
from irkit.server.requests import body_of, read
from irkit.server.sessions import Sessions
from irkit.server.streams import answer_lines, answer_once
from irkit.session import Session
from irkit.tokenizer.answers import AnswerReader, Content, Forms, Part, Thinking, ToolCall

_DONE_REASONS = {"stop": "stop", "length": "length", "context": "length"}

Begin = Callable[..., tuple[Generation, AnswerReader]]
"""From a session and the options of an answer to the answer, begun, and what tells its parts apart."""


def router(sessions: Sessions, budget: int) -> APIRouter:
    """These routes, over `sessions`; what an answer captures may take as many bytes as `budget`."""
    routes = APIRouter()

    @routes.post("/generate", openapi_extra=body_of(GenerateRequest))
    async def generate(request: Request) -> Response:
        """Answer a prompt."""
        asked = await read(request, GenerateRequest)
        refuse(asked, "images", "truncate", "shift")
        if asked.raw and (asked.system or asked.template or asked.context or asked.suffix):
            raise OptionError("raw mode does not support suffix, template, system, or context")
        return await answer(request, asked, partial(_generated, asked) if asked.prompt else None, _as_response)

    @routes.post("/chat", openapi_extra=body_of(ChatRequest))
    async def chat(request: Request) -> Response:
        """Answer a conversation."""
        asked = await read(request, ChatRequest)
        refuse(asked, "shift")
        messages = [_message(message) for message in asked.messages]
        return await answer(request, asked, partial(_responded, asked, messages) if messages else None, _as_message)

    async def answer(
        request: Request, asked: AnswerRequest, begin: Begin | None, shape: Callable[[Sequence[Part]], dict[str, Any]]
    ) -> Response:
        began = time.perf_counter()
        options, load = asked.picked()
        if begin is None and asked.kept == 0:
            await sessions.close(asked.named)
            return JSONResponse(_head(asked) | shape([]) | {"done": True, "done_reason": "unload"})
        session = await sessions.get(asked.named, load, keep_alive=asked.kept)
        if begin is None:
            await asyncio.wrap_future(session.model.load())
            return JSONResponse(_head(asked) | shape([]) | {"done": True, "done_reason": "load"})
        if asked.format and asked.think:
            raise OptionError('"think" does not go with "format": the answer has that form from its first token on')
        taps = bounded({"capture": asked.capture, "edits": asked.edits}, budget)
        given = options.model_dump(exclude_unset=True)
        generation, reader = await to_thread.run_sync(lambda: begin(session, **taps, **given))
        made = _Answer(asked, session, generation, reader, shape, began)
        if asked.stream:
            return await answer_lines(request, generation, made.objects())
        return await answer_once(request, generation, made.one())

    @routes.post("/embed", openapi_extra=body_of(EmbedRequest))
    async def embed(request: Request) -> Response:
        """Turn texts into vectors."""
        began = time.perf_counter()
        asked = await read(request, EmbedRequest)
        options, load = picked(asked.options, EmbedOptions)
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        session = await sessions.get(asked.named, load, keep_alive=asked.kept)
        opened = time.perf_counter()

        def made() -> Response:
            room = session.n_ctx
            ids = [session.tokenize(text) for text in texts]
            rows = [row[:room] if asked.truncate else row or text for row, text in zip(ids, texts, strict=True)]
            vectors = session.embed([row or "" for row in rows], **dict(options))
            return json_response(
                {
                    "model": asked.named,
                    "embeddings": as_json(_shortened(vectors, asked.dimensions, options)),
                    "total_duration": _ns(time.perf_counter() - began),
                    "load_duration": _ns(opened - began),
                    "prompt_eval_count": sum(map(len, rows)),
                }
            )

        return await sessions.compute(made)

    @routes.post("/embeddings", openapi_extra=body_of(EmbeddingsRequest))
    async def embeddings(request: Request) -> Response:
        """Turn a text into a vector, of whatever length it has: what `embed` came after."""
        asked = await read(request, EmbeddingsRequest)
        options, load = picked({"normalize": False} | asked.options, EmbedOptions)
        session = await sessions.get(asked.named, load, keep_alive=asked.kept)
        if not asked.prompt:
            return JSONResponse({"embedding": []})

        def made() -> Response:
            return json_response({"embedding": as_json(session.embed(asked.prompt, **dict(options))[0])})

        return await sessions.compute(made)

    return routes


def _generated(asked: GenerateRequest, session: Session, **options: Any) -> tuple[Generation, AnswerReader]:
    """The answer to a prompt."""
    if asked.raw:
        return session.generate(asked.prompt, **options), AnswerReader(Forms())
    tokenizer = session.model.tokenizer
    if asked.suffix:
        if not tokenizer.fills_in:
            raise OptionError(f"model '{asked.named}' does not support insert")
        return session.generate(tokenizer.encode_around(asked.prompt, asked.suffix), **options), AnswerReader(Forms())
    think = _thinks(asked)
    source = hub.as_jinja(asked.template) if asked.template else None
    if asked.template and source is None:
        raise OptionError("the template, a Go one, is beyond those that can be read here", "template")
    template = session.model.template_of(source) if source else session.template
    opening = [{"role": "system", "content": asked.system}] if asked.system else []
    messages = [*opening, {"role": "user", "content": asked.prompt}]
    if asked.context:
        if asked.think and not template.forms.thinking:
            raise OptionError(f"model '{asked.named}' does not support thinking")
        turn = template.encode(tokenizer, messages, add_special=False, think=think)
        generation = session.generate([*asked.context, *turn], **options)
    else:
        generation = session.respond(messages, think=think, template=source, **options)
    return generation, template.reader(think=think)


def _responded(
    asked: ChatRequest, messages: Sequence[Mapping[str, Any]], session: Session, **options: Any
) -> tuple[Generation, AnswerReader]:
    """The answer to a conversation."""
    if asked.tools and not session.template.calls_tools:
        raise OptionError(f"model '{asked.named}' does not support tools")
    think = _thinks(asked)
    if asked.truncate:
        messages = _fitting(messages, session, asked.tools or None, think)
    generation = session.respond(messages, asked.tools or None, think=think, **options)
    return generation, session.template.reader(asked.tools, think)


def _fitting(
    messages: Sequence[Mapping[str, Any]], session: Session, tools: Any, think: bool | None
) -> Sequence[Mapping[str, Any]]:
    """The messages without the oldest turns, as few as can be, where all do not fit the context.

    A turn goes from what the user says to what the user says next. The last one stays, as does what the system says.
    """
    turns = [at for at, message in enumerate(messages) if message.get("role") == "user"]

    def since(at: int) -> Sequence[Mapping[str, Any]]:
        return [*(message for message in messages[:at] if message.get("role") == "system"), *messages[at:]]

    def fits(at: int) -> bool:
        try:
            return len(session._laid_out(since(at), tools, think)[1]) < session.n_ctx
        except ContextFullError:
            return False

    if not turns or fits(0):
        return messages
    return since(turns[bisect_left(turns[:-1], True, key=fits)])


def _thinks(asked: AnswerRequest) -> bool | None:
    """Whether to think first; not where the answer is to be of some form from its first token on."""
    return False if asked.format else asked.think


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as chat templates want it: they have names of their own for two fields of Ollama's."""
    if message.get("images"):
        raise OptionError("images are not supported")
    names = {"thinking": "reasoning_content", "tool_name": "name"}
    return {names.get(name, name): value for name, value in message.items() if name == "content" or value is not None}


@dataclass(frozen=True)
class _Answer:
    """One answer on its way to a client, who sees its parts as `shape` puts them."""

    asked: AnswerRequest
    session: Session
    generation: Generation
    reader: AnswerReader
    shape: Callable[[Sequence[Part]], dict[str, Any]]
    began: float

    async def objects(self) -> AsyncIterator[dict[str, Any]]:
        """An object for each piece of the answer, and the last one, with counts and times."""
        async for parts, more in self._pieces(captures=True):
            yield _head(self.asked) | self.shape(parts) | {"done": False} | more
        yield self._last([])

    async def one(self) -> dict[str, Any]:
        """The whole answer."""
        whole: list[Part] = []
        entries: list[Any] = []
        async for parts, more in self._pieces(captures=False):
            whole += parts
            entries += more.get("logprobs", ())
        found = self._last(whole) | ({"logprobs": entries} if entries else {})
        if self.asked.capture is not None:
            found["captures"] = await self._sent([token.captures for token in self.generation.tokens])
        return found

    async def _pieces(self, *, captures: bool) -> AsyncIterator[tuple[list[Part], dict[str, Any]]]:
        """The parts that came with each token, and what else is told of it, where there is anything to tell."""
        async for token in self.generation:
            more = {"logprobs": [logprob_entry(self.session, token)]} if self.asked.logprobs else {}
            if captures and token.captures is not None:
                more["captures"] = await self._sent(token.captures)
            parts = self._wanted(self.reader.push(token.text))
            if parts or more:
                yield parts, more
        if parts := self._wanted(self.reader.push(self.generation.tail) + self.reader.flush()):
            yield parts, {}

    def _wanted(self, parts: list[Part]) -> list[Part]:
        # One that thinks though it was not to.
        return [part for part in parts if not isinstance(part, Thinking) or self.asked.think is not False]

    async def _sent(self, captures: Any) -> Any:
        return await to_thread.run_sync(sent, captures, self.asked.capture_format)

    def _last(self, parts: Sequence[Part]) -> dict[str, Any]:
        reason, stats = self.generation.finish_reason, self.generation.stats
        if reason not in _DONE_REASONS:
            raise IrkitError("the answer was cancelled")
        context = {}
        if isinstance(self.asked, GenerateRequest) and not self.asked.raw:
            context["context"] = [*self.generation.prompt, *(token.id for token in self.generation.tokens)]
        return (
            _head(self.asked)
            | self.shape(parts)
            | {
                "done": True,
                "done_reason": _DONE_REASONS[reason],
                **context,
                "total_duration": _ns(time.perf_counter() - self.began),
                "load_duration": _ns(stats.load_seconds),
                "prompt_eval_count": stats.prompt_tokens,
                "prompt_eval_duration": _ns(stats.prefill_seconds),
                "eval_count": stats.tokens,
                "eval_duration": _ns(stats.decode_seconds),
            }
        )


def _as_response(parts: Sequence[Part]) -> dict[str, Any]:
    thinking = _joined(parts, Thinking)
    return {"response": _joined(parts, Content)} | ({"thinking": thinking} if thinking else {})


def _as_message(parts: Sequence[Part]) -> dict[str, Any]:
    thinking = _joined(parts, Thinking)
    calls = [
        {"id": f"call_{secrets.token_hex(4)}", "function": {"name": part.name, "arguments": part.arguments}}
        for part in parts
        if isinstance(part, ToolCall)
    ]
    message: dict[str, Any] = {"role": "assistant", "content": _joined(parts, Content)}
    return {
        "message": message | ({"thinking": thinking} if thinking else {}) | ({"tool_calls": calls} if calls else {})
    }


def _joined(parts: Sequence[Part], kind: type[Content] | type[Thinking]) -> str:
    return "".join(part.text for part in parts if isinstance(part, kind))


def _head(asked: AnswerRequest) -> dict[str, Any]:
    now = datetime.now(UTC)
    return {"model": asked.named, "created_at": now.isoformat().replace("+00:00", "Z")}


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _shortened(vectors: np.ndarray, dimensions: int | None, options: EmbedOptions) -> np.ndarray:
    """The first so many numbers of each of `vectors`, `[text, d_model]`, at length 1 again if that is wanted."""
    if dimensions is None:
        return vectors
    if dimensions > vectors.shape[-1] > 0:
        raise OptionError(f'option "dimensions" must be {vectors.shape[-1]} or less, got {dimensions}', "dimensions")
    short = vectors[:, :dimensions]
    if options.normalize:
        short = short / np.maximum(np.linalg.norm(short, axis=-1, keepdims=True), 1e-12)
    return short
