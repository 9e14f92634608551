"""What looking inside costs: traces, captures while decoding, and patching, beside PyTorch's tools on the same weights.

    python tests/bench/inside.py [--model GGUF] [--peers PYTHON] [--rounds N] [--only trace|decode|sweep ...]

`--peers` is a Python with PyTorch, transformers and gguf, and with TransformerLens where it is to be measured; see
`peers.py`. All is measured warm, on two threads, alternating round by round; the medians are printed, with the
fastest and the slowest round, and what each row is beside the ones it is measured against: the median over the rounds,
since a machine that becomes slower does so for all rows of a round.
"""

import argparse
import json
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from operator import truediv
from pathlib import Path
from typing import Any

import irkit
from irkit import hub
from irkit.analysis import patching_sweep

THREADS = 2
PROMPT, COUNT = 128, 64
"""Tokens of the traced prompt, and tokens decoded behind a quarter of it."""
CAPTURES = {
    "all patterns": "pattern",
    "one layer's pattern": {"names": "pattern", "layers": 5},
    "all resid_post": "resid_post",
    "the lens at all layers": {"names": "resid_post", "reduce": "lens", "k": 5},
}
SUBJECT, SINGLE = " Mary", 12
CLEAN = "When Mary and John went to the store on a warm and sunny day in May, John gave a bottle of milk to"
CORRUPT = "When Mary and John went to the store on a warm and sunny day in May, Mary gave a bottle of milk to"
"""Prompts of the sweep, and how many of its cells are computed singly, to say how long all of them would take."""


class Peers:
    """The process that measures with PyTorch."""

    def __init__(self, python: str, path: Path) -> None:
        command = [python, str(Path(__file__).with_name("peers.py")), str(path), str(THREADS)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ask(self, **request: Any) -> float | None:
        """The seconds that the request took, or None where the engine is not there."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        reply = self._process.stdout.readline()
        if not reply:
            raise SystemExit("the process of the peers ended; run peers.py by hand to see why")
        return json.loads(reply)[0]


def alternate(rows: dict[str, Callable[[], float | None]], rounds: int) -> dict[str, list[float]]:
    """The seconds of each row in each round, behind one round to warm up; rows that answer None are left out."""
    there = {name: measure for name, measure in rows.items() if measure() is not None}
    found: dict[str, list[float]] = {name: [] for name in there}
    for _ in range(rounds):
        for name, measure in there.items():
            found[name].append(measure() or 0.0)
    return found


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def show(title: str, found: dict[str, list[float]], amount: int, unit: str, beside: list[str]) -> None:
    """A table: the speed of each row, and how many times that of each row of `beside` it is."""
    medians = {name: statistics.median(taken) for name, taken in found.items()}
    beside = [name for name in beside if name in medians]
    width = max(map(len, found)) + 2
    print(f"\n{title}\n{'':{width}}{unit:>9} {'slowest':>9} {'fastest':>9}" + "".join(f"  / {name}" for name in beside))
    for name, taken in found.items():
        speeds = "".join(f"{amount / each:9.1f} " for each in (medians[name], max(taken), min(taken)))
        ratios = "".join(
            f"{statistics.median(map(truediv, found[other], taken)):>{len(other) + 4}.2f}" for other in beside
        )
        print(f"{name:{width}}{speeds}{ratios}", flush=True)


def traces(sessions: dict[str, irkit.Session], peers: Peers | None, rounds: int) -> None:
    """Every hook point of a prompt, kept."""
    draw = random.Random(0)

    def ids() -> list[int]:
        return draw.choices(range(1000, 40000), k=PROMPT)

    rows: dict[str, Callable[[], float | None]] = {
        f"irkit {name}": lambda session=session: seconds(lambda: session.trace(ids()))
        for name, session in sessions.items()
    }
    against = ["transformers", "hooked", "bridge"] if peers else []
    for engine in against:
        rows[engine] = lambda engine=engine: peers.ask(what="trace", engine=engine, ids=ids()) if peers else None
    show(f"trace of all hook points, {PROMPT} tokens", alternate(rows, rounds), PROMPT, "tok/s", against)


def decoding(session: irkit.Session, peers: Peers | None, rounds: int) -> None:
    """Tokens made one by one, with and without captures."""
    ids = random.Random(1).choices(range(1000, 40000), k=PROMPT // 4)
    endless = dict.fromkeys(session.model.tokenizer.eog_ids, -1e4)

    def decode(capture: Any) -> float:
        session.reset()
        # The first token is prefill's.
        made = session.generate(ids, capture, num_predict=COUNT + 1, temperature=0, logit_bias=endless)
        return made.stats.decode_seconds

    rows: dict[str, Callable[[], float | None]] = {
        name: lambda capture=capture: decode(capture) for name, capture in ({"irkit": None} | CAPTURES).items()
    }
    against = ["irkit"]
    if peers:
        ask = {"what": "decode", "engine": "transformers", "ids": ids, "count": COUNT}
        rows["transformers"] = lambda: peers.ask(**ask, attentions=False)
        rows["with attentions"] = lambda: peers.ask(**ask, attentions=True)
        against += ["with attentions"]
    show(f"decoding {COUNT} tokens, fast", alternate(rows, rounds), COUNT, "tok/s", against)


def sweeping(sessions: dict[str, irkit.Session], rounds: int) -> None:
    """resid_pre patched at every layer and position of the prompts' last tokens, together and cell by cell."""
    for precision, session in sessions.items():
        clean, corrupt = (session.tokenize(text)[-24:] for text in (CLEAN, CORRUPT))
        # The names then differ too, and so does every position from the first: nothing is left out.
        clean[0] = session.tokenize("Later")[0]
        cells = session.model.config.n_layers * len(clean)

        def singly(session: irkit.Session, clean: list[int], corrupt: list[int], cells: int) -> float:
            pick = random.Random(2)
            kept = session.trace(clean, names="resid_pre", logits="none")

            def cell() -> None:
                layer, position = pick.randrange(session.model.config.n_layers), pick.randrange(len(clean))
                edit = irkit.patch(kept, "resid_pre", layer, positions=position)
                session.trace(corrupt, names=(), logits="last", edits=[edit])

            return seconds(lambda: [cell() for _ in range(SINGLE)]) / SINGLE * cells

        given = session, clean, corrupt
        rows: dict[str, Callable[[], float | None]] = {
            "patching_sweep": lambda given=given: seconds(lambda: patching_sweep(*given, token=SUBJECT, other=" John")),
            "one forward a cell": lambda given=given, cells=cells: singly(*given, cells),
        }
        found = alternate(rows, rounds)
        show(f"patching {cells} cells, {precision}", found, cells, "cells/s", ["one forward a cell"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Llama's GGUF file; smollm2 if not given")
    parser.add_argument("--peers", metavar="PYTHON", help="one with PyTorch; only irkit is measured if not given")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=["trace", "decode", "sweep"], default=["trace", "decode", "sweep"])
    options = parser.parse_args()
    path = options.model or hub.ensure("smollm2")
    peers = Peers(options.peers, path) if options.peers else None
    sessions = {name: irkit.Session(str(path), precision=name, threads=THREADS) for name in ("exact", "fast")}
    if "trace" in options.only:
        traces(sessions, peers, options.rounds)
    if "decode" in options.only:
        decoding(sessions["fast"], peers, options.rounds)
    if "sweep" in options.only:
        sweeping(sessions, options.rounds)


if __name__ == "__main__":
    main()
