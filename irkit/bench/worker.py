"""One process that measures one engine: `python worker.py ENGINE`, requests and replies as lines of JSON.

Run by its path, not as part of the package, so that the process of a peer holds nothing of irkit. Every measure of
speed is taken warm: what is measured runs once before, unmeasured.
"""

import json
import os
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any


class PeerError(Exception):
    """Another engine cannot do what was asked of it."""


class Irkit:
    """irkit, through a `Session`: tokens are drawn and turned into text, as for any caller.

    Made, it has imported its libraries and started them, and opened no model yet. All times are in seconds.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        from irkit.engine import backends
        from irkit.session import Session

        import_module("irkit.engine.generate")  # with all that computes, which a session imports when it first does
        self.about = backends.select(options["backend"], options["threads"]).line
        self._session, self._options = Session, options

    def open(self, path: str, n_ctx: int) -> None:
        """Opens a model, and computes the first token after a prompt of one token.

        `n_ctx`, the most tokens it will hold, is for engines that take the memory for them now.
        """
        self.session = self._session(path, **self._options)
        self.session.model.load()  # as every call that makes text begins: the tokenizer is made beside it
        tokenizer = self.session.model.tokenizer
        self.d_vocab = tokenizer.vocab_size
        # An answer must not end early; banning tokens costs nothing, as a bias is added in any case.
        self._greedy = {"temperature": 0, "logit_bias": dict.fromkeys(tokenizer.eog_ids, -1e4)}
        self.first_token([0, 0])

    def first_token(self, ids: Sequence[int]) -> float:
        """The time from a prompt, of which nothing is in the cache, to the token drawn after it."""
        self.session.reset()
        began = time.perf_counter()
        self.session.generate(ids, num_predict=1, **self._greedy).wait()
        return time.perf_counter() - began

    def prefill(self, ids: Sequence[int]) -> float:
        """The time to read a prompt of which nothing is in the cache."""
        self.session.reset()
        return self.session.generate(ids, num_predict=1, **self._greedy).stats.prefill_seconds

    def decode(self, ids: Sequence[int], count: int) -> float:
        """The time to make `count` tokens, one by one, behind `ids`, which stay in the cache for the next call."""
        # The first token is prefill's.
        return self.session.generate(ids, num_predict=count + 1, **self._greedy).stats.decode_seconds

    def serve(self) -> int:
        """The port at which a server in this process has the model from now on."""
        return int(self.session.serve(port=0).url.rpartition(":")[2])

    def decode_json(self, ids: Sequence[int], count: int) -> float:
        """As `decode`, where a schema says which tokens may come."""
        return self._in_json(ids, count).decode_seconds

    def json_masks(self, ids: Sequence[int], count: int) -> float:
        """Of that, the time in which it is found which tokens may come."""
        return self._in_json(ids, count).form_seconds

    def _in_json(self, ids: Sequence[int], count: int) -> Any:
        fields = {"name": {"type": "string", "maxLength": 40}, "size": {"type": "number"}, "new": {"type": "boolean"}}
        thing = {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}
        endless = {"type": "array", "items": thing, "minItems": 1 << 20}
        return self.session.generate(ids, num_predict=count + 1, format=endless, **self._greedy).stats


class LlamaCpp:
    """llama.cpp, through the C functions that llama-cpp-python exports, measured as its own llama-bench does.

    Decoding feeds it random tokens and draws none: a little less work than irkit's.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._api = api = import_module("llama_cpp")
        self._quiet = api.llama_log_callback(lambda level, text, data: None)  # ctypes keeps no reference to it
        api.llama_log_set(self._quiet, None)
        api.llama_backend_init()
        self._threads = options["threads"]
        features = re.findall(r"(\w+) = 1", api.llama_print_system_info().decode())
        threads = f"{self._threads} thread{'s' * (self._threads > 1)}"
        self.about = f"{threads}, llama-cpp-python {api.__version__}, built with {' '.join(features)}"

    def open(self, path: str, n_ctx: int) -> None:
        """As `Irkit.open`; on the CPU."""
        api = self._api
        of_model, of_context = api.llama_model_default_params(), api.llama_context_default_params()
        of_model.n_gpu_layers = 0
        of_context.n_ctx = n_ctx
        of_context.n_threads = of_context.n_threads_batch = self._threads
        model = api.llama_model_load_from_file(path.encode(), of_model)
        self._context = model and api.llama_init_from_model(model, of_context)
        if not self._context:
            raise PeerError(f"llama.cpp cannot open {path}")
        self.d_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self._n_batch = api.llama_n_batch(self._context)
        self._memory = api.llama_get_memory(self._context)
        self._sampler = api.llama_sampler_init_greedy()
        self._cached: Sequence[int] = ()
        self.first_token([0, 0])

    def first_token(self, ids: Sequence[int]) -> float:
        """As `Irkit.first_token`."""
        began = time.perf_counter()
        self._read_alone(ids)
        self._api.llama_sampler_sample(self._sampler, self._context, -1)
        return time.perf_counter() - began

    def prefill(self, ids: Sequence[int]) -> float:
        """As `Irkit.prefill`."""
        began = time.perf_counter()
        self._read_alone(ids)
        return time.perf_counter() - began

    def decode(self, ids: Sequence[int], count: int) -> float:
        """As `Irkit.decode`."""
        if self._cached != ids:
            self._read_alone(ids)
            self._cached = ids
        self._api.llama_memory_seq_rm(self._memory, 0, len(ids), -1)
        fed = random.Random(0).choices(range(self.d_vocab), k=count)
        began = time.perf_counter()
        for token in fed:
            self._read([token])
        return time.perf_counter() - began

    def _read_alone(self, ids: Sequence[int]) -> None:
        self._api.llama_memory_clear(self._memory, False)
        self._cached = ()
        self._read(ids)

    def _read(self, ids: Sequence[int]) -> None:
        api = self._api
        for start in range(0, len(ids), self._n_batch):
            part = ids[start : start + self._n_batch]
            array = (api.llama_token * len(part))(*part)
            if api.llama_decode(self._context, api.llama_batch_get_one(array, len(part))):
                raise PeerError("llama.cpp failed to compute")
        api.llama_synchronize(self._context)


ENGINES = {"irkit": Irkit, "llama.cpp": LlamaCpp}


def repeat(measure: Callable[[int], float], seconds: float) -> float:
    """The median of `measure(0)`, `measure(1)`, ... once together they took so long; behind one for warming up."""
    measure(-1)
    times = [measure(0)]
    while sum(times) < seconds:
        times.append(measure(len(times)))
    return statistics.median(times)


def peak_memory() -> int:
    """The most memory that this process has held, in bytes, pages of mapped files included."""
    if sys.platform == "linux":  # where getrusage still counts what the process was before it became this one
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def answer(
    engine: Irkit | LlamaCpp, what: str, tokens: int = 0, count: int = 0, seconds: float = 0.0, path: str = ""
) -> float:
    """The reply to one request, in seconds, bytes, or a port; a speed is measured again until `seconds` have passed."""

    def ids(seed: int) -> list[int]:
        # A new prompt each time, or it might be found in a cache; the same ones for every engine.
        return random.Random(f"{tokens} {seed}").choices(range(engine.d_vocab), k=tokens)

    if what == "load":
        began = time.perf_counter()
        engine.open(path, tokens)
        return time.perf_counter() - began
    if what == "first_token":
        return repeat(lambda n: engine.first_token(ids(n)), seconds)
    if what == "prefill":
        return repeat(lambda n: engine.prefill(ids(n)), seconds)
    if what == "decode":
        same = ids(0)
        return repeat(lambda n: engine.decode(same, count), seconds)
    if what == "serve" and isinstance(engine, Irkit):
        return engine.serve()
    if what in ("decode_json", "json_masks") and isinstance(engine, Irkit):
        same, measure = ids(0), getattr(engine, what)
        return repeat(lambda n: measure(same, count), seconds)
    return peak_memory()


def main() -> None:
    """Serves requests until standard input ends."""
    # Only replies go to what was standard output: libraries that print shall not break a line.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name, options = sys.argv[1], json.loads(sys.argv[2])
    began = time.perf_counter()
    try:
        engine = ENGINES[name](options)
        print(json.dumps({"seconds": time.perf_counter() - began, "about": engine.about}), file=replies)
        for line in sys.stdin:
            print(json.dumps(answer(engine, **json.loads(line))), file=replies)
    except PeerError as error:
        print(json.dumps({"error": "BackendError", "message": str(error)}), file=replies)
    except Exception as error:
        if type(error).__module__ != "irkit.errors":
            raise
        print(json.dumps({"error": type(error).__name__, "message": str(error)}), file=replies)


if __name__ == "__main__":
    main()
