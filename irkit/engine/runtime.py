"""A model ready to compute: its weights on the device, and its compiled programs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from irkit import families
from irkit.engine import backends, sharding, steps, weights
from irkit.engine.cache import SMALLEST
from irkit.engine.programs import Device, Program, load_or_compile
from irkit.engine.tapping import Tapping, joined
from irkit.engine.worker import COMPILER, DEVICE, until_there
from irkit.kernels import cpu
from irkit.kernels.cpu import library
from irkit.options import SamplingOptions
from irkit.transformer import cache as kv
from irkit.transformer import readings, sampling
from irkit.transformer.cache import KVCache
from irkit.transformer.decoder import Params
from irkit.transformer.sampling import Sampled, Settings
from irkit.transformer.taps import Operands, Spec

if TYPE_CHECKING:
    from irkit.engine.batch import Batch
    from irkit.engine.model import Model

CHUNKS = (1, 8, 32, 128, 512)
"""How many tokens a program reads at once; 1 is decoding."""
FEW_CHUNKS = (32, 128, 512)
"""The same for the CPU's kernels, which do not compute padding, and read a single token otherwise than several."""
AT_ONCE = 4
"""Tokens that one call decodes where a call costs much beside a token."""
BATCHES = (4, 8)
"""Answers that one call decodes for. It reads all weights in any case: with four rows it takes little longer."""
_SMALL_BYTES = 400e6
"""Weights up to which that is so: four tokens of such a model come within a tenth of a second."""

_MOST_TAPPED = 32
"""Programs held in memory of those that capture or edit."""
_NOTHING, _NO_SPEC, _NO_OPERANDS = Tapping(), Spec(), Operands()
_Result = TypeVar("_Result")
InTurns: TypeAlias = Generator[None, None, _Result]
"""What is computed on the device's thread, where others go on while its program is compiled."""

# Half precision where the backend multiplies fastest in it.
_FAST = {"cuda": jnp.bfloat16, "metal": jnp.float16, "mps": jnp.float16}


def chunk(remaining: int, room: int, sizes: Sequence[int] = CHUNKS, free_padding: bool = False) -> int:
    """How many of `remaining` tokens to read next, where the cache has `room` for padding and all.

    As many as fill a program by more than half, unless a padded token costs nothing.
    """
    size = next((size for size in sizes if size >= remaining), sizes[-1])
    half_empty = size > sizes[1] and 2 * remaining <= size
    if size > room or (half_empty and not free_padding):
        size = max((size for size in sizes if size <= min(remaining, room)), default=1)
    return min(remaining, size)


class Runtime:
    """What the device's thread computes with."""

    def __init__(self, model: Model, show: Callable[[float], None] = lambda fraction: None) -> None:
        """Read the model's weights; the first programs are loaded or compiled beside that.

        `show` is told which fraction of the weights is in its place.
        """
        selected = backends.select(model.backend, model.threads)
        fast = model.precision == "fast"
        self.config = model.config
        self.device = selected.device
        self.threads = selected.threads
        self.layout = sharding.layout(model.mesh, model.config, selected)
        self.at = self.layout.whole if self.layout else self.device
        self._cache_at = self.layout.cache if self.layout else self.device
        self.dtype = jnp.dtype(_FAST[selected.name] if fast and selected.name in _FAST else jnp.float32)
        # Sorting and branching are what Apple's backends are worst at: there the CPU draws the tokens.
        self._drawer = jax.devices("cpu")[0] if selected.name in ("metal", "mps") else self.device
        alone = selected.name == "cpu" and not self.layout  # what is packed cannot be divided
        kernels = library.load() if alone and library.register() else None
        self.packed = kernels is not None
        chosen = model.cache_type or ("f16" if self.packed and fast else None)
        self.cache_dtype = jnp.dtype({"f16": jnp.float16, "f32": jnp.float32}[chosen]) if chosen else self.dtype
        self.chunks = FEW_CHUNKS if self.packed else CHUNKS
        # An example for compiling: made once, since every step asks for its program.
        self._any_settings = sampling.settings([SamplingOptions()], [0], self.config.d_vocab)
        self._any_token: dict[tuple[int, Device], jax.Array] = {}
        self._programs: dict[tuple[Any, ...], Future[Program]] = {}
        self._shapes_traced: dict[tuple[Any, ...], Any] = {}
        self._tapped: list[tuple[Any, ...]] = []
        self._compiling = threading.Lock()
        plans = weights.plan(model.file, families.weights(model.file, model.config), kernels, exact=not fast)
        shapes = jax.tree.map(self._shape, plans)
        if self.layout:
            shapes = self.layout.parameters(shapes)
        joined = jax.ShapeDtypeStruct((weights.total(plans, packed=True),), jnp.uint8)
        self._shapes = cpu.Joined(joined, shapes) if self.packed else shapes
        # On a CPU XLA takes seven times as long for a few rows as for one, unless it keeps a copy of all weights.
        self.batch_sizes = BATCHES if self.packed or selected.name != "cpu" else ()
        self._small = self.packed and weights.total(plans) <= _SMALL_BYTES
        # One thread, in the order of need: two would make the first program wait for the second.
        self._background = ThreadPoolExecutor(1, thread_name_prefix="irkit-compile")
        self._prepared: set[tuple[int, int, bool]] = set()
        self._batched: dict[tuple[Any, ...], Future[None]] = {}
        self.batches: list[Batch] = []
        # What nearly every answer begins with: loaded or compiled while the weights are being read.
        capacity = min(SMALLEST, model.config.n_ctx)
        self._background.submit(self._reader, 32, capacity, False)
        self.prepare(capacity, capacity, top=False)
        memory, values = weights.read(model.file, plans, kernels, self.threads, show)
        apart = jax.tree.map(partial(self._place, values), plans, shapes)
        self._packed = memory[: weights.total(plans, packed=True)]
        self.params: Params = cpu.Joined(jax.device_put(self._packed, self.device), apart) if self.packed else apart

    def _shape(self, plan: weights.Plan) -> Any:
        shape = plan.weight.shape
        if plan.form is not None and plan.start is not None:
            return cpu.Packed(None, plan.form, (shape[0], shape[1]), plan.start)
        return jax.ShapeDtypeStruct(shape, self.dtype if len(shape) == 2 else jnp.float32)

    def _place(self, values: dict[str, np.ndarray], plan: weights.Plan, shape: Any) -> Any:
        if plan.form is not None:
            return self._shape(plan)
        value = values[plan.weight.name]
        return sharding.put(value.astype(shape.dtype, copy=False), shape.sharding or self.device)

    @cached_property
    def arrays(self) -> Params:
        """The parameters as arrays, since the kernels have no derivative; packed ones are unpacked once, and kept."""
        return jax.jit(cpu.unpacked)(self.params) if self.packed else self.params

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, as they lie on the device, or on all of this process's."""
        leaves = jax.tree.leaves(self.params)
        return sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)

    def block(self, layer: int) -> Params:
        """A layer's parameters, the packed ones in an array of the layer's own: all layers of the same formats then
        share the programs of one. Nothing is copied."""
        block: Params = self.params["blocks"][layer]
        packed = {name: each for name, each in block.items() if isinstance(each, cpu.Packed)}
        if not packed:
            return block
        first = min(each.start for each in packed.values())
        data = jax.device_put(self._packed[first : max(each.stop for each in packed.values())], self.device)
        return block | {name: replace(each, data=data, start=each.start - first) for name, each in packed.items()}

    @property
    def at_once(self) -> int:
        """How many tokens `decode` draws; 0 where it is not to be used: processes on several machines must all make the
        same calls, and what a call computes for depends on who asks when."""
        return 0 if self.layout else AT_ONCE if self._small and self._drawer is self.device else 1

    def settings(self, options: SamplingOptions, seed: int) -> Settings:
        """Sampling settings, on the device that draws."""
        made = sampling.settings([options], [seed], self.config.d_vocab)
        return self.layout.agreed(made) if self.layout else jax.device_put(made, self._drawer)

    def _allowed(self, allowed: np.ndarray | None, rows: int = 1) -> np.ndarray | jax.Array:
        """Which tokens may be drawn, any where it is None: those bits are put on the device that draws but once."""
        if allowed is not None:
            return allowed
        key = rows, self.layout.whole if self.layout else self._drawer
        if key not in self._any_token:
            self._any_token[key] = sharding.put(sampling.everything(rows, self.config.d_vocab), key[1])
        return self._any_token[key]

    def empty(self, capacity: int, rows: int = 1) -> KVCache:
        """A cache with room for `capacity` tokens in each row."""
        shape = {"config": self.config, "batch": rows, "capacity": capacity, "dtype": self.cache_dtype}
        return self._program(kv.empty, (rows, capacity), lambda: (), **shape)()

    def grow(self, cache: KVCache, capacity: int) -> KVCache:
        """The same cache with room for `capacity` tokens."""
        return self._grower(cache.capacity, capacity)(cache)

    def _grower(self, old: int, capacity: int) -> Program:
        return self._program(kv.grow, (old, capacity), lambda: (self._cache(old),), capacity=capacity)

    def move(self, cache: KVCache, origin: np.ndarray) -> KVCache:
        """A cache with what stood at position `origin[i]` at `i`, for each `i` of its capacity."""
        arguments = self.params["inv_freq"], origin.astype(np.int32)
        layers = list(zip(cache.keys, cache.values, strict=True))
        program = self._program(steps.moved, (cache.capacity,), lambda: (*layers[0], *arguments))
        keys, values = zip(*(program(*layer, *arguments) for layer in layers), strict=True)
        tokens = _owned(np.asarray(cache.tokens)[:, origin], self.at)
        keys, values = jax.device_put((list(keys), list(values)), self._cache_at)
        return KVCache(keys, values, tokens)

    def filled(self, keys: np.ndarray, values: np.ndarray, ids: Sequence[int], capacity: int) -> KVCache:
        """A cache that holds these `keys` and `values`, `[layer, kv_head, position, d_head]`."""
        width = ((0, 0), (0, 0), (0, capacity - len(ids)), (0, 0))

        def placed(layers: np.ndarray) -> list[jax.Array]:
            return [_owned(np.pad(layer[None], width), self._cache_at) for layer in layers]

        tokens = np.pad(np.array([ids], np.int32), width[1:3])
        return KVCache(placed(keys), placed(values), _owned(tokens, self.at))

    def prepare(self, capacity: int, soon: int, top: bool) -> None:
        """Compile beside what goes on what decoding needs at `capacity`, and when it has grown to `soon`."""
        if (capacity, soon, top) in self._prepared:
            return
        self._prepared.add((capacity, soon, top))
        decoder = self.decoder if self.at_once else partial(self._reader, 1)
        self._background.submit(decoder, capacity, top)
        if soon != capacity:
            self._background.submit(self._grower, capacity, soon)
            self._background.submit(decoder, soon, top)

    def read(
        self,
        cache: KVCache,
        ids: Sequence[int],
        start: int,
        settings: Settings,
        top: bool,
        tapping: Tapping = _NOTHING,
        allowed: np.ndarray | None = None,
    ) -> InTurns[tuple[KVCache, Sampled, dict[str, Any]]]:
        """Read `ids`, which stand at `start` and after, and draw the token that follows them.

        `top` asks for the `steps.TOP` likeliest tokens too. What `tapping` captures comes last. `allowed`, uint32
        `[1, w]`, has a bit for each token that may be drawn.
        """
        tokens, where = self._padded(ids, cache.capacity - start), (_one(start), _one(len(ids)))
        operands = tapping.operands(cache.capacity, start, len(ids))
        program = yield from until_there(self._reader(tokens.shape[1], cache.capacity, top, tapping.spec, operands))
        choice = settings, self._allowed(allowed)
        if self._drawer is self.device:
            return self._call(program, cache, tokens, *where, *choice, operands)
        cache, logits, captures = self._call(program, cache, tokens, *where, operands)
        return cache, self._draw(cache, logits, _one(start + len(ids)), *choice, top), captures

    def _draw(
        self,
        cache: KVCache,
        logits: jax.Array,
        length: np.ndarray,
        settings: Settings,
        allowed: np.ndarray | jax.Array,
        top: bool,
    ) -> Sampled:
        """A token for each row, drawn on another device than the model's."""
        seen = jax.device_put((logits, cache.tokens), self._drawer)
        return self._sampler(len(length), cache.capacity, top)(*seen, length, settings, allowed)

    def _sampler(self, rows: int, capacity: int, top: bool) -> Program:
        def examples() -> tuple[Any, ...]:
            logits = jax.ShapeDtypeStruct((rows, self.config.d_vocab), jnp.float32)
            history, length = np.zeros((rows, capacity), np.int32), np.zeros(rows, np.int32)
            return logits, history, length, *(each() for each in self._choice(rows))

        how = {"device": self._drawer, "top": steps.TOP if top else 0}
        return self._program(sampling.sample, (rows, capacity), examples, **how)

    def decode(
        self,
        cache: KVCache,
        tokens: np.ndarray,
        start: np.ndarray,
        settings: Settings,
        top: bool,
        spec: Spec = _NO_SPEC,
        operands: Operands = _NO_OPERANDS,
        allowed: np.ndarray | None = None,
    ) -> tuple[KVCache, Sampled, dict[str, Any]]:
        """Read `tokens` `[b, 1]`, which stand at `start` `[b]`, and draw the next `at_once` of each row: the first
        axis of the results.

        With `allowed`, uint32 `[b, w]`, which has a bit for each token that may be drawn, only the first is drawn:
        nobody knows yet what may follow it.
        """
        rows, count = len(tokens), self.at_once if allowed is None else 1
        program = self.decoder(cache.capacity, top, spec, operands, rows).result()
        choice = settings, self._allowed(allowed, rows)
        if self._drawer is self.device:
            cache, sampled, captures = self._call(program, cache, tokens, start, np.int32(count), *choice, operands)
        else:
            cache, logits, captures = self._call(program, cache, tokens, start, np.ones_like(start), operands)
            sampled = self._draw(cache, logits, start + 1, *choice, top)
            sampled, captures = jax.tree.map(lambda each: each[None], (sampled, captures))
        return cache, jax.tree.map(lambda drawn: drawn[:count], jax.device_get(sampled)), captures

    def decoder(
        self,
        capacity: int,
        top: bool,
        spec: Spec = _NO_SPEC,
        operands: Operands = _NO_OPERANDS,
        rows: int = 1,
    ) -> Future[Program]:
        """What `decode` computes with."""
        if self._drawer is not self.device:
            rest = np.zeros(rows, np.int32), operands
            return self._text_program(steps.read, 1, capacity, *rest, rows=rows, spec=spec)
        static = {"spec": spec, "top": steps.TOP if top else 0, "steps": self.at_once}
        rest = np.int32(0), *self._choice(rows), operands
        return self._text_program(steps.decode, 1, capacity, *rest, rows=rows, **static)

    def _choice(self, rows: int) -> tuple[Callable[[], Any], ...]:
        """How to make examples of what says how to draw."""

        def settings() -> Settings:
            shaped = self._any_settings
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), shaped)

        return settings, partial(sampling.everything, rows, self.config.d_vocab)

    def can_batch(self, rows: int, capacity: int, top: bool, spec: Spec, operands: Operands) -> bool:
        """Whether the programs are there that decode for so many answers; if not, they are compiled beside what goes
        on, and answers are made one by one until then. `operands` are those of one of them."""
        shapes = [(leaf.shape, leaf.dtype.char) for leaf in jax.tree.leaves(operands)]
        key = rows, capacity, top, spec, *shapes
        ready = self._batched.get(key)
        if ready is None:
            ready = self._background.submit(self._prepare_batch, rows, capacity, top, spec, operands)
            self._batched[key] = ready
        return ready.done()

    def _prepare_batch(self, rows: int, capacity: int, top: bool, spec: Spec, operands: Operands) -> None:
        self.decoder(capacity, top, spec, joined([operands] * rows), rows).result()
        if self._drawer is not self.device:
            self._sampler(rows, capacity, top)
        self._row_program(kv.put_row, rows, capacity, self._cache(capacity))
        self._row_program(kv.take_row, rows, capacity)

    def put_row(self, cache: KVCache, one: KVCache, row: int) -> KVCache:
        """`cache` with what `one` holds in its row; both of the same capacity. `cache` is taken over."""
        one_row = self._cache(cache.capacity)
        return self._row_program(kv.put_row, len(cache.tokens), cache.capacity, one_row)(cache, np.int32(row), one)

    def take_row(self, cache: KVCache, row: int) -> KVCache:
        """A cache of one row: a copy."""
        return self._row_program(kv.take_row, len(cache.tokens), cache.capacity)(cache, np.int32(row))

    def _row_program(self, function: Callable[..., Any], rows: int, capacity: int, *rest: Any) -> Program:
        donate = 0 if function is kv.put_row else None
        arguments = self._cache(capacity, rows), np.int32(0), *rest
        return self._program(function, (rows, capacity), lambda: arguments, donate=donate)

    def _reader(
        self,
        size: int,
        capacity: int,
        top: bool,
        spec: Spec = _NO_SPEC,
        operands: Operands = _NO_OPERANDS,
    ) -> Future[Program]:
        if self._drawer is not self.device:
            return self._text_program(steps.read, size, capacity, _one(0), operands, spec=spec)
        rest = _one(0), *self._choice(1), operands
        likeliest = steps.TOP if top else 0
        return self._text_program(steps.read_and_sample, size, capacity, *rest, spec=spec, top=likeliest)

    def score(
        self, cache: KVCache, ids: Sequence[int], start: int, targets: Sequence[int], tapping: Tapping = _NOTHING
    ) -> InTurns[tuple[KVCache, jax.Array, tuple[jax.Array, jax.Array]]]:
        """Read `ids`; the log-probability of each of `targets` after the id at its index."""
        room = cache.capacity - start
        tokens = self._padded(ids, room)
        rest = _one(len(ids)), self._padded(targets, room), tapping.operands(cache.capacity, start, len(ids))
        static = {"spec": tapping.spec, "top": steps.TOP}
        program = yield from until_there(
            self._text_program(steps.score, tokens.shape[1], cache.capacity, *rest, **static)
        )
        return self._call(program, cache, tokens, _one(start), *rest)

    def pool(
        self, cache: KVCache, ids: Sequence[int], start: int, tapping: Tapping = _NOTHING
    ) -> InTurns[tuple[KVCache, jax.Array, jax.Array]]:
        """Read `ids`; the sum of their final hidden states, and the last of these."""
        tokens = self._padded(ids, cache.capacity - start)
        rest = _one(len(ids)), tapping.operands(cache.capacity, start, len(ids))
        program = yield from until_there(
            self._text_program(steps.pool, tokens.shape[1], cache.capacity, *rest, spec=tapping.spec)
        )
        return self._call(program, cache, tokens, _one(start), *rest)

    def trace(
        self,
        cache: KVCache,
        tokens: np.ndarray,
        start: int,
        count: np.ndarray,
        tapping: Tapping,
        logits: steps.Logits,
    ) -> InTurns[tuple[KVCache, jax.Array | None, dict[str, Any]]]:
        """Read `tokens` `[b, t]`, of which `count` `[b]` count in each row, from `start` on."""
        operands = tapping.operands(cache.capacity, start, tokens.shape[1])
        rest = np.zeros(len(tokens), np.int32), operands
        how = {"rows": len(tokens), "spec": tapping.spec, "logits": logits}
        program = yield from until_there(self._text_program(steps.trace, tokens.shape[1], cache.capacity, *rest, **how))
        rows = np.full(len(tokens), start, np.int32)
        return self._call(program, cache, tokens, rows, count, operands)

    def traced(self, shape: tuple[int, int], capacity: int, tapping: Tapping, logits: steps.Logits) -> Any:
        """The shapes of what `trace` returns for `tokens` of this shape, without computing anything."""
        operands = tapping.operands(capacity, 0, shape[1])
        key = shape, capacity, tapping.spec, logits
        if key not in self._shapes_traced:  # tracing takes longer than computing
            function = partial(steps.trace, config=self.config, spec=tapping.spec, logits=logits)
            arguments = self._text_arguments(*shape, capacity, np.zeros(shape[0], np.int32), operands)
            self._shapes_traced[key] = jax.eval_shape(function, *arguments)
        return self._shapes_traced[key]

    def lens(self, streams: np.ndarray, tokens: np.ndarray, k: int) -> readings.Reading:
        """What the logit lens reads in `streams` `[n, layer, d_model]`; the ids `tokens` `[n]` are ranked."""
        shapes = streams.shape, tokens.shape
        program = self._program(readings.lens, shapes, lambda: (self._shapes, streams, tokens), config=self.config, k=k)
        return self._call(program, streams, tokens)

    def lens_logprobs(self, streams: np.ndarray) -> jax.Array:
        """What the logit lens reads in `streams` `[n, d_model]`: the log-probability of every token, `[n, d_vocab]`."""
        arguments = partial(tuple, (self._shapes, streams))
        program = self._program(readings.lens_logprobs, (streams.shape,), arguments, config=self.config)
        return self._call(program, streams)

    def divergence(self, first: jax.Array, second: jax.Array) -> readings.Divergence:
        """How far log-probabilities `[n, d_vocab]` are from those of another model, wherever it computes."""
        both = first, jax.device_put(second, self.at)
        return self._program(readings.divergence, (first.shape,), lambda: both)(*both)

    def pattern_sums(
        self,
        cache: KVCache,
        tokens: np.ndarray,
        start: int,
        count: np.ndarray,
        weights: np.ndarray,
        tapping: Tapping,
    ) -> tuple[KVCache, jax.Array]:
        """Read `tokens` `[b, t]` from `start` on; the sums of every head's pattern times `weights` `[w, t, c]`."""
        rows, size = tokens.shape
        rest = count, (weights, tapping.operands(cache.capacity, start, size))
        program = self._text_program(readings.pattern_sums, size, cache.capacity, *rest, rows=rows, spec=tapping.spec)
        return self._call(program.result(), cache, tokens, np.full(rows, start, np.int32), *rest)

    def _text_program(
        self, function: Callable[..., Any], size: int, capacity: int, *rest: Any, rows: int = 1, **static: Any
    ) -> Future[Program]:
        """`function` of the parameters, a cache, which it takes over, `size` tokens, their place, and `rest`: examples,
        or functions that make them, which are only called for a program that is not there yet."""
        taps = [(leaf.shape, leaf.dtype.char) for leaf in jax.tree.leaves(rest[-1])]
        sizes = rows, size, capacity, *taps
        arguments = partial(self._text_arguments, rows, size, capacity, *rest)
        return self._soon(function, sizes, arguments, donate=1, config=self.config, **static)

    def _text_arguments(self, rows: int, size: int, capacity: int, *rest: Any) -> tuple[Any, ...]:
        tokens, start = np.zeros((rows, size), np.int32), np.zeros(rows, np.int32)
        made = (each() if callable(each) else each for each in rest)
        return self._shapes, self._cache(capacity, rows), tokens, start, *made

    def _call(self, program: Program, *arguments: Any) -> Any:
        if self.packed:
            library.set_threads(self.threads)  # the number is the process's, and another model may have its own
        return program(self.params, *arguments)

    def _padded(self, ids: Sequence[int], room: int) -> np.ndarray:
        """One row of `ids`, filled up to the next size that a program reads and that there is `room` for."""
        row = np.zeros((1, next(size for size in (*self.chunks, 1) if len(ids) <= size <= room)), np.int32)
        row[0, : len(ids)] = ids
        return row

    def _cache(self, capacity: int, rows: int = 1) -> KVCache:
        config = self.config
        shape = rows, config.n_kv_heads, capacity, config.d_head
        where = self.layout.cache if self.layout else None
        layers: Any = [jax.ShapeDtypeStruct(shape, self.cache_dtype, sharding=where)] * config.n_layers
        return KVCache(layers, layers, jax.ShapeDtypeStruct((rows, capacity), jnp.int32))  # pyright: ignore[reportArgumentType]

    def _program(self, *what: Any, **how: Any) -> Program:
        """As `_soon`, whoever waits for it."""
        return self._soon(*what, **how).result()

    def _soon(
        self,
        function: Callable[..., Any],
        sizes: tuple[Any, ...],
        arguments: Callable[[], tuple[Any, ...]],
        *,
        donate: int | None = None,
        device: Device | None = None,
        **static: Any,
    ) -> Future[Program]:
        """The program of `function`, compiled or loaded when first asked for, and only once; beside the device's thread
        where others go on there meanwhile.

        `sizes` tells its arguments' shapes apart; `arguments` makes examples of them.
        """
        key = function, sizes, tuple(static.items())
        with self._compiling:
            program = self._programs.get(key)
            if program is not None:
                return program
            program = self._programs[key] = Future()
        # A trace reads whole prompts, and no answer's first token waits for it.
        repack = function is steps.trace and not self.packed
        keep = not static.get("spec", _NO_SPEC).calls
        how = {"device": device or self.device, "donate": donate, "keep": keep, "repack": repack, "layout": self.layout}
        make = partial(self._make, key, program, lambda: load_or_compile(function, arguments(), **how, **static))
        if DEVICE.here and DEVICE.crowded:
            COMPILER.submit(make)
        else:
            make()
        return program

    def _make(self, key: tuple[Any, ...], program: Future[Program], compiled: Callable[[], Program]) -> None:
        try:
            program.set_result(compiled())
            if dict(key[-1]).get("spec"):
                self._forget_all_but(_MOST_TAPPED, key)
        except BaseException as error:
            with self._compiling:
                del self._programs[key]  # the next call tries again
            program.set_exception(error)

    def _forget_all_but(self, most: int, newest: tuple[Any, ...]) -> None:
        """Let go of the oldest programs that capture or edit: there is no end to what can be asked."""
        with self._compiling:
            self._tapped.append(newest)
            while len(self._tapped) > most:
                oldest = self._tapped.pop(0)
                self._programs.pop(oldest, None)
                spec = dict(oldest[-1])["spec"]
                for key in [key for key in tuple(self._batched) if spec in key]:
                    self._batched.pop(key, None)  # it is to be compiled beside what goes on again


def _one(value: int) -> np.ndarray:
    return np.array([value], np.int32)


def _owned(values: np.ndarray, where: Any) -> jax.Array:
    """`values` on the device, in memory of its own: on a CPU `device_put` may share numpy's, and a program that takes a
    cache over would write to it, and free it, behind numpy's back."""
    return _computed(jax.device_put(values, where))


@jax.jit
def _computed(values: jax.Array) -> jax.Array:
    return values * 1
