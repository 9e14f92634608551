"""Many clients at once: each is told what it would have been told alone, with the same seed."""

import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

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


def check(url: str, asked: Sequence[tuple[str, dict[str, Any]]]) -> None:
    expected = []
    for path, body in asked:
        reset = {"model": "smollm2", "precision": body["options"]["precision"], "num_ctx": body["options"]["num_ctx"]}
        assert httpx.post(f"{url}/api/reset", json=reset, timeout=60).status_code == 200
        expected.append(told(url, path, body))

    def client(number: int) -> list[tuple[str, Any, Any]]:
        return [told(url, path, body) for path, body in asked[number::CLIENTS]]

    with ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(client, range(CLIENTS)))
    assert [found[number % CLIENTS][number // CLIENTS] for number in range(len(asked))] == expected
    assert len({text for text, *_ in expected}) > len(asked) // 2, "they differ"


def test_exact_answers_are_those_of_alone(url: str) -> None:
    check(url, requests(12, 6, "exact"))


@pytest.mark.skipif(library.load() is None, reason="the kernels promise the same bits in every batch; XLA does not")
def test_fast_answers_are_those_of_alone(url: str) -> None:
    check(url, requests(3 * CLIENTS, 16, "fast"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("seed", [1, 2])
def test_sixty_four_requests_of_eight_clients(url: str, precision: str, seed: int) -> None:
    check(url, requests(64, 48, precision, seed))
