"""OpenAI's API over the verbs of a `Session`: its requests, its server-sent events, its names.

The shapes are those of https://platform.openai.com/docs/api-reference. What irkit has beside them (`top_k`, `num_ctx`,
`capture`, ...) are fields of the same requests, under the names they have everywhere.
"""

import base64
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.responses import Response

from irkit import hub
from irkit.as_json import as_json
from irkit.errors import ModelNotFoundError, OptionError
from irkit.options import EmbedOptions, Options
from irkit.results import Generation, Score
from irkit.server.captures import bounded, sent
from irkit.server.openai.choices import Begun, Reply, Shown, chat_pieces, text_pieces
from irkit.server.openai.requests import (
    COMPLETION_TOKENS,
    AnswerRequest,
    ChatRequest,
    CompletionRequest,
    EmbeddingsRequest,
    function_of,
    message_of,
    texts_of,
)
from irkit.server.replies import json_response
from irkit.server.requests import body_of, read
from irkit.server.sessions import Sessions
from irkit.server.streams import answer_events, answer_once, cancelled_with_client
from irkit.session import Session
from irkit.tokenizer import AnswerReader
from irkit.tokenizer.answers import Forms


def router(sessions: Sessions, budget: int) -> APIRouter:
    """OpenAI's routes, over `sessions`; what a request captures may take as many bytes as `budget`."""
    routes = APIRouter(prefix="/v1", tags=["openai"])

    @routes.get("/models")
    def models() -> dict[str, Any]:
        """List the models on the server's machine."""
        found = {name: _model(name, 0) for name in sessions.lent}
        found |= {manifest.name: _listed(manifest) for manifest in hub.models()}
        return {"object": "list", "data": [*found.values()]}

    @routes.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """Say whether there is a model of this name."""
        known = await sessions.name_of(name)
        if known in sessions.lent:
            return _model(known, 0)
        found = await to_thread.run_sync(hub.find, known)
        if found is None:
            raise ModelNotFoundError(f"model '{name}' is not on this machine; it is fetched when it is first used")
        return _listed(found)

    @routes.post("/chat/completions", openapi_extra=body_of(ChatRequest))
    async def chat(request: Request) -> Response:
        """Answer a conversation."""
        asked = await read(request, ChatRequest)
        _refuse(asked, "audio", "functions", "function_call", "web_search_options")
        messages = [message_of(given, f"messages[{index}]") for index, given in enumerate(asked.messages)]
        session = await sessions.get(asked.model, asked.load)
        template = await to_thread.run_sync(lambda: session.template)
        tools, think, formed = asked.offered, asked.thinks, "format" in asked.options
        if tools and not (formed or template.calls_tools):
            raise OptionError(f"model '{asked.model}' does not support tools", "tools")
        if formed and think:
            raise OptionError("there is no thinking before an answer that has a form from its first token on", "think")
        think = False if formed else think

        def reader() -> AnswerReader:
            if asked.forced and tools:
                return AnswerReader(Forms(calls=("{",)), [function_of(tool)["name"] for tool in tools])
            return template.reader(tools, think)

        begun = await begin(request, asked, [partial(session.respond, messages, tools, think=think)])
        pieces = []
        for index, answer in enumerate(begun[0].generations):
            shown, read_by = _shown(asked, session, index, asked.logprobs), await to_thread.run_sync(reader)
            pieces.append(chat_pieces(shown, answer, read_by, several=asked.parallel_tool_calls))
        return await reply(request, asked, Reply(asked.model, "chat.completion", begun, pieces, _counts(asked)))

    @routes.post("/completions", openapi_extra=body_of(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Continue a text, or several."""
        asked = await read(request, CompletionRequest)
        if asked.best_of not in (None, asked.n):
            raise OptionError('"best_of" is not supported: ask for n answers, with logprobs, and choose', "best_of")
        prompts = asked.prompts
        session = await sessions.get(asked.model, asked.load)
        if "num_predict" not in asked.options and session.defaults.num_predict < 0:
            asked = asked.model_copy(update={"max_tokens": COMPLETION_TOKENS})
        if asked.suffix:
            prompts = await to_thread.run_sync(lambda: [_around(session, prompt, asked) for prompt in prompts])
        scores: list[Score | None] = [None] * len(prompts)
        if asked.echo and asked.logprobs is not None:
            if asked.edits:
                raise OptionError('"edits" do not go into the log-probabilities of a prompt: leave out "echo"', "edits")
            score = partial(session.score, top_logprobs=asked.logprobs)
            scores = [await sessions.compute(partial(score, prompt)) for prompt in prompts]
        # To give the log-probabilities of a text, no answer needs to be begun.
        only_scored = asked.options.get("num_predict") == 0 and all(scores)
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

    async def begin(request: Request, asked: AnswerRequest, asks: Sequence[Callable[..., Generation]]) -> list[Begun]:
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

    async def reply(request: Request, asked: AnswerRequest, made: Reply) -> Response:
        if asked.stream:
            return await answer_events(request, made, made.chunks())
        return await answer_once(request, made, made.whole())

    @routes.post("/embeddings", openapi_extra=body_of(EmbeddingsRequest))
    async def embeddings(request: Request) -> Response:
        """Turn texts into vectors."""
        asked = await read(request, EmbeddingsRequest)
        options = {name: getattr(asked, name) for name in EmbedOptions.model_fields}
        session = await sessions.get(asked.model, asked.load)
        own = session.model.config.d_model
        if asked.dimensions not in (None, own):
            raise OptionError(f'option "dimensions" must be {own}, which the vectors of this model have', "dimensions")

        def made() -> Response:
            rows = [session.tokenize(text) if isinstance(text, str) else text for text in texts_of(asked.input)]
            tokens, vectors = sum(map(len, rows)), session.embed(rows, **options)
            put = _base64 if asked.encoding_format == "base64" else as_json
            data = [{"object": "embedding", "index": i, "embedding": put(vector)} for i, vector in enumerate(vectors)]
            usage = {"prompt_tokens": tokens, "total_tokens": tokens}
            return json_response({"object": "list", "data": data, "model": asked.model, "usage": usage})

        return await sessions.compute(made)

    return routes


def _around(session: Session, prompt: str | Sequence[int], asked: CompletionRequest) -> list[int]:
    """The prompt for what belongs between `prompt` and the suffix."""
    tokenizer = session.model.tokenizer
    if not tokenizer.fills_in:
        raise OptionError(f"model '{asked.model}' does not support filling in before a suffix", "suffix")
    if asked.echo or not isinstance(prompt, str):
        raise OptionError('"suffix" goes with a prompt that is text, and without "echo"', "suffix")
    return tokenizer.encode_around(prompt, asked.suffix)


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _counts(asked: AnswerRequest) -> bool:
    return bool(asked.stream_options.get("include_usage"))


def _shown(asked: AnswerRequest, session: Session, index: int, logprobs: bool) -> Shown:
    captures = None if asked.capture is None else partial(sent, format=asked.capture_format)
    return Shown(session, index, logprobs, captures)


def _refuse(asked: Options, *names: str) -> None:
    # To answer as if they had not been asked for would be worse than to say so.
    for name in names:
        if getattr(asked, name):
            raise OptionError(f'"{name}" is not supported', name)


def _listed(manifest: hub.Manifest) -> dict[str, Any]:
    return _model(manifest.name, int(manifest.added_at.timestamp()))


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "irkit"}
