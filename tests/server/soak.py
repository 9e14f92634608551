"""A server under load for a long time: `python tests/server/soak.py --minutes 10`.

Eight clients ask at random: streams and not, long prompts and short ones, many that leave in the middle, bad requests.
From time to time they rest: then every slot is to be free, and the model is let go of. Memory is looked at before,
where it follows the lengths of the prompts that are held, and after, where what is left shows what leaks. At the end
it says whether both stayed flat, every slot is free, no request failed that should not, and an answer is the same as
at the beginning; the exit code is 1 if not. The machine should do nothing else: what is held under load follows how
much of it the server gets.
"""

import argparse
import contextlib
import random
import statistics
import sys
import threading
import time
from collections import Counter

import httpx
from real import Server, eventually, serving

CLIENTS = 8
RESTS = 60
"""How often they rest."""
WARM_UP = 0.25
"""The share of the time after which memory should have stopped to grow: programs are compiled, caches are full."""
GROWTH = 0.03
"""By how much of itself memory may grow from then on."""
MODEL = "smollm2"


def client(
    server: Server, number: int, until: float, go: threading.Event, outcomes: Counter[str], failures: list[str]
) -> None:
    """Ask until then, where they may `go` on."""
    rng = random.Random(number)
    with httpx.Client(base_url=server.url, timeout=300) as http:
        while time.monotonic() < until:
            go.wait()
            kind = rng.choice(["whole", "stream", "stream", "leave", "leave early", "long", "score", "embed", "bad"])
            try:
                ask(http, kind, rng)
                outcomes[kind] += 1
            except BusyError:
                outcomes["busy"] += 1
                time.sleep(0.5)
            except Exception as error:
                failures.append(f"{kind}: {type(error).__name__}: {error}")


class BusyError(Exception):
    """The server answers 503."""


def ask(http: httpx.Client, kind: str, rng: random.Random) -> None:
    """One request of this kind, and a look at what comes back."""
    words = ["red", "green", "blue", "one", "two", "three", "why", "how", "who", "sea", "sky", "sun", "dog", "cat"]
    prompt = " ".join(rng.choices(words, k=600 if kind == "long" else rng.randint(2, 60)))
    options = {"num_predict": rng.randint(1, 64), "temperature": rng.choice([0, 0.8]), "num_ctx": 2048}
    body = {"model": MODEL, "prompt": prompt, "options": options, "stream": False, "raw": rng.random() < 0.5}

    def checked(reply: httpx.Response, status: int = 200) -> httpx.Response:
        if reply.status_code == 503:
            raise BusyError
        if reply.status_code != status:
            raise AssertionError(f"status {reply.status_code}: {reply.text[:200]}")
        return reply

    match kind:
        case "whole" | "long":
            assert checked(http.post("/api/generate", json=body)).json()["done"]
        case "score":
            assert checked(http.post("/api/score", json={"model": MODEL, "text": prompt})).json()["result"]["total"] < 0
        case "embed":
            reply = checked(http.post("/api/embed", json={"model": MODEL, "input": [prompt, "short"]}))
            assert len(reply.json()["embeddings"]) == 2
        case "bad":
            checked(http.post("/api/generate", content=b'{"model": "smollm2", "options": {"top_p": 7}}'), 400)
        case "leave early":
            with contextlib.suppress(httpx.TimeoutException):
                http.post("/api/generate", json=body | {"prompt": prompt * 20}, timeout=0.3)
        case _:
            with http.stream("POST", "/api/generate", json=body | {"stream": True}) as reply:
                if reply.status_code != 200:
                    reply.read()
                checked(reply)
                lines = reply.iter_lines()
                last = next(lines)
                if kind == "stream":
                    *_, last = last, *lines
                    assert '"done":true' in last


def watch(server: Server, until: float, seconds: float, go: threading.Event) -> list[tuple[float, float, float]]:
    """By time, the server's memory in MB under load, and when all rest and the model has been let go of."""
    seen, began = [], time.monotonic()
    while time.monotonic() < until:
        # What is held then changes from second to second.
        end, samples = min(time.monotonic() + seconds, until), []
        while not samples or time.monotonic() < end:
            time.sleep(min(1, max(end - time.monotonic(), 0)))
            samples.append(server.gauge("memory_bytes") / 1e6)
        loaded = statistics.mean(samples)
        go.clear()
        eventually(server.free, 300)
        rests = server.gauge("memory_bytes") / 1e6
        assert server.post("/api/generate", {"model": MODEL, "keep_alive": 0}).status_code == 200
        eventually(lambda: not httpx.get(f"{server.url}/api/ps").json()["models"])
        time.sleep(0.5)  # it is cleaned up behind the last answer
        now, left = time.monotonic() - began, server.gauge("memory_bytes") / 1e6
        seen.append((now, loaded, left))
        print(
            f"{now:6.0f} s  under load {loaded:5.0f} MB, at rest {rests:5.0f}, without the model {left:5.0f}",
            flush=True,
        )
        go.set()
    return seen


def main() -> int:
    """Run the load and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="how long (60 for the long one)")
    minutes = parser.parse_args().minutes
    with serving("--max-queue", "64") as server:
        expected = server.ask()
        until = time.monotonic() + 60 * minutes
        outcomes, failures, go = Counter[str](), list[str](), threading.Event()
        go.set()
        clients = [
            threading.Thread(target=client, args=(server, number, until, go, outcomes, failures))
            for number in range(CLIENTS)
        ]
        for thread in clients:
            thread.start()
        seen = watch(server, until, 60 * minutes / RESTS, go)
        for thread in clients:
            thread.join()
        problems = [f"{len(failures)} requests failed, such as: {failure}" for failure in failures[:1]]
        try:
            eventually(server.free)
        except AssertionError:
            problems.append(f"{server.gauge('slots_busy'):.0f} slots and {server.gauge('queue'):.0f} places are lost")
        if server.ask() != expected:
            problems.append("an answer is not what it was")
        warm = [memory for now, *memory in seen if now > WARM_UP * 60 * minutes]
        half, told = len(warm) // 2, []
        for what, memory in zip(("under load", "without the model"), zip(*warm, strict=True), strict=True):
            before, after = statistics.median(memory[:half]), statistics.median(memory[half:])
            told.append(f"{what}: {before:.0f} MB in the first half after warming up, {after:.0f} MB in the second")
            if after > before * (1 + GROWTH):
                problems.append(f"memory {what} grew from {before:.0f} to {after:.0f} MB")
    print(", ".join(f"{count} {kind}" for kind, count in sorted(outcomes.items())))
    print("\n".join(told))
    print("\n".join(f"FAILED: {problem}" for problem in problems) or "passed: memory flat, no slot lost")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
