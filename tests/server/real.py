"""`irkit serve` as a process of its own, and what can be seen of it from outside."""

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

SERVE = [sys.executable, "-c", "from irkit.cli import main; main()", "serve", "--port", "0"]
QUESTION = {
    "model": "smollm2",
    "prompt": "The capital of France is",
    "raw": True,
    "stream": False,
    "options": {"temperature": 0, "num_predict": 8},
}


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    process: subprocess.Popen[str]
    url: str

    def post(self, path: str, json: Any = None, *, timeout: float = 120, **how: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=json, timeout=timeout, **how)

    def gauge(self, name: str) -> float:
        found = re.search(rf"^irkit_{name} (\S+)$", httpx.get(f"{self.url}/metrics", timeout=60).text, re.M)
        assert found, name
        return float(found[1])

    def cancelled(self) -> float:
        """How many answers have been cancelled."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        return sum(map(float, re.findall(r'^irkit_answers_total\{.*reason="cancelled"\} (\S+)$', text, re.M)))

    def ask(self) -> str:
        """A short answer, the same each time."""
        reply = self.post("/api/generate", QUESTION)
        assert reply.status_code == 200, reply.text
        return reply.json()["response"]

    def free(self) -> bool:
        """Whether no answer is made, and none waits."""
        return self.gauge("slots_busy") == self.gauge("queue") == 0


@contextmanager
def serving(*words: str) -> Iterator[Server]:
    """`irkit serve WORDS` on a free port."""
    with subprocess.Popen([*SERVE, *words], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            line = process.stderr.readline()
            found = re.fullmatch(r"irkit serves on (http://\S+)\n", line)
            assert found, line + process.stderr.read()
            yield Server(process, found[1])
        finally:
            process.kill()


def eventually(condition: Callable[[], Any], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)
