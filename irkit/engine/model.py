"""A model file, opened once and shared by every session that uses it."""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np

from irkit import families, gguf, notebook, tokenizer
from irkit.engine.cache import Cache, Pool
from irkit.engine.worker import DEVICE, LOADER, Steps, until_done
from irkit.errors import ContextFullError, IrkitError, ModelFileError, OptionError
from irkit.garbage import uncollected
from irkit.observing import ASKED_BY
from irkit.options import (
    Backend,
    CacheType,
    CaptureOptions,
    GenerateOptions,
    LoadOptions,
    Precision,
    SamplingOptions,
    TraceOptions,
    check_logit_bias,
    parse,
)
from irkit.results import Generation, Info, Score, Stats

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from irkit.edits import Edit
    from irkit.engine.runtime import Runtime
    from irkit.engine.structured import Form
    from irkit.engine.tapping import Tapping
    from irkit.trace import Estimate, Trace

_Result = TypeVar("_Result")
_open: WeakValueDictionary[tuple[Any, ...], Model] = WeakValueDictionary()
_opening = threading.Lock()


def open_model(path: Path, options: LoadOptions) -> Model:
    """The model in `path`; the same object for the same file and options, as long as somebody holds it.

    Raises:
        ModelFileError, UnsupportedModelError: the file is damaged or of a kind irkit does not run.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from None
    settings = options.precision, options.backend, options.threads, options.cache_type, options.mesh
    key = path.resolve(), status.st_mtime_ns, status.st_size, *settings
    with _opening:
        model = _open.get(key)
        if model is None:
            model = _open[key] = Model(path, *settings)
    return model


class Model:
    """A model: its file, tokenizer and template at once; its weights when something is first computed.

    Every method that computes does so on the device's thread: answers side by side, with the same cache in the order
    of the calls.
    """

    def __init__(
        self,
        path: Path,
        precision: Precision,
        backend: Backend | None,
        threads: int | None,
        cache_type: CacheType | None = None,
        mesh: int | None = None,
    ) -> None:
        self.path = path
        self.precision: Precision = precision
        self.backend: Backend | None = backend
        self.threads = threads
        self.cache_type: CacheType | None = cache_type
        self.mesh = mesh
        self.file = gguf.open(path)
        self.config = families.read_config(self.file)
        self._runtime: Future[Runtime] | None = None
        self._starting = threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._indexing = threading.Lock()
        self._pool = Pool()
        self.progress = 0.0
        """Which fraction of the weights is in its place."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that its weights take; an estimate, until they are loaded."""
        if (runtime := self.loaded) is not None:
            return runtime.nbytes
        tensors = self.file.tensors.values()
        packed = self.precision == "fast"
        return sum(tensor.nbytes if packed else 4 * math.prod(tensor.shape) for tensor in tensors)

    @property
    def loading(self) -> bool:
        """Whether its weights are loaded, or being loaded."""
        runtime = self._runtime
        return runtime is not None and not (runtime.done() and runtime.exception())

    @property
    def loaded(self) -> Runtime | None:
        """What computes with the weights; None before they are in their place."""
        runtime = self._runtime
        return runtime.result() if runtime and runtime.done() and not runtime.exception() else None

    @cached_property
    def tokenizer(self) -> tokenizer.Tokenizer:
        """Made from the file's own vocabulary."""
        made = tokenizer.from_gguf(self.file)
        if made.vocab_size != self.config.d_vocab:
            raise ModelFileError(
                f"{self.path}: the vocabulary has {made.vocab_size} tokens, the embedding {self.config.d_vocab}"
            )
        return made

    @cached_property
    def template(self) -> tokenizer.ChatTemplate:
        """The file's chat template, or the plain one where it brings none."""
        return self.template_of(self.tokenizer.chat_template)

    def template_of(self, source: str | None) -> tokenizer.ChatTemplate:
        """A chat template that knows this model's special tokens."""
        made = self.tokenizer
        bos, eos = ("" if token is None else made.token(token) for token in (made.bos_id, made.eos_id))
        return tokenizer.ChatTemplate(source, bos, eos)

    def new_cache(self, n_ctx: int | None) -> Cache:
        """An empty KV cache for a session, of the trained context where `n_ctx` is None."""
        return Cache(n_ctx or self.config.n_ctx)

    def forget(self) -> None:
        """Let go of what earlier pooled answers have left."""
        DEVICE.submit(self._pool.clear)

    def submit(self, job: Callable[[], _Result], *caches: Cache) -> Future[_Result]:
        """Have `job` done on the device's thread, behind everything asked so far of these caches."""
        return DEVICE.submit(job, *caches)

    def in_turns(self, steps: Callable[[Runtime, Callable[[], bool]], Steps]) -> Any:
        """What `steps`, given the runtime and whether nobody waits any more, return: others go on where they yield."""
        loading, left = self.load(), ASKED_BY.get().left

        def begin() -> Steps:
            runtime = yield from until_done(loading, left.is_set)
            if runtime is None:
                raise IrkitError("it was cancelled")
            return (yield from steps(runtime, left.is_set))

        return DEVICE.answer(begin, left).result()

    def load(self) -> Future[Runtime]:
        """Start loading the weights, if that has not been done; what computes with them, once it is there."""
        with self._starting:
            if self._runtime is None or (self._runtime.done() and self._runtime.exception()):
                nbytes = sum(tensor.nbytes for tensor in self.file.tensors.values())
                bar = notebook.load_bar(self.path.stem, nbytes)

                def show(fraction: float) -> None:
                    self.progress = fraction
                    bar(fraction)

                self._runtime = LOADER.submit(partial(self._load, show))
        return self._runtime

    def _load(self, show: Callable[[float], None]) -> Runtime:
        from irkit.engine.runtime import Runtime

        try:
            with uncollected():
                return Runtime(self, show)
        finally:
            show(1)

    def generate(
        self,
        ids: Sequence[int],
        options: GenerateOptions,
        cache: Cache,
        capture: CaptureOptions | None = None,
        edits: Sequence[Edit] = (),
        kept: Cache | None = None,
        pooled: bool = False,
    ) -> Generation:
        """An answer to `ids`, which is being made when this returns; each token carries what `capture` asks for.

        What `kept` holds begins `ids`: it is put into `cache` first, and gone on from, whatever went into it.
        A `pooled` answer uses whichever of the model's own caches begins most like it, in place of `cache`.

        Raises:
            ContextFullError: `ids` leave no room in the context.
            OptionError: there are no ids, `logit_bias` names a token that does not exist, or `format` is no schema
                that can be followed.
        """
        if not ids:
            raise OptionError("the prompt is empty, and the model has no token to begin a text with")
        if len(ids) >= cache.n_ctx:
            raise ContextFullError(
                f"the prompt has {len(ids)} tokens and needs one more; the context holds {cache.n_ctx}"
            )
        check_logit_bias(options, self.config.d_vocab)
        taps = self._tapping(len(ids), capture, edits, at_end=True)
        cancelled, asked = threading.Event(), time.perf_counter()
        sampling: SamplingOptions = options

        def change(given: dict[str, Any]) -> None:
            nonlocal sampling
            old = {name: getattr(sampling, name) for name in SamplingOptions.model_fields}
            new = parse(SamplingOptions, old | given)
            check_logit_bias(new, self.config.d_vocab)
            sampling = new

        generation = Generation(cancelled.set, ids, change)
        generation._most = options.num_predict if options.num_predict > 0 else None
        runtime = self.load()
        form = self._form(options)
        seed = options.seed if options.seed >= 0 else secrets.randbits(63)

        def stopped() -> bool:
            return cancelled.is_set() or cache.closed.is_set()

        def steps() -> Steps:
            mine = self._pool.take(ids, taps.provenance, cache.n_ctx) if pooled else cache
            try:
                ready = yield from until_done(runtime, stopped)
                if ready is None:
                    generation._finish("cancelled", Stats(prompt_tokens=len(ids)))
                    return
                from irkit.engine.generate import generate
                from irkit.engine.trace import shower

                if kept is not None:
                    mine.adopt(kept)
                    kept.clear()  # or the arrays would be shared, and copied
                show = shower(self, taps, list(ids), mine, capture)
                words = self.tokenizer, mine, list(ids), options, seed, generation, stopped, asked, taps, show, form
                yield from generate(ready, *words, goes_on=kept is not None, sampling=lambda: sampling)
                mine.leave_batch()
            except BaseException as error:
                mine.clear()  # what a failed step leaves in it is not to be trusted
                generation._fail(error)
            finally:
                if pooled:
                    self._pool.put(mine)

        DEVICE.answer(steps, cancelled, *(() if pooled else (cache,)), *(() if kept is None else (kept,)))
        return generation

    def _form(self, options: GenerateOptions) -> Form | None:
        """What an answer is to look like, if that is asked for."""
        if options.format is None:
            return None
        from irkit.engine import structured

        grammar = structured.grammar(options.format)
        with self._indexing:
            if self._vocabulary is None:
                self._vocabulary = structured.vocabulary(self.tokenizer)
        return structured.Form(self._vocabulary, grammar)

    def _tapping(
        self,
        length: int,
        capture: CaptureOptions | None,
        edits: Sequence[Edit],
        *,
        at_end: bool = False,
        rows: int = 1,
    ) -> Tapping:
        from irkit.engine.tapping import Tapping, tapping

        if capture is None and not edits:
            return Tapping()
        words: dict[str, Any] = {"names": ()} if capture is None else capture.model_dump(exclude={"budget", "logits"})
        return tapping(self.config, length, edits=edits, at_end=at_end, rows=rows, **words)

    def trace(
        self, name: str, rows: Sequence[Sequence[int]], options: TraceOptions, edits: Sequence[Edit], n_ctx: int
    ) -> Trace:
        """What one forward pass over the texts shows.

        Raises:
            BudgetError: it would take more memory than it may.
            ContextFullError, OptionError: a text does not fit, or what is asked for is not there.
        """
        taps = self._tapping(_longest(rows, n_ctx), options, edits, rows=len(rows))
        loading = self.load()
        from irkit.engine import trace

        trace.check(trace.estimate(loading.result(), rows, taps, options), loading.result(), rows, taps, options)
        return self.in_turns(lambda *how: trace.whole(self, name, rows, taps, options.logits, *how))

    def estimate(
        self, rows: Sequence[Sequence[int]], options: TraceOptions, edits: Sequence[Edit], n_ctx: int
    ) -> Estimate:
        """What `trace` would take."""
        taps = self._tapping(_longest(rows, n_ctx), options, edits, rows=len(rows))
        loading = self.load()
        from irkit.engine import trace

        return trace.estimate(loading.result(), rows, taps, options)

    def score(
        self, ids: Sequence[int], top: int, n_ctx: int, edits: Sequence[Edit] = (), pooled: bool = False
    ) -> Score:
        """The log-probability of each of `ids` after those before it, with the `top` likeliest in its place.

        Where it is `pooled`, an answer to the same text need not read it again.
        """
        _check_fits(len(ids), n_ctx)
        taps = self._tapping(len(ids), None, edits)

        def steps(runtime: Runtime, stopped: Callable[[], bool]) -> Steps:
            from irkit.engine.generate import score

            cache = Cache(n_ctx)
            cache.provenance = taps.provenance
            found = yield from score(runtime, self.tokenizer, cache, list(ids), top, taps, stopped)
            if pooled:
                self._pool.put(cache)
            return found

        return self.in_turns(steps)

    def embed(
        self,
        texts: Sequence[Sequence[int]],
        pooling: str,
        normalize: bool,
        n_ctx: int,
        edits: Sequence[Edit] = (),
    ) -> np.ndarray:
        """One float32 vector a text, `[text, d_model]`."""
        for ids in texts:
            _check_fits(len(ids), n_ctx)

        def steps(runtime: Runtime, stopped: Callable[[], bool]) -> Steps:
            from irkit.engine.generate import embed

            vectors = []
            for ids in texts:
                taps = self._tapping(len(ids), None, edits)
                vectors.append((yield from embed(runtime, Cache(n_ctx), list(ids), pooling, taps, stopped)))
            return np.stack(vectors)

        vectors = self.in_turns(steps) if texts else np.zeros((0, self.config.d_model), np.float32)
        if normalize:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
        return vectors

    def info(self, name: str, n_ctx: int) -> Info:
        """What the model is, and how it runs here."""
        from irkit.engine import backends

        meta, config = self.file.metadata, self.config
        selected = backends.select(self.backend, self.threads)
        return Info(
            model=name,
            path=str(self.path),
            architecture=meta.value("general.architecture", str),
            name=meta.value("general.name", str, ""),
            parameters=sum(math.prod(tensor.shape) for tensor in self.file.tensors.values()),
            quantization=_main_format(self.file),
            size=self.file.size,
            license=meta.value("general.license", str, None),
            n_layers=config.n_layers,
            d_model=config.d_model,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            d_head=config.d_head,
            d_mlp=config.d_mlp,
            d_vocab=config.d_vocab,
            n_ctx=n_ctx,
            n_ctx_train=config.n_ctx,
            chat_template="tokenizer.chat_template" in meta,
            precision=self.precision,
            backend=selected.line,
            kernels=_kernels(selected.name, self.mesh),
        )


def _kernels(backend: Backend, mesh: int | None) -> str:
    """Which kernels compute for a session, as `Info` shows it."""
    from irkit.kernels.cpu import library

    if mesh:
        return f"xla, on {mesh} device{'s' * (mesh > 1)}"
    return library.describe() if backend == "cpu" else "xla"


def _check_fits(tokens: int, n_ctx: int) -> None:
    if not tokens:
        raise OptionError("the text is empty, and the model has no token to begin a text with")
    if tokens > n_ctx:
        raise ContextFullError(f"the text has {tokens} tokens; the context holds {n_ctx}")


def _longest(rows: Sequence[Sequence[int]], n_ctx: int) -> int:
    """The tokens of the longest text, each of which fits the context."""
    if not rows:
        raise OptionError("texts: there is none")
    for ids in rows:
        _check_fits(len(ids), n_ctx)
    return max(map(len, rows))


def _main_format(file: gguf.File) -> str:
    """The format that takes the most bytes."""
    sizes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        sizes[tensor.format] += tensor.nbytes
    return sizes.most_common(1)[0][0]
