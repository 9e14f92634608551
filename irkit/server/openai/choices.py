"""The choices of OpenAI's answers: made piece by piece, and put together where they are not streamed.

A choice that is sent whole is its pieces joined, so that both ways say the same.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import irkit
from irkit.errors import IrkitError
from irkit.results import Generation, Score, Token
from irkit.session import Session
from irkit.tokenizer import AnswerReader, Content, Thinking, ToolCall
from irkit.tokenizer.answers import Part

FINISH_REASONS = {"stop": "stop", "length": "length", "context": "length"}
"""OpenAI's words for why an answer ended."""

Piece = dict[str, Any]
"""A choice in a chunk of a stream."""


@dataclass(frozen=True)
class Begun:
    """A prompt, and the answers to it that are being made."""

    generations: list[Generation]
    reading: Generation | None = None
    """What has read the prompt for all of them, if there are several."""
    score: Score | None = None
    """The log-probabilities of the prompt's own tokens, if they were asked for."""

    def cancel(self) -> None:
        """Ends its answers."""
        for generation in self.generations:
            generation.cancel()

    def usage(self) -> tuple[int, int, int]:
        """Tokens of the prompt, how many of them were in the cache, and tokens made, once all has ended."""
        made = sum(generation.stats.tokens for generation in self.generations)
        if self.score:
            return len(self.score.tokens), 0, made
        stats = (self.reading or self.generations[0]).stats
        return stats.prompt_tokens, stats.cached_tokens, made


@dataclass(frozen=True)
class Reply:
    """What a request is answered with: chunks of its choices, or one object of all of them."""

    model: str
    kind: str
    """`chat.completion` or `text_completion`."""
    begun: Sequence[Begun]
    choices: Sequence[AsyncIterator[Piece]]
    count: bool = False
    """Whether a stream ends with the counts of tokens."""
    name: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def done(self) -> bool:
        """Whether all answers have ended."""
        return all(generation.done for begun in self.begun for generation in begun.generations)

    def cancel(self) -> None:
        """Ends all answers."""
        for begun in self.begun:
            begun.cancel()

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """An object for each piece, of whichever choice is made next."""
        head = self._head(".chunk" if self.kind == "chat.completion" else "")
        uncounted = {"usage": None} if self.count else {}
        async for piece in merged(self.choices):
            yield head | {"choices": [piece]} | uncounted
        if self.count:
            yield head | {"choices": [], "usage": self._usage()}

    async def whole(self) -> dict[str, Any]:
        """One object, when all has ended."""
        pieces = await asyncio.gather(*map(_all, self.choices))
        return self._head("") | {"choices": [*map(joined, pieces)], "usage": self._usage()}

    def _head(self, suffix: str) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.kind == 'chat.completion' else 'cmpl'}-{self.name}",
            "object": self.kind + suffix,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"irkit-{irkit.__version__}",
        }

    def _usage(self) -> dict[str, Any]:
        prompt, cached, made = map(sum, zip(*(begun.usage() for begun in self.begun), strict=True))
        counts = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
        return counts | {"prompt_tokens_details": {"cached_tokens": cached}}


@dataclass(frozen=True)
class Shown:
    """What the pieces of a choice carry besides text."""

    session: Session
    index: int
    logprobs: bool = False
    captures: Callable[[Any], Any] | None = None
    """What puts the trace of a token as JSON, where something is captured; it may take a while."""

    async def of(self, token: Token) -> dict[str, Any]:
        """The captures of a token, if it has any."""
        if self.captures is None or token.captures is None:
            return {}
        return {"captures": [await asyncio.to_thread(self.captures, token.captures)]}


async def chat_pieces(
    shown: Shown, generation: Generation, reader: AnswerReader, *, several: bool = True
) -> AsyncIterator[Piece]:
    """The pieces of a choice of `chat/completions`: the role with the first token, what `reader` finds in the text, and
    how it ended.

    Where there may not be `several` calls of tools, those after the first are left out.
    """
    calls = 0

    def piece(delta: dict[str, Any], entries: Sequence[Any] = (), finish: str | None = None) -> Piece:
        logprobs = {"content": list(entries), "refusal": None} if entries else None
        return {"index": shown.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def deltas(parts: Sequence[Part]) -> Iterator[dict[str, Any]]:
        nonlocal calls
        for part in parts:
            if isinstance(part, Content):
                yield {"content": part.text}
            elif isinstance(part, Thinking):
                yield {"reasoning_content": part.text}
            elif several or not calls:
                yield {"tool_calls": [{"index": calls, **_tool_call(part)}]}
                calls += 1

    first = piece({"role": "assistant", "content": ""})
    async for token in generation:
        if first:
            yield first
            first = None
        entries = [logprob_entry(shown.session, token)] if shown.logprobs else []
        more = await shown.of(token)
        found = [*deltas(reader.push(token.text))]
        if found or entries or more:
            yield piece(found[0] if found else {}, entries) | more
        for delta in found[1:]:
            yield piece(delta)
    if first:
        yield first
    for delta in deltas([*reader.push(generation.tail), *reader.flush()]):
        yield piece(delta)
    reason = finish_reason(generation)
    yield piece({}, finish="tool_calls" if calls and reason == "stop" else reason)


def _tool_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


async def text_pieces(
    shown: Shown, generation: Generation | None, echoed: str = "", score: Score | None = None, ids: bool = False
) -> AsyncIterator[Piece]:
    """The pieces of a choice of `completions`: the prompt, if it is `echoed`, and what follows, if anything does.

    With `score`, the prompt's tokens have log-probabilities too; `ids` says that it was given as token ids.
    """

    def piece(text: str, logprobs: dict[str, list[Any]] | None = None, finish: str | None = None) -> Piece:
        return {"index": shown.index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    offset = len(echoed)
    if echoed or score:
        scored = score.tokens if score and shown.logprobs else ()

        def lists_of_all() -> dict[str, list[Any]]:
            return token_lists(shown.session, scored, offsets(shown.session, scored, ids))

        yield piece(echoed, await asyncio.to_thread(lists_of_all) if scored else None)
    if generation is None:
        yield piece("", finish="length")
        return
    async for token in generation:
        lists = token_lists(shown.session, [token], [offset]) if shown.logprobs else None
        more = await shown.of(token)
        if token.text or lists or more:
            yield piece(token.text, lists) | more
        offset += len(token.text)
    yield piece(generation.tail, finish=finish_reason(generation))


def finish_reason(generation: Generation) -> str:
    """Why an answer ended, in OpenAI's words.

    Raises:
        IrkitError: it was cancelled.
    """
    if generation.finish_reason not in FINISH_REASONS:
        raise IrkitError("the answer was cancelled")
    return FINISH_REASONS[generation.finish_reason]


def logprob_entry(session: Session, token: Token) -> dict[str, Any]:
    """The log-probability of a token, and of the likeliest in its place, as `chat/completions` has them."""

    def entry(id: int, logprob: float | None) -> dict[str, Any]:
        tokenizer = session.model.tokenizer
        # A token may hold part of a character: its bytes say which.
        return {"token": tokenizer.token(id), "logprob": logprob, "bytes": [*tokenizer.token_bytes(id)]}

    tops = [entry(top.id, top.logprob) for top in token.top]
    return entry(token.id, token.logprob) | {"top_logprobs": tops}


def token_lists(session: Session, tokens: Sequence[Token], text_offset: Sequence[int]) -> dict[str, list[Any]]:
    """The log-probabilities of tokens, and of the likeliest in their places, as `completions` has them.

    `text_offset` says at which character of the text each begins.
    """
    tops: list[dict[str, float] | None] = []
    for token in tokens:
        likeliest: dict[str, float] = {}
        for top in token.top:
            likeliest.setdefault(token_name(session, top.id), top.logprob)
        if token.logprob is not None:
            likeliest.setdefault(token_name(session, token.id), token.logprob)
        tops.append(likeliest or None)
    return {
        "tokens": [token_name(session, token.id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": tops,
        "text_offset": list(text_offset),
    }


def token_name(session: Session, id: int) -> str:
    r"""A token as text, or as OpenAI's `bytes:\xe2\x82` where it is no text by itself: names that tell tokens apart."""
    found = session.model.tokenizer.token_bytes(id)
    try:
        return found.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


def offsets(session: Session, tokens: Sequence[Token], ids: bool) -> list[int]:
    """At which character each of `tokens` begins, in the text they were given as, or (`ids`) that they decode to."""
    stream, found, offset = session.model.tokenizer.stream(skip_special=not ids), [], 0
    for token in tokens:
        found.append(offset)
        offset += len(stream.push(token.id))
    return found


def joined(pieces: Sequence[Piece]) -> dict[str, Any]:
    """A whole choice from all of its pieces."""
    whole: dict[str, Any] = {"index": pieces[0]["index"]}
    if "delta" in pieces[0]:
        whole["message"] = _message([piece["delta"] for piece in pieces])
    else:
        whole["text"] = "".join(piece["text"] for piece in pieces)
    whole["logprobs"] = _lists([piece["logprobs"] for piece in pieces if piece["logprobs"]])
    whole["finish_reason"] = pieces[-1]["finish_reason"]
    captures = [capture for piece in pieces for capture in piece.get("captures", ())]
    return whole | ({"captures": captures} if captures else {})


def _message(deltas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    said = "".join(delta.get("content", "") for delta in deltas)
    thought = "".join(delta.get("reasoning_content", "") for delta in deltas)
    calls = [
        {k: v for k, v in call.items() if k != "index"} for delta in deltas for call in delta.get("tool_calls", ())
    ]
    message = {"role": "assistant", "content": said or (None if calls else ""), "refusal": None}
    return message | ({"reasoning_content": thought} if thought else {}) | ({"tool_calls": calls} if calls else {})


def _lists(parts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The lists under each name, one behind the other."""
    if not parts:
        return None
    return {
        name: None if first is None else [item for part in parts for item in part[name]]
        for name, first in parts[0].items()
    }


async def _all(pieces: AsyncIterator[Piece]) -> list[Piece]:
    return [piece async for piece in pieces]


async def merged(sources: Sequence[AsyncIterator[Piece]]) -> AsyncIterator[Piece]:
    """The pieces of all `sources`, each as soon as it is there; the first error ends them all."""
    if len(sources) == 1:
        async for piece in sources[0]:
            yield piece
        return
    arrived: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

    async def pass_on(source: AsyncIterator[Piece]) -> None:
        try:
            async for piece in source:
                arrived.put_nowait(piece)
            arrived.put_nowait(None)
        except Exception as error:
            arrived.put_nowait(error)

    tasks, ended = [asyncio.create_task(pass_on(source)) for source in sources], 0
    try:
        while ended < len(tasks):
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                ended += 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
