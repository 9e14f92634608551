"""Reading texts and making answers, on the device's thread."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from irkit.engine.batch import Decode, room
from irkit.engine.cache import AHEAD
from irkit.engine.runtime import chunk
from irkit.engine.stopping import StopStrings
from irkit.engine.worker import DEVICE, Steps, turn, until_there
from irkit.results import Alternative, FinishReason, Generation, Score, Stats, Token

if TYPE_CHECKING:
    from irkit.engine.cache import Cache
    from irkit.engine.runtime import Runtime
    from irkit.engine.structured import Form
    from irkit.engine.tapping import Tapping
    from irkit.options import GenerateOptions, SamplingOptions
    from irkit.tokenizer import Tokenizer
    from irkit.transformer.cache import KVCache
    from irkit.transformer.sampling import Sampled, Settings

SHARED = 128
"""Tokens of a prompt that are read at once while others wait: about a tenth of a second."""
ALONE = 256
"""Tokens that the CPU's kernels read at once otherwise, since somebody may come meanwhile: 512 were 1 to 3 % faster."""
Shower = Callable[[dict[str, Any], int, int | None], Any]
"""From what a call captured, the tokens that the cache then held, and the pass of several, to what a token carries."""


def generate(
    runtime: Runtime,
    tokenizer: Tokenizer,
    cache: Cache,
    ids: list[int],
    options: GenerateOptions,
    seed: int,
    generation: Generation,
    stopped: Callable[[], bool],
    asked: float,
    tapping: Tapping,
    show: Shower,
    form: Form | None,
    goes_on: bool = False,
    sampling: Callable[[], SamplingOptions] | None = None,
) -> Steps:
    """Make the answer to `ids`, token by token, into `generation`: the steps of it.

    `asked` is when it was asked for, on `time.perf_counter`'s clock; whether it is `stopped` is looked at between
    steps, and between the chunks of a long prompt. `tapping` edits every pass, and captures from those that make a
    token; `show` turns what was captured into what the token carries. `form` says which tokens may come. With
    `goes_on`, what `cache` holds begins `ids`, and is kept whatever edits went into it. `sampling` tells how the next
    token is to be drawn; if not given, as `options` say.
    """
    ready = first = last = time.perf_counter()
    sampling = sampling or (lambda: options)
    how = sampling()
    settings = runtime.settings(how, seed)
    keep = cache.go_on if goes_on else cache.keep_prefix_of
    cached = keep(ids, tapping.provenance)
    writer = Writer(tokenizer, options, room=cache.n_ctx - len(ids))
    new = ids[cached:]
    top = options.top_logprobs > 0
    while not writer.reason:
        if sampling() is not how:
            how = sampling()
            settings = runtime.settings(how, seed)
        length = len(cache.ids) + len(new)
        if not tapping:
            runtime.prepare(cache.capacity(length), cache.capacity(length + AHEAD), top)
        fits = len(cache.ids) + runtime.at_once <= cache.n_ctx
        several = writer.count > 0 and runtime.at_once > 0 and fits
        sampled, captures = None, {}
        if not several:
            if writer.count:
                yield None
            sampled, captures = yield from read(runtime, cache, new, settings, top, stopped, tapping, form)
        elif not stopped():
            allowed = form.allowed() if form else None
            step = Decode(runtime, cache, new[0], settings, top, tapping, allowed)
            if DEVICE.crowded and cache.batch is None:
                yield from until_there(step.program)
            sampled, captures = yield step
        if sampled is None:
            writer.reason = "cancelled"
        elif options.num_predict == 0:
            writer.reason = "length"
        fresh: list[Token] = []
        for step, drawn in enumerate(one_by_one(sampled)):
            if writer.reason:
                break
            if several:
                cache.ids.extend(new)
            token = int(drawn.token[0])
            text = writer.write(token, last=form is not None and form.take(token))
            last = time.perf_counter()
            first = last if writer.count == 1 else first
            likeliest = alternatives(tokenizer, *drawn.top, options.top_logprobs)
            shown = show(captures, len(cache.ids), step if several else None) if captures else None
            fresh.append(Token(token, text, float(drawn.logprob[0]), likeliest, last - asked, shown))
            new = [token]
        generation._put(*fresh)
    stats = Stats(
        prompt_tokens=len(ids),
        cached_tokens=cached,
        tokens=writer.count,
        load_seconds=ready - asked,
        prefill_seconds=first - ready,
        decode_seconds=last - first,
        form_seconds=form.seconds if form else 0.0,
    )
    generation._finish(writer.reason or "cancelled", stats, tail=writer.flush())


def read(
    runtime: Runtime,
    cache: Cache,
    ids: Sequence[int],
    settings: Settings,
    top: bool,
    stopped: Callable[[], bool],
    tapping: Tapping,
    form: Form | None,
) -> Generator[None, None, tuple[Sampled | None, dict[str, Any]]]:
    """Read `ids` into `cache`; what was drawn and captured after them, or None where `stopped()` between two chunks,
    when others have their turn."""
    sampled, captures = None, {}
    only_edits, end = tapping.without_captures(), len(cache.ids) + len(ids)
    for arrays, part in chunks(runtime, cache, ids):
        if sampled is not None:
            yield None
        if stopped():
            return None, {}
        start = len(cache.ids)
        last = start + len(part) == end
        taps, allowed = tapping if last else only_edits, form.allowed() if form and last else None
        how = settings, top, taps, allowed
        cache.arrays, sampled, captures = yield from runtime.read(arrays, part, start, *how)
        # jax returns before the work is done: without waiting, a whole prompt would be under way at once.
        sampled.token.block_until_ready()
    return sampled, captures


class Writer:
    """Turns the tokens of an answer into its text, and knows when it ends."""

    def __init__(self, tokenizer: Tokenizer, options: GenerateOptions, room: int) -> None:
        """`room` is how many tokens the context has left."""
        self._stream = tokenizer.stream(at_start=False, markers=True)
        self._eog_ids = tokenizer.eog_ids
        self._stops = StopStrings(options.stop)
        self._limit = options.num_predict if options.num_predict >= 0 else math.inf
        self._room = room
        self.count = 0
        self.reason: FinishReason | None = None

    def write(self, token: int, last: bool = False) -> str:
        """What `token` adds to the text; sets `reason` if it is the last, which may be known already."""
        self.count += 1
        text = self._stops.push(self._stream.push(token))
        if token in self._eog_ids or self._stops.found or last:
            self.reason = "stop"
        elif self.count >= self._limit:
            self.reason = "length"
        elif self.count >= self._room:
            self.reason = "context"
        return text + self.flush() if self.reason else text

    def flush(self) -> str:
        """The text still held back, when no token will come to complete it."""
        return self._stops.push(self._stream.flush()) + self._stops.flush()


def one_by_one(sampled: Sampled | None) -> Iterator[Sampled]:
    """What was drawn in one call, token by token, on the host."""
    if sampled is None:
        return
    drawn: Sampled = jax.device_get(sampled)
    if drawn.token.ndim == 1:
        yield drawn
    else:
        for token, logprob, ids, logprobs in zip(drawn.token, drawn.logprob, *drawn.top, strict=True):
            yield drawn._replace(token=token, logprob=logprob, top=(ids, logprobs))


def chunks(runtime: Runtime, cache: Cache, ids: Sequence[int]) -> Iterator[tuple[KVCache, Sequence[int]]]:
    """The parts in which to read `ids` into `cache`, each with the arrays, which have room for all of them.

    Whoever takes a part reads it, and leaves the new arrays in `cache.arrays`, before taking the next.
    """
    least = runtime.chunks[0]  # what the last part is padded to, if not more
    arrays = room(runtime, cache, -(-len(ids) // least) * least)
    done = 0
    while done < len(ids):
        most = SHARED if DEVICE.crowded else ALONE if runtime.packed else len(ids)
        size = chunk(min(len(ids) - done, most), arrays.capacity - len(cache.ids), runtime.chunks, runtime.packed)
        part = ids[done : done + size]
        yield arrays, part
        assert cache.arrays is not None
        arrays = cache.arrays
        cache.ids.extend(part)
        done += len(part)


def score(
    runtime: Runtime,
    tokenizer: Tokenizer,
    cache: Cache,
    ids: list[int],
    top: int,
    tapping: Tapping,
    stopped: Callable[[], bool],
) -> Generator[None, None, Score]:
    """The log-probability of each of `ids` after those before it, with the `top` likeliest in its place.

    Others have their turn between two chunks, behind which it ends if `stopped()`, as in `embed`.
    """
    tokens = [Token(ids[0], tokenizer.token(ids[0]), None)]
    for arrays, part in chunks(runtime, cache, ids[:-1]):
        yield from turn(stopped)
        start = len(cache.ids)
        targets = ids[start + 1 : start + 1 + len(part)]
        cache.arrays, *found = yield from runtime.score(arrays, part, start, targets, tapping)
        logprobs, (top_ids, top_logprobs) = jax.device_get(found)
        for index, token in enumerate(targets):
            top_here = alternatives(tokenizer, top_ids[:, index], top_logprobs[:, index], top)
            tokens.append(Token(token, tokenizer.token(token), float(logprobs[0, index]), top_here))
    return Score(tuple(tokens))


def embed(
    runtime: Runtime, cache: Cache, ids: list[int], pooling: str, tapping: Tapping, stopped: Callable[[], bool]
) -> Generator[None, None, np.ndarray]:
    """The mean over `ids`, or the last, of the final normed hidden states: float32 `[d_model]`."""
    total = np.zeros(runtime.config.d_model, np.float32)
    last = total
    for arrays, part in chunks(runtime, cache, ids):
        yield from turn(stopped)
        cache.arrays, subtotal, last = yield from runtime.pool(arrays, part, len(cache.ids), tapping)
        total = total + np.asarray(subtotal[0])
        last = np.asarray(last[0])
    return last if pooling == "last" else total / len(ids)


def alternatives(tokenizer: Tokenizer, ids: Any, logprobs: Any, top: int) -> tuple[Alternative, ...]:
    """The first `top` of the likeliest tokens, from arrays `[1, n]`."""
    if not top:
        return ()
    pairs = zip(np.asarray(ids)[0, :top].tolist(), np.asarray(logprobs)[0, :top].tolist(), strict=True)
    return tuple(Alternative(token, tokenizer.token(token), logprob) for token, logprob in pairs)
