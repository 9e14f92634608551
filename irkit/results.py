"""What the verbs return: plain values, and `Generation`, which streams when iterated and waits when asked."""

import contextlib
import dataclasses
import math
import queue
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Generator as PythonGenerator

    import pandas
    from matplotlib.figure import Figure

FinishReason = Literal["stop", "length", "context", "cancelled"]
"""Why an answer ended: the model or a stop string ended it; `num_predict` was reached; the context is
full; somebody cancelled it."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that could have stood in a place, with its log-probability (natural, of the model's own
    distribution: before penalties, truncation and temperature)."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer or of a scored text.

    In an answer, `text` is what this token adds to it: empty while bytes of a character, or a possible
    stop string, are held back; the joined texts of the events are the answer. In a `Score` it is the
    token's own text.
    """

    id: int
    text: str
    logprob: float | None
    """Natural logarithm of the model's own probability for it; None where nothing came before."""
    top: tuple[Alternative, ...] = ()
    """The likeliest tokens in its place, likeliest first, as many as were asked for."""
    time: float | None = None
    """Seconds from the request to this token."""
    captures: Any = field(default=None, repr=False, compare=False)
    """A `Trace` of the forward pass that made it, if something was to be captured: of one position."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts of tokens, and times in seconds, of one answer."""

    prompt_tokens: int = 0
    """Tokens of the prompt, those found in the cache included."""
    cached_tokens: int = 0
    """How many of them were in the cache already, and not computed again."""
    tokens: int = 0
    """Tokens made."""
    load_seconds: float = 0.0
    """Waiting for the model to be ready."""
    prefill_seconds: float = 0.0
    """Computing the prompt, up to the first token."""
    decode_seconds: float = 0.0
    """Making the tokens after the first."""
    form_seconds: float = 0.0
    """Of all these, finding which tokens `format` allows: the processor's, not the device's."""

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed, first token excluded; 0 before there is a second token."""
        return (self.tokens - 1) / self.decode_seconds if self.tokens > 1 and self.decode_seconds else 0.0


class Interrupted(KeyboardInterrupt):
    """Somebody pressed Ctrl-C, or a notebook's Stop, while an answer was waited for; a notebook shows it in a line."""

    def _render_traceback_(self) -> list[str]:
        return [f"KeyboardInterrupt: {self}"]


class Generation:
    """An answer in the making.

    Iterating, with `for` or `async for`, yields each `Token` as it is made, from the first one on, as
    often as one likes; `text`, `tokens`, `finish_reason` and `stats` wait for the end, and so does `await`. If the
    computation failed, all of them raise its error. A KeyboardInterrupt, or the end of the task that awaits it,
    cancels it; what was made stays. As the value of a notebook's cell it is shown while it is made.
    """

    def __init__(
        self,
        cancel: Callable[[], None] = lambda: None,
        prompt: Sequence[int] = (),
        change: Callable[[dict[str, Any]], None] = lambda options: None,
    ) -> None:
        self.prompt = tuple(prompt)
        """The token ids that it answers."""
        self._tokens: list[Token] = []
        self._tail = ""
        self._reason: FinishReason | None = None
        self._stats = Stats()
        self._most: int | None = None  # how many tokens there may be, where that is known
        self._error: BaseException | None = None
        self._cancel = cancel
        self._change = change
        self._watchers: set[Callable[[], Any]] = set()

    # No lock is held here: a KeyboardInterrupt just behind taking one would leave it taken, and the engine waiting for
    # it. What is added to is a list, one object is put in another's place, and who waits looks after saying so.

    def __iter__(self) -> Iterator[Token]:
        shown = 0
        while fresh := self._after(shown):
            yield from fresh
            shown += len(fresh)

    def _after(self, index: int) -> list[Token]:
        """The tokens from `index` on, once there are any; none at the end."""
        self._wait_until(lambda: len(self._tokens) > index or self.done)
        fresh = self._tokens[index:]
        if self._error and not fresh:
            raise self._error
        return fresh

    async def __aiter__(self) -> AsyncIterator[Token]:
        import asyncio  # not needed, and not quick to import, on the command line

        loop, changed, told = asyncio.get_running_loop(), asyncio.Event(), False

        def tell() -> None:
            nonlocal told
            if told:  # and not yet looked: to wake another thread costs as much as a token's text
                return
            told = True
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(changed.set)

        shown, done = 0, False
        self._watchers.add(tell)
        try:
            while not done:
                changed.clear()
                told = False  # before looking, so that what comes behind it is told
                done = self.done
                fresh = self._tokens[shown:]
                for token in fresh:
                    yield token
                shown += len(fresh)
                if not done:
                    await changed.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise
        finally:
            self._watchers.discard(tell)
        if self._error:
            raise self._error

    def __await__(self) -> "PythonGenerator[Any, None, Generation]":
        return self._end().__await__()

    async def _end(self) -> "Generation":
        async for _ in self:
            pass
        return self

    def texts(self) -> Iterator[str]:
        """The answer's text, piece by piece as it is made; no piece is empty."""
        for token in self:
            if token.text:
                yield token.text
        if self.tail:
            yield self.tail

    @property
    def tail(self) -> str:
        """Text that was held back until the end, when it belonged to no further token: mostly empty."""
        return self.wait()._tail

    def _wait_until(self, condition: Callable[[], bool], seconds: float | None = None) -> None:
        end = None if seconds is None else time.monotonic() + seconds
        told: queue.SimpleQueue[None] = queue.SimpleQueue()
        tell = partial(told.put, None)
        self._watchers.add(tell)
        try:
            while not condition():
                told.get(timeout=None if end is None else max(end - time.monotonic(), 0))
        except queue.Empty:
            pass
        except KeyboardInterrupt:
            self.cancel()  # what was made so far stays readable
            count = len(self._tokens)
            raise Interrupted(f"the answer was stopped after {count} tokens, which partial_text has") from None
        finally:
            self._watchers.discard(tell)

    @property
    def done(self) -> bool:
        """Whether the answer has ended, in whatever way."""
        return self._reason is not None or self._error is not None

    @property
    def failed(self) -> bool:
        """Whether it has ended with an error."""
        return self._error is not None

    def when_done(self, call: "Callable[[Generation], Any]") -> None:
        """Have `call` called with this once it has ended, in the engine's thread, which waits; at once if it has."""

        def tell() -> None:
            if self.done and tell in self._watchers:
                self._watchers.discard(tell)
                call(self)

        self._watchers.add(tell)
        tell()

    def wait(self) -> "Generation":
        """This, once the answer has ended.

        Raises:
            IrkitError: what the computation raised, if it failed.
        """
        self._wait_until(lambda: self.done)
        if self._error:
            raise self._error
        return self

    def wait_for(self, seconds: float) -> bool:
        """Waits for the end of the answer, but no longer than `seconds`; whether it has ended, in whatever way."""
        self._wait_until(lambda: self.done, seconds)
        return self.done

    def cancel(self) -> None:
        """Ends the answer before its next token; the tokens made so far stay."""
        self._cancel()

    def change(self, **options: Any) -> None:
        """Draws the tokens after this with other sampling options: those of `SamplingOptions`, the rest stay.

        Tokens that are being computed meanwhile, four at most, are still drawn as before.

        Raises:
            OptionError: an option is unknown, not one of sampling, or out of bounds.
        """
        self._change(options)

    @property
    def partial_text(self) -> str:
        """What has been made so far, without waiting."""
        return "".join(token.text for token in tuple(self._tokens)) + self._tail

    @property
    def partial_tokens(self) -> tuple[Token, ...]:
        """The token events so far, without waiting."""
        return tuple(self._tokens)

    @property
    def text(self) -> str:
        """The whole answer."""
        return self.wait().partial_text

    @property
    def tokens(self) -> tuple[Token, ...]:
        """Every token event."""
        return tuple(self.wait()._tokens)

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended."""
        reason = self.wait()._reason
        assert reason is not None
        return reason

    @property
    def stats(self) -> Stats:
        """Counts and times."""
        return self.wait()._stats

    def plot(self) -> "Figure":
        """A matplotlib Figure: the model's own probability of each token."""
        from irkit import plots

        return plots.probabilities(self)

    def to_frame(self) -> "pandas.DataFrame":
        """A pandas DataFrame, one row a token: `id`, `token`, `logprob`, `probability`, `time` in seconds; and
        `entropy` where it was captured, of attention, in nats, the mean over the heads."""
        return _table(self.tokens, timed=True)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        state = self._reason or ("failed" if self._error else "running")
        return f"<Generation: {len(self._tokens)} tokens, {state}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(self.text)

    def _repr_html_(self) -> str:
        from irkit import reprs

        return reprs.generation(self)

    def _ipython_display_(self) -> None:
        from irkit import notebook

        notebook.stream(self)

    # The engine's side.

    def _put(self, *tokens: Token) -> None:
        """What one call has made, at once: who is told runs beside the engine's thread, and holds up what it does."""
        self._tokens.extend(tokens)
        self._notify()

    def _finish(self, reason: FinishReason, stats: Stats, tail: str = "") -> None:
        self._stats, self._tail = stats, tail
        self._reason = reason  # last, as it is what others look at
        self._notify()

    def _fail(self, error: BaseException) -> None:
        self._error = error
        self._notify()

    def _notify(self) -> None:
        for tell in tuple(self._watchers):
            tell()


@dataclass(frozen=True, slots=True)
class Score:
    """The log-probability of each token of a text, given the tokens before it."""

    tokens: tuple[Token, ...]

    @property
    def total(self) -> float:
        """Sum of the log-probabilities, in nats."""
        return sum(token.logprob for token in self.tokens if token.logprob is not None)

    @property
    def perplexity(self) -> float:
        """exp of minus the mean log-probability; nan where nothing could be scored."""
        count = sum(token.logprob is not None for token in self.tokens)
        return math.exp(-self.total / count) if count else math.nan

    def plot(self) -> "Figure":
        """A matplotlib Figure: the probability of each token after those before it."""
        from irkit import plots

        return plots.probabilities(self)

    def to_frame(self) -> "pandas.DataFrame":
        """A pandas DataFrame, one row a token: `id`, `token`, `logprob`, `probability`; nan where nothing came before
        it."""
        return _table(self.tokens)

    def _repr_html_(self) -> str:
        from irkit import reprs

        return reprs.score(self)

    def __str__(self) -> str:
        rows = [
            f"{t.logprob:9.4f}  {t.text!r}" if t.logprob is not None else f"{'':9}  {t.text!r}" for t in self.tokens
        ]
        return "\n".join([*rows, f"{self.total:9.4f}  total, perplexity {self.perplexity:.3f}"])


def _table(tokens: Sequence[Token], *, timed: bool = False) -> "pandas.DataFrame":
    import pandas

    logprobs = np.array([math.nan if token.logprob is None else token.logprob for token in tokens], np.float64)
    columns = {
        "id": [token.id for token in tokens],
        "token": [token.text for token in tokens],
        "logprob": logprobs,
        "probability": np.exp(logprobs),
    }
    if timed:
        columns["time"] = [token.time for token in tokens]
    kept = [token.captures for token in tokens]
    point = "attn.hook_pattern"
    if kept and all(trace is not None and trace.provenance.reduce.get(point) == "entropy" for trace in kept):
        columns["entropy"] = [float(np.mean(trace[point])) for trace in kept]
    return pandas.DataFrame(columns)


@dataclass(frozen=True, slots=True)
class Info:
    """What a model is, and how this session runs it."""

    model: str
    path: str
    architecture: str
    name: str
    parameters: int
    quantization: str
    size: int
    """Of the file, in bytes."""
    license: str | None
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    """The context of this session, in tokens."""
    n_ctx_train: int
    """The context the model was trained for."""
    chat_template: bool
    """Whether the file brings one."""
    precision: str
    backend: str
    """One line: which backend runs, and on what."""
    kernels: str
    """One line: `cpu` and the instruction set that irkit's own kernels use, or `xla`, and why."""

    def _repr_html_(self) -> str:
        from irkit import reprs

        return reprs.info(self)

    def __str__(self) -> str:
        width = max(len(field.name) for field in dataclasses.fields(self))
        return "\n".join(f"{f.name:{width}}  {getattr(self, f.name)}" for f in dataclasses.fields(self))


def columns(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """The same cells, padded so that each column is as wide as its widest."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
