"""OpenAI's API over the verbs of a `Session`: its requests, its server-sent events, its names.

The shapes are those of https://platform.openai.com/docs/api-reference. What irkit has beside them (`top_k`, `num_ctx`,
`capture`, ...) are fields of the same requests, under the names they have everywhere.
"""

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, field_validator, model_validator

from irkit import hub
from irkit.as_json import as_json
from irkit.errors import ModelNotFoundError, OptionError
from irkit.options import Captures, Edits, EmbedOptions, GenerateOptions, LoadOptions, Options, Texts
from irkit.results import Generation, Score
from irkit.server.captures import Format, bounded, sent
from irkit.server.choices import Begun, Reply, Shown, chat_pieces, text_pieces
from irkit.server.requests import body_of, read
from irkit.server.sessions import Sessions, known
from irkit.server.streams import answer_events, answer_once, cancelled_with_client
from irkit.session import Session

IGNORED = {
    "metadata",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
}
"""Fields that say nothing about the answer here: they are for OpenAI's own service."""

MAX_CHOICES = 128
"""The most answers of one request."""

COMPLETION_TOKENS = 16
"""What `max_tokens` is for completions where it is left out: OpenAI's default, as a text may go on for ever."""


class _OpenAIRequest(Options):
    model: str
    """The name of a model."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None and name not in IGNORED}


class _AnswerRequest(_OpenAIRequest, GenerateOptions, LoadOptions):
    stream: bool = False
    """Send the answer piece by piece, as server-sent events."""
    stream_options: dict[str, Any] = Field({})
    """With `include_usage`, a stream ends with the counts of tokens."""
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    """How many answers to make; each draws with a seed of its own, the first one's plus 1, 2, ..."""
    max_tokens: int | None = Field(default=None, ge=-1, le=1 << 24)
    """The same as `num_predict`."""
    capture: Captures = None
    edits: Edits = None
    capture_format: Format = "safetensors"

    @property
    def load(self) -> LoadOptions:
        """How the model is opened."""
        return LoadOptions(**{name: getattr(self, name) for name in LoadOptions.model_fields})

    @property
    def options(self) -> dict[str, Any]:
        """How answers are made, as far as the request says: the rest is the model's own to set."""
        given = self.model_dump(include=self.model_fields_set & GenerateOptions.model_fields.keys())
        return given | ({} if self.max_tokens is None else {"num_predict": self.max_tokens})


class ChatRequest(_AnswerRequest):
    """The body of `POST /v1/chat/completions`."""

    messages: list[dict[str, Any]]
    """The conversation."""
    max_completion_tokens: int | None = Field(default=None, ge=-1, le=1 << 24)
    """The same as `num_predict`."""
    logprobs: bool = False
    """Report the log-probability of each token, and those of `top_logprobs` others."""
    tools: list[dict[str, Any]] = Field([])
    """Tools the model may call."""
    audio: Any = None
    """Not supported."""
    modalities: list[Literal["text"]] = Field(["text"])
    """What to answer with."""
    functions: Any = None
    """Not supported: `tools` are what came after it."""
    function_call: Any = None
    """Not supported."""
    web_search_options: Any = None
    """Not supported."""

    @property
    def options(self) -> dict[str, Any]:
        """How answers are made."""
        most = self.max_completion_tokens
        top = self.top_logprobs if self.logprobs else 0
        return super().options | {"top_logprobs": top} | ({} if most is None else {"num_predict": most})


class CompletionRequest(_AnswerRequest):
    """The body of `POST /v1/completions`."""

    prompt: Texts
    """One text or several, each a string or token ids."""
    echo: bool = False
    """Put the prompt before what follows it; with `logprobs`, its tokens have theirs."""
    logprobs: int | None = Field(default=None, ge=0, le=20)
    """Report the log-probability of each token, and of that many of the likeliest in its place."""
    best_of: int | None = None
    """Not supported, where it is more than `n`."""
    suffix: Any = None
    """Not supported."""

    @property
    def options(self) -> dict[str, Any]:
        """How answers are made."""
        return {"num_predict": COMPLETION_TOKENS} | super().options | {"top_logprobs": self.logprobs or 0}

    @property
    def prompts(self) -> list[str | Sequence[int]]:
        """Each of the prompts."""
        several = _several(self.prompt)
        if not 0 < len(several) * self.n <= MAX_CHOICES:
            raise OptionError(
                f"prompt: there may be {MAX_CHOICES} answers at once, got {len(several)} prompts of {self.n}", "prompt"
            )
        return several


class EmbeddingsRequest(_OpenAIRequest, EmbedOptions, LoadOptions):
    """The body of `POST /v1/embeddings`."""

    input: Texts
    """One text or several, each a string or token ids."""
    encoding_format: Literal["float", "base64"] = "float"
    """Lists of numbers, or the bytes of little-endian float32 in base64."""
    dimensions: int | None = None
    """The length of a vector: only the model's own can be had."""

    @field_validator("input")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        several = _several(value)
        if not several or not all(map(len, several)):
            raise ValueError("there must be a text, and none that is empty")
        return several


def router(sessions: Sessions, budget: int) -> APIRouter:
    """OpenAI's routes, over `sessions`; what a request captures may take as many bytes as `budget`."""
    routes = APIRouter(prefix="/v1", tags=["openai"])

    @routes.get("/models")
    def models() -> dict[str, Any]:
        """List the models on the server's machine."""
        lent = [_model(name, 0) for name in sessions.lent]
        return {"object": "list", "data": [*lent, *map(_listed, hub.models())]}

    @routes.get("/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        """Say whether there is a model of this name."""
        if name in sessions.lent:
            return _model(name, 0)
        found = hub.find(known(name))
        if found is None:
            raise ModelNotFoundError(f"model '{name}' is not on this machine; it is fetched when it is first used")
        return _listed(found)

    @routes.post("/chat/completions", openapi_extra=body_of(ChatRequest))
    async def chat(request: Request) -> Response:
        """Answer a conversation."""
        asked = await read(request, ChatRequest)
        _refuse(asked, "audio", "functions", "function_call", "web_search_options")
        messages = [_message(message, f"messages[{index}]") for index, message in enumerate(asked.messages)]
        session = await sessions.get(asked.model, asked.load)
        ask = partial(session.respond, messages, asked.tools or None)
        begun = await begin(request, asked, [ask])
        answers = begun[0].generations
        pieces = [chat_pieces(_shown(asked, session, i, asked.logprobs), answer) for i, answer in enumerate(answers)]
        return await reply(request, asked, Reply(asked.model, "chat.completion", begun, pieces, _counts(asked)))

    @routes.post("/completions", openapi_extra=body_of(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Continue a text, or several."""
        asked = await read(request, CompletionRequest)
        _refuse(asked, "suffix")
        if asked.best_of not in (None, asked.n):
            raise OptionError('"best_of" is not supported: ask for n answers, with logprobs, and choose', "best_of")
        prompts = asked.prompts
        session = await sessions.get(asked.model, asked.load)
        scores: list[Score | None] = [None] * len(prompts)
        if asked.echo and asked.logprobs is not None:
            score = partial(session.score, top_logprobs=asked.logprobs)
            scores = [await sessions.compute(partial(score, prompt)) for prompt in prompts]
        # To give the log-probabilities of a text, no answer needs to be begun.
        only_scored = asked.options["num_predict"] == 0 and all(scores)
        asks = [partial(session.generate, prompt) for prompt in prompts]
        begun = [Begun([]) for _ in asks] if only_scored else await begin(request, asked, asks)
        begun = [Begun(b.generations, b.reading, score) for b, score in zip(begun, scores, strict=True)]
        pieces = []
        for prompt, part in zip(prompts, begun, strict=True):
            ids = not isinstance(prompt, str)
            echoed = "" if not asked.echo else session.detokenize(prompt) if ids else prompt
            for answer in part.generations or [None] * asked.n:
                shown = _shown(asked, session, len(pieces), asked.logprobs is not None)
                pieces.append(text_pieces(shown, answer, echoed, part.score, ids))
        return await reply(request, asked, Reply(asked.model, "text_completion", begun, pieces, _counts(asked)))

    async def begin(request: Request, asked: _AnswerRequest, asks: Sequence[Callable[..., Generation]]) -> list[Begun]:
        """The answers to each prompt, `n` of them, which share what has been read of it."""
        taps = bounded({"capture": asked.capture, "edits": asked.edits}, budget // (asked.n * len(asks)))
        options, begun = asked.options, []
        seed = options.get("seed", -1)
        several = [options | {"seed": (seed + i) % (1 << 63) if seed >= 0 else -1} for i in range(asked.n)]
        try:
            for ask in asks:
                reading = None
                if asked.n > 1:
                    reading = await to_thread.run_sync(partial(ask, edits=asked.edits, **options | {"num_predict": 0}))
                    async with cancelled_with_client(request, reading):
                        await reading
                begun.append(Begun([], reading))
                for each in several:
                    begun[-1].generations.append(await to_thread.run_sync(partial(ask, **taps, **each)))
        except BaseException:
            for part in begun:
                part.cancel()
            raise
        return begun

    async def reply(request: Request, asked: _AnswerRequest, made: Reply) -> Response:
        if asked.stream:
            return await answer_events(request, made, made.chunks())
        return await answer_once(request, made, made.whole())

    @routes.post("/embeddings", openapi_extra=body_of(EmbeddingsRequest))
    async def embeddings(request: Request) -> Response:
        """Turn texts into vectors."""
        asked = await read(request, EmbeddingsRequest)
        load = LoadOptions(**{name: getattr(asked, name) for name in LoadOptions.model_fields})
        options = {name: getattr(asked, name) for name in EmbedOptions.model_fields}
        session = await sessions.get(asked.model, load)
        own = session.model.config.d_model
        if asked.dimensions not in (None, own):
            raise OptionError(f'option "dimensions" must be {own}, which the vectors of this model have', "dimensions")

        def made() -> tuple[int, np.ndarray]:
            rows = [session.tokenize(text) if isinstance(text, str) else text for text in _several(asked.input)]
            return sum(map(len, rows)), session.embed(rows, **options)

        tokens, vectors = await sessions.compute(made)
        put = _base64 if asked.encoding_format == "base64" else as_json
        data = [{"object": "embedding", "index": i, "embedding": put(vector)} for i, vector in enumerate(vectors)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": asked.model, "usage": usage})

    return routes


def _several(texts: Any) -> list[str | Sequence[int]]:
    """Each of the texts, which may be one, as a string or token ids."""
    one = isinstance(texts, str) or (len(texts) > 0 and isinstance(texts[0], int))
    return [texts] if one else list(texts)


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _counts(asked: _AnswerRequest) -> bool:
    return bool(asked.stream_options.get("include_usage"))


def _shown(asked: _AnswerRequest, session: Session, index: int, logprobs: bool) -> Shown:
    captures = None if asked.capture is None else partial(sent, format=asked.capture_format)
    return Shown(session, index, logprobs, captures)


def _refuse(asked: Options, *names: str) -> None:
    # To answer as if they had not been asked for would be worse than to say so.
    for name in names:
        if getattr(asked, name):
            raise OptionError(f'"{name}" is not supported', name)


def _message(message: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A message as chat templates want it: without what is null, and with the arguments of calls as objects."""
    made = {name: value for name, value in message.items() if value is not None}
    if "content" in message:
        made["content"] = message["content"]
    for part in made["content"] if isinstance(made.get("content"), list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise OptionError(f'{place}: content of type "{kind[:40]}" is not supported, only text is', "messages")
    if isinstance(calls := made.get("tool_calls"), list):
        made["tool_calls"] = [_call(call, place) for call in calls]
    return made


def _call(call: Any, place: str) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"] or "{}")}}
    except ValueError:
        raise OptionError(f"{place}: the arguments of a tool call are not JSON", "messages") from None


def _listed(manifest: hub.Manifest) -> dict[str, Any]:
    return _model(manifest.name, int(manifest.added_at.timestamp()))


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "irkit"}
