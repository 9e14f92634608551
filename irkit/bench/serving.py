"""Measuring servers: several clients at once, and a short prompt behind a long one.

Every engine runs as the server that its users start, in a process of its own, and the same client asks it through
OpenAI's API. Only what streaming costs irkit is measured in one process, with its server and without.
"""

import asyncio
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from irkit import hub
from irkit.engine import Model
from irkit.errors import BackendError

CLIENTS = 8
"""Clients that ask at the same time."""
SHORT = 16
"""Tokens of their prompts."""
LONG = 2000
"""Tokens of the prompt that is being read when a short one comes."""
CHUNK = 128
"""Tokens of a prompt that irkit reads between the others' tokens: what the wait of the short one is counted in."""
TURNS = 9
"""How often an answer is made with and without the server, to know what the server costs."""
START_SECONDS = 120.0
"""How long a server may take to start."""


@contextmanager
def server(engine: str, path: Path, threads: int) -> Iterator[str]:
    """The address of `engine`'s server of the model in `path`.

    Raises:
        BackendError: it does not start.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    programs = hub.home() / "programs"
    programs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home:
        Path(home, "programs").symlink_to(programs)  # what is compiled already; all else is the server's own
        script = Path(__file__).with_name("serving_worker.py")
        command = [sys.executable, "-P", str(script), engine, str(path), str(port), str(threads), str(CLIENTS)]
        quiet, env = subprocess.DEVNULL, os.environ | {"IRKIT_HOME": home}
        with subprocess.Popen(command, stdout=quiet, stderr=quiet, env=env) as process:
            try:
                _wait_for(process, url := f"http://127.0.0.1:{port}")
                yield url
            finally:
                process.kill()


def _wait_for(process: subprocess.Popen[bytes], url: str) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/v1/models").is_success:
                return
        time.sleep(0.05)
    raise BackendError(f"no server answers at {url}")


def _read(url: str, body: dict[str, Any]) -> float:
    """The seconds from an answer's first event to its end.

    The client is the standard library's, and makes nothing of what it reads: what parsing costs, on cores that the
    engine computes on, is the client's affair, and differs between them by as much as the server costs.
    """
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        reply, first = connection.getresponse(), 0.0
        if reply.status != http.HTTPStatus.OK:
            raise BackendError(
                f"the server at {url} answers {reply.status}: {reply.read(1000).decode(errors='replace')}"
            )
        for line in reply:
            if not first and line.startswith(b"data: "):
                first = time.perf_counter()
        return time.perf_counter() - first
    finally:
        connection.close()


def cost(
    url: str, inside: Callable[[], float], model: Model, count: int, put: Callable[[str, int | None, float], None]
) -> None:
    """Which fraction of the speed is lost where the server at `url` streams an answer of `count` tokens, of which the
    engine makes `inside()` a second without it.

    A server in the process that is measured without one has the same weights at the same place: two processes of one
    engine differ by as much as serving costs.
    """
    name = httpx.get(f"{url}/v1/models").raise_for_status().json()["data"][0]["id"]
    body = _endless(model, name) | {"temperature": 0}
    text, costs = _texts(model), []
    for _ in range(TURNS):  # in turns, and as greedily: the same work on the same machine
        without = inside()
        # As many behind the first, which prefill makes, as without: calls that make several are then as full.
        taken = _read(url, body | {"prompt": text(SHORT), "max_tokens": count + 1})
        costs.append(without * taken / count - 1)
    put("serve_cost", None, statistics.median(costs))


def _endless(model: Model, name: str) -> dict[str, Any]:
    """What asks for an answer that does not end early."""
    return {"model": name, "stream": True, "logit_bias": dict.fromkeys(map(str, model.tokenizer.eog_ids), -100)}


def _texts(model: Model) -> Callable[[int], str]:
    """Makes prompts of so many tokens, none of which is in a cache."""
    numbers = random.Random(time.time_ns())
    return lambda tokens: model.tokenizer.decode(numbers.choices(range(300, model.tokenizer.vocab_size), k=tokens))


async def measure(url: str, model: Model, count: int, put: Callable[[str, int | None, float], None]) -> None:
    """Ask the server at `url` for answers of `count` tokens; `put` is given what was measured, its tokens or clients,
    and the value."""
    always, text = _endless(model, "bench"), _texts(model)
    # A connection each: a server may have closed one that is kept, just when it is used again.
    async with httpx.AsyncClient(
        base_url=url, timeout=None, limits=httpx.Limits(max_keepalive_connections=0)
    ) as client:

        async def answer(prompt: str, tokens: int) -> tuple[float, float]:
            """The seconds to the first token, and to the end."""
            asked, first = time.perf_counter(), 0.0
            body = always | {"prompt": prompt, "max_tokens": tokens, "temperature": 0.8, "seed": 1}
            async with client.stream("POST", "/v1/completions", json=body) as reply:
                reply.raise_for_status()
                async for line in reply.aiter_lines():
                    if line.startswith("data: ") and not first:
                        first = time.perf_counter() - asked
            return first, time.perf_counter() - asked

        async def speed(prompts: Sequence[str]) -> float:
            began = time.perf_counter()
            await asyncio.gather(*(answer(prompt, count) for prompt in prompts))
            return len(prompts) * count / (time.perf_counter() - began)

        await speed([text(SHORT) for _ in range(CLIENTS)])  # what must be compiled is compiled now
        await speed([text(SHORT) for _ in range(CLIENTS)])
        put("serve", 1, one := await speed([text(SHORT)]))
        put("serve", CLIENTS, several := await speed([text(SHORT) for _ in range(CLIENTS)]))
        put("serve_gain", CLIENTS, several / one)
        await answer(text(LONG), 1)
        _, alone = await answer(text(LONG), 1)
        long = asyncio.create_task(answer(text(LONG), 1))
        await asyncio.sleep(0.05)
        first, _ = await answer(text(8), 2)
        put("serve_first_token", LONG, first)
        put("serve_chunks", LONG, first / (alone * CHUNK / LONG))
        _, whole = await long
        put("serve_long", LONG, whole)
