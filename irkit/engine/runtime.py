"""A model ready to compute: its weights on the device, and its compiled programs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from irkit import families
from irkit.engine import backends, steps
from irkit.engine.cache import SMALLEST
from irkit.engine.programs import Device, Program, load_or_compile
from irkit.options import SamplingOptions
from irkit.transformer import cache as kv
from irkit.transformer import sampling
from irkit.transformer.cache import KVCache
from irkit.transformer.sampling import Sampled, Settings

if TYPE_CHECKING:
    from irkit.engine.model import Model

CHUNKS = (1, 8, 32, 128, 512)
"""How many tokens a program reads at once; 1 is decoding."""

# Half precision where the backend multiplies fastest in it.
_FAST = {"cuda": jnp.bfloat16, "metal": jnp.float16, "mps": jnp.float16}


def chunk(remaining: int, room: int) -> int:
    """How many of `remaining` tokens to read next, where the cache has `room` for padding and all.

    As many as fill a program by more than half: a padded token costs as much as a real one.
    """
    size = next((size for size in CHUNKS if size >= remaining), CHUNKS[-1])
    if size > room or (size > CHUNKS[1] and 2 * remaining <= size):
        size = max(size for size in CHUNKS if size <= min(remaining, room))
    return min(remaining, size)


class Runtime:
    """What the device's thread computes with, one sequence at a time."""

    def __init__(self, model: Model, reading: Any) -> None:
        """`reading` is the tree of the model's weights, each a future of a float32 numpy array or None."""
        selected = backends.select(model.backend, model.threads)
        fast = model.precision == "fast" and selected.name in _FAST
        self.config = model.config
        self.device = selected.device
        self.dtype = jnp.dtype(_FAST[selected.name] if fast else jnp.float32)
        # Sorting and branching are what Apple's backends are worst at: there the CPU draws the tokens.
        self._drawer = jax.devices("cpu")[0] if selected.name in ("metal", "mps") else self.device
        # An example for compiling: made once, since every step asks for its program.
        self._any_settings = sampling.settings([SamplingOptions()], [0], self.config.d_vocab)
        self._programs: dict[tuple[Any, ...], Future[Program]] = {}
        self._compiling = threading.Lock()
        self._shapes = jax.tree.map(
            lambda weight: self._shape(weight) if weight.is_in(model.file) else None,
            families.weights(model.file, model.config),
        )
        # One thread, in the order of need: two would make the first program wait for the second.
        self._background = ThreadPoolExecutor(1, thread_name_prefix="irkit-compile")
        self._prepared: set[tuple[int, int, bool]] = set()
        # What nearly every answer begins with: loaded or compiled while the weights are being read.
        capacity = min(SMALLEST, model.config.n_ctx)
        self._background.submit(self._reader, 32, capacity, False)
        self.prepare(capacity, capacity, top=False)
        self.params = jax.tree.map(self._place, reading)

    def _shape(self, weight: families.Weight) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(weight.shape, self.dtype if len(weight.shape) == 2 else jnp.float32)

    def _place(self, reading: Future[np.ndarray | None]) -> jax.Array | None:
        value = reading.result()
        if value is None:
            return None
        return jax.device_put(value.astype(self.dtype, copy=False) if value.ndim == 2 else value, self.device)

    def settings(self, options: SamplingOptions, seed: int) -> Settings:
        """Sampling settings, on the device that draws."""
        return jax.device_put(sampling.settings([options], [seed], self.config.d_vocab), self._drawer)

    def empty(self, capacity: int) -> KVCache:
        """A cache with room for `capacity` tokens."""
        shape = {"config": self.config, "batch": 1, "capacity": capacity, "dtype": self.dtype}
        return self._program(kv.empty, (capacity,), lambda: (), **shape)()

    def grow(self, cache: KVCache, capacity: int) -> KVCache:
        """The same cache with room for `capacity` tokens."""
        return self._grower(cache.capacity, capacity)(cache)

    def _grower(self, old: int, capacity: int) -> Program:
        return self._program(kv.grow, (old, capacity), lambda: (self._cache(old),), capacity=capacity)

    def prepare(self, capacity: int, soon: int, top: bool) -> None:
        """Compile beside what goes on what decoding needs at `capacity`, and when it has grown to `soon`."""
        if (capacity, soon, top) in self._prepared:
            return
        self._prepared.add((capacity, soon, top))
        self._background.submit(self._reader, 1, capacity, top)
        if soon != capacity:
            self._background.submit(self._grower, capacity, soon)
            self._background.submit(self._reader, 1, soon, top)

    def read(
        self, cache: KVCache, ids: Sequence[int], start: int, settings: Settings, top: bool
    ) -> tuple[KVCache, Sampled]:
        """Read `ids`, which stand at `start` and after, and draw the token that follows them.

        `top` asks for the `steps.TOP` likeliest tokens too.
        """
        tokens, where = _padded(ids), (_one(start), _one(len(ids)))
        program = self._reader(tokens.shape[1], cache.capacity, top)
        if self._drawer is self.device:
            return program(self.params, cache, tokens, *where, settings)
        cache, logits = program(self.params, cache, tokens, *where)
        seen = jax.device_put((logits, cache.tokens), self._drawer)
        draw = self._program(
            sampling.sample,
            (cache.capacity,),
            lambda: (*seen, _one(0), settings),
            device=self._drawer,
            top=steps.TOP if top else 0,
        )
        return cache, draw(*seen, _one(start + len(ids)), settings)

    def _reader(self, size: int, capacity: int, top: bool) -> Program:
        if self._drawer is not self.device:
            return self._text_program(steps.read, size, capacity, _one(0))
        rest = _one(0), self._any_settings
        return self._text_program(steps.read_and_sample, size, capacity, *rest, top=steps.TOP if top else 0)

    def score(
        self, cache: KVCache, ids: Sequence[int], start: int, targets: Sequence[int]
    ) -> tuple[KVCache, jax.Array, tuple[jax.Array, jax.Array]]:
        """Read `ids`; the log-probability of each of `targets` after the id at its index."""
        tokens, wanted = _padded(ids), _padded(targets)
        program = self._text_program(steps.score, tokens.shape[1], cache.capacity, wanted, top=steps.TOP)
        return program(self.params, cache, tokens, _one(start), wanted)

    def pool(self, cache: KVCache, ids: Sequence[int], start: int) -> tuple[KVCache, jax.Array, jax.Array]:
        """Read `ids`; the sum of their final hidden states, and the last of these."""
        tokens, count = _padded(ids), _one(len(ids))
        program = self._text_program(steps.pool, tokens.shape[1], cache.capacity, count)
        return program(self.params, cache, tokens, _one(start), count)

    def _text_program(
        self, function: Callable[..., Any], size: int, capacity: int, *rest: Any, **static: Any
    ) -> Program:
        """`function` of the parameters, a cache, which it takes over, `size` tokens, their place, and `rest`."""

        def arguments() -> tuple[Any, ...]:
            return self._shapes, self._cache(capacity), np.zeros((1, size), np.int32), _one(0), *rest

        return self._program(function, (size, capacity), arguments, donate=1, config=self.config, **static)

    def _cache(self, capacity: int) -> KVCache:
        config = self.config
        layer = jax.ShapeDtypeStruct((1, config.n_kv_heads, capacity, config.d_head), self.dtype)
        layers: Any = [layer] * config.n_layers
        return KVCache(layers, layers, jax.ShapeDtypeStruct((1, capacity), jnp.int32))  # pyright: ignore[reportArgumentType]

    def _program(
        self,
        function: Callable[..., Any],
        sizes: tuple[int, ...],
        arguments: Callable[[], tuple[Any, ...]],
        *,
        donate: int | None = None,
        device: Device | None = None,
        **static: Any,
    ) -> Program:
        """The program of `function`, compiled or loaded when first asked for, and only once.

        `sizes` tells its arguments' shapes apart; `arguments` makes examples of them.
        """
        key = function, sizes, tuple(static.items())
        with self._compiling:
            mine = key not in self._programs
            program = self._programs.setdefault(key, Future())
        if mine:
            try:
                made = load_or_compile(function, arguments(), device=device or self.device, donate=donate, **static)
                program.set_result(made)
            except BaseException as error:
                with self._compiling:
                    del self._programs[key]  # the next call tries again
                program.set_exception(error)
        return program.result()


def _padded(ids: Sequence[int]) -> np.ndarray:
    """One row of `ids`, filled up to the next size that a program reads."""
    size = next(size for size in CHUNKS if size >= len(ids))
    row = np.zeros((1, size), np.int32)
    row[0, : len(ids)] = ids
    return row


def _one(value: int) -> np.ndarray:
    return np.array([value], np.int32)
