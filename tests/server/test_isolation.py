"""Many clients at once: each is told what it would have been told alone, with the same seed."""

import json
import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from real import eventually

from irkit.engine.runtime import Runtime
from irkit.engine.worker import DEVICE
from irkit.kernels.cpu import library

CLIENTS = 8
WORDS = [
    "the",
    "a",
    "sky",
    "is",
    "blue",
    "green",
    "red",
    "one",
    "two",
    "three",
    "why",
    "how",
    "cat",
    "dog",
    "runs",
    "sleeps",
    "and",
    "or",
    "of",
    "to",
    "in",
    "sea",
    "sun",
]
OPENING = "You are told a story about animals and the weather, and you answer in a few words. "


def requests(count: int, tokens: int, precision: str, seed: int = 0) -> list[tuple[str, dict[str, Any]]]:
    """Random ones: some share what they begin with, some draw, some end early."""
    rng = random.Random(seed)

    def text(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    made: list[tuple[str, dict[str, Any]]] = []
    for number in range(count):
        options = {
            "precision": precision,
            "num_ctx": 1024,
            "seed": rng.randrange(1 << 60),
            "num_predict": rng.randint(1, tokens),
            "temperature": rng.choice([0, 0.5, 0.8, 1, 1.5]),
            "top_k": rng.choice([1, 5, 40, 100]),
            "top_p": rng.choice([0.5, 0.9, 1]),
            "repeat_penalty": rng.choice([1, 1.3]),
            "min_p": rng.choice([0, 0.05]),
            "stop": rng.choice([[], [], ["."], ["the"]]),
        }
        body = {"model": "smollm2", "stream": number % 2 == 0, "options": options}
        opening = rng.choice(["", OPENING])
        if rng.random() < 0.5:
            made.append(("/api/generate", body | {"prompt": opening + text(60), "raw": rng.random() < 0.5}))
        else:
            messages = [{"role": "system", "content": opening}, {"role": "user", "content": text(60)}]
            made.append(("/api/chat", body | {"messages": messages}))
    return made


def told(url: str, path: str, body: dict[str, Any]) -> tuple[str, Any, Any]:
    """The text, how many tokens it has, and why it ended."""
    reply = httpx.post(url + path, json=body, timeout=240)
    assert reply.status_code == 200, reply.text
    *_, last = lines = [json.loads(line) for line in reply.text.splitlines()]
    text = "".join(line["message"]["content"] if path == "/api/chat" else line["response"] for line in lines)
    return text, last["eval_count"], last["done_reason"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Runtime, int]]:
    """The calls that decode: whose, and how many answers in each."""
    made: list[tuple[Runtime, int]] = []
    decode = Runtime.decode

    def counted(self: Runtime, cache: Any, tokens: Any, *rest: Any) -> Any:
        made.append((self, len(tokens)))
        return decode(self, cache, tokens, *rest)

    monkeypatch.setattr(Runtime, "decode", counted)
    return made


def check(url: str, asked: Sequence[tuple[str, dict[str, Any]]], calls: list[tuple[Runtime, int]]) -> None:
    expected = []
    for path, body in asked:
        reset = {"model": "smollm2", "precision": body["options"]["precision"], "num_ctx": body["options"]["num_ctx"]}
        assert httpx.post(f"{url}/api/reset", json=reset, timeout=60).status_code == 200
        expected.append(told(url, path, body))

    def client(number: int) -> list[tuple[str, Any, Any]]:
        return [told(url, path, body) for path, body in asked[number::CLIENTS]]

    def everyone() -> list[tuple[str, Any, Any]]:
        """What each request is told where all clients begin at once."""
        held = threading.Event()
        DEVICE.submit(lambda: held.wait(60))
        with ThreadPoolExecutor(CLIENTS) as pool:
            asking = [pool.submit(client, number) for number in range(CLIENTS)]
            eventually(lambda: DEVICE.queued == CLIENTS)
            held.set()
            found = [each.result() for each in asking]
        return [found[number % CLIENTS][number // CLIENTS] for number in range(len(asked))]

    assert everyone() == expected
    for runtime in {runtime for runtime, _ in calls}:
        for compiled in tuple(runtime._batched.values()):
            compiled.result()  # what decodes several is compiled when it is first wanted
    calls.clear()
    assert everyone() == expected
    if library.load():
        together = sum(rows for _, rows in calls if rows > 1)
        assert together > sum(rows for _, rows in calls) // 2, "they are decoded together"
    assert len({text for text, *_ in expected}) > len(asked) // 2, "they differ"


def test_exact_answers_are_those_of_alone(url: str, calls: list[tuple[Runtime, int]]) -> None:
    check(url, requests(12, 6, "exact"), calls)


@pytest.mark.skipif(library.load() is None, reason="the kernels promise the same bits in every batch; XLA does not")
def test_fast_answers_are_those_of_alone(url: str, calls: list[tuple[Runtime, int]]) -> None:
    check(url, requests(3 * CLIENTS, 16, "fast"), calls)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("seed", [1, 2])
def test_sixty_four_requests_of_eight_clients(
    url: str, precision: str, seed: int, calls: list[tuple[Runtime, int]]
) -> None:
    check(url, requests(64, 48, precision, seed), calls)
