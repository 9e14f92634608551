"""The measuring: which engines, which measures, how often."""

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from irkit import errors, hub
from irkit.bench import serving
from irkit.bench.machine import busy_core, memory_bandwidth
from irkit.engine import Model, open_model
from irkit.engine.backends import physical_cores
from irkit.errors import BackendError, IrkitError, OptionError
from irkit.options import BenchOptions, LoadOptions

PEERS = {"llama.cpp": "llama_cpp"}
"""Engines to compare with, and the package each needs."""
SECONDS = 1.0
"""For how long a speed is measured again in each run, at least."""
KV_BYTES = 2
"""Of a number in the KV cache, where its share of the memory's bandwidth is computed: half precision."""
UNITS = {
    "import": "s",
    "load": "s",
    "first_token": "s",
    "prefill": "tokens/s",
    "decode": "tokens/s",
    "decode_json": "tokens/s",
    "json_masks": "s",
    "of_bandwidth": "",
    "peak_memory": "bytes",
    "serve": "tokens/s",
    "serve_gain": "",
    "serve_first_token": "s",
    "serve_chunks": "",
    "serve_long": "s",
    "serve_cost": "",
}
"""What is measured, in the order of a report; `of_bandwidth`, `serve_gain` and `serve_cost` are fractions,
`serve_chunks` counts chunks of a prompt, and the tokens of `serve` and `serve_gain` are clients."""

_Put = Callable[[str, str, int | None, float], None]


@dataclass(frozen=True)
class Measure:
    """One thing measured, with a value for every run of every engine."""

    name: str
    """One of `UNITS`."""
    tokens: int | None
    """Of the prompt, or of the context, where that matters."""
    values: dict[str, list[float]]

    def median(self, engine: str) -> float:
        """The median of an engine's runs."""
        return statistics.median(self.values[engine])

    def ratio(self, peer: str) -> float | None:
        """The median, over the runs, of irkit's value divided by the peer's; None where the peer has none, or where the
        values are near 0."""
        if peer not in self.values or self.name == "serve_cost":
            return None
        pairs = zip(self.values["irkit"], self.values[peer], strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)

    def as_json(self) -> dict[str, Any]:
        """All of it, as what the json module writes."""
        engines = {
            name: {"median": self.median(name), "min": min(runs), "max": max(runs), "runs": runs}
            for name, runs in self.values.items()
        }
        ratios = {f"irkit / {peer}": self.ratio(peer) for peer in engines if peer != "irkit"}
        return {"name": self.name, "tokens": self.tokens, "unit": UNITS[self.name], **engines, **ratios}


@dataclass(frozen=True)
class Report:
    """What was measured of one model."""

    model: str
    path: str
    size: int
    """Of the file, in bytes."""
    weight_bytes: int
    """Of the tensors that making one token reads, as the file holds them."""
    threads: int
    busy: bool
    """Whether another process kept one core busy."""
    engines: dict[str, str]
    """Each engine, with a line about it."""
    bandwidth: list[float]
    """Of this machine's memory, in bytes a second, in each run."""
    warm_up: float
    """Seconds that irkit's first run took, which does not count: it compiles the programs not yet on the disk."""
    measures: list[Measure]

    def as_json(self) -> dict[str, Any]:
        """All of it, as what the json module writes."""
        return {**vars(self), "measures": [measure.as_json() for measure in self.measures]}


def bench(name: str | Path, options: BenchOptions, say: Callable[[str], None] = lambda line: None) -> Report:
    """Measure one model as `options` ask, telling `say` now and then how far it is.

    Raises:
        BackendError: the peer is not installed, or an engine cannot run the model.
        OptionError: a prompt or context is longer than the model's context.
        ModelNotFoundError, ModelFileError, UnsupportedModelError: as for a `Session`.
    """
    if options.vs and not find_spec(PEERS[options.vs]):
        raise BackendError(f"{options.vs} is not installed here; pip install 'irkit[bench]' builds it")
    if options.serve and options.vs and not find_spec("xllamacpp"):
        raise BackendError("llama.cpp's server is not installed here; pip install xllamacpp")
    engines = ["irkit", *([options.vs] if options.vs else [])]
    threads = options.threads or physical_cores()
    load = LoadOptions(**{**options.model_dump(include=set(LoadOptions.model_fields)), "threads": threads})
    model = open_model(hub.ensure(name), load)
    longest = 1 + max(*options.prompt_lengths, *(context + options.num_predict for context in options.contexts), 1)
    if longest > (n_ctx := load.num_ctx or model.config.n_ctx):
        raise OptionError(f"prompt_lengths and contexts need room for {longest} tokens; the context holds {n_ctx}")

    found: dict[tuple[str, int | None], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    bandwidth: list[float] = []

    def put(engine: str, what: str, tokens: int | None, value: float) -> None:
        found[what, tokens][engine].append(value)
        if what == "decode" and tokens is not None:
            read = weight_bytes(model) + kv_bytes(model, tokens + options.num_predict // 2)
            put(engine, "of_bandwidth", tokens, value * read / bandwidth[-1])

    say(f"{name}: warming up")
    began = time.perf_counter()
    _run(engines[:1], model.path, load, options, longest, 0.0, lambda *_: None)
    warm_up = time.perf_counter() - began
    about: dict[str, str] = {}
    with busy_core(options.busy):
        for number in range(options.runs):
            say(f"{name}: run {number + 1} of {options.runs}")
            bandwidth.append(memory_bandwidth(threads))
            about = _run(engines, model.path, load, options, longest, SECONDS, put)
            for engine in engines if options.serve else ():
                alone = _decoding_alone(engine, model.path, load, options.num_predict)
                with alone as (inside, own), serving.server(engine, model.path, threads) as url:
                    rest = model, options.num_predict, partial(put, engine)
                    serving.cost(own or url, inside, *rest)
                    asyncio.run(serving.measure(url, *rest))
    return Report(
        model=str(name),
        path=str(model.path),
        size=model.path.stat().st_size,
        weight_bytes=weight_bytes(model),
        threads=threads,
        busy=options.busy,
        engines=about,
        bandwidth=bandwidth,
        warm_up=warm_up,
        measures=[
            Measure(what, tokens, dict(values))
            for unit in UNITS
            for (what, tokens), values in found.items()
            if what == unit
        ],
    )


def weight_bytes(model: Model) -> int:
    """Bytes of the tensors that making one token reads: all but an embedding that is not the output head too."""
    rows = "token_embd.weight" if "output.weight" in model.file.tensors else None
    return sum(tensor.nbytes for name, tensor in model.file.tensors.items() if name != rows)


def kv_bytes(model: Model, context: int) -> int:
    """Bytes of the keys and values of so many tokens, in half precision."""
    config = model.config
    return 2 * config.n_layers * config.n_kv_heads * config.d_head * KV_BYTES * context


def _run(
    engines: Sequence[str],
    path: Path,
    load: LoadOptions,
    options: BenchOptions,
    longest: int,
    seconds: float,
    put: _Put,
) -> dict[str, str]:
    """One run of every engine, in a process each, its values given to `put`; a line about each."""
    shortest, count = min(options.prompt_lengths, default=1), options.num_predict
    with ExitStack() as stack:
        workers = []
        for engine in engines:
            worker = stack.enter_context(Worker(engine, load.model_dump()))
            workers.append(worker)
            put(engine, "import", None, worker.import_seconds)
            put(engine, "load", None, worker.ask(what="load", path=str(path), tokens=longest))
        for worker in workers:
            took = worker.ask(what="first_token", tokens=shortest, seconds=seconds)
            put(worker.engine, "first_token", shortest, took)
        for tokens in options.prompt_lengths:
            for worker in workers:
                took = worker.ask(what="prefill", tokens=tokens, seconds=seconds)
                put(worker.engine, "prefill", tokens, tokens / took)
        for tokens in options.contexts:
            for worker in workers:
                took = worker.ask(what="decode", tokens=tokens, count=count, seconds=seconds)
                put(worker.engine, "decode", tokens, count / took)
            if options.json_format:
                request = {"tokens": tokens, "count": count, "seconds": seconds}
                put("irkit", "decode_json", tokens, count / workers[0].ask(what="decode_json", **request))
                put("irkit", "json_masks", tokens, workers[0].ask(what="json_masks", **request) / count)
        for worker in workers:
            put(worker.engine, "peak_memory", None, worker.ask(what="peak_memory"))
        return {worker.engine: worker.about for worker in workers}


@contextmanager
def _decoding_alone(
    engine: str, path: Path, load: LoadOptions, count: int
) -> Iterator[tuple[Callable[[], float], str | None]]:
    """What measures tokens a second without a server, behind a prompt as short as those that a server is asked; and the
    address of a server in the same process, if the engine can have one."""
    with Worker(engine, load.model_dump()) as worker:
        worker.ask(what="load", path=str(path), tokens=serving.SHORT + count + 1)
        own = f"http://127.0.0.1:{worker.ask(what='serve')}" if engine == "irkit" else None
        yield lambda: count / worker.ask(what="decode", tokens=serving.SHORT, count=count, seconds=0), own


class Worker:
    """A process that measures one engine; `worker.py` is its other side."""

    def __init__(self, engine: str, options: dict[str, Any]) -> None:
        self.engine = engine
        script = Path(__file__).with_name("worker.py")
        # -P: its own folder is not where it should import from.
        command = [sys.executable, "-P", str(script), engine, json.dumps(options)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started = self._reply()
        self.about: str = started["about"]
        self.import_seconds: float = started["seconds"]

    def ask(self, **request: Any) -> float:
        """The reply to a request for `worker.answer`.

        Raises:
            IrkitError: what irkit raised there, or that the process has ended.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # that it has ended is said below
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise BackendError(f"the process that measures {self.engine} ended with code {code}")
        reply = json.loads(line)
        if isinstance(reply, dict) and "error" in reply:
            kind: type[IrkitError] = getattr(errors, reply["error"])
            raise kind(reply["message"])
        return reply

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind:
            self._process.kill()
        # Its input ends, and so does it, once it has finished and kept what it compiles on the side.
        self._process.communicate()
