"""The recipe for several machines, on one: docs/examples/replicas.py under Ray Serve."""

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from real import QUESTION

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
KEY = "sk-example"
TRIES = 3

RUN = """
import sys
import ray
from ray import serve

port, folder = sys.argv[1:]
ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=1 << 27,
         _node_ip_address="127.0.0.1", _temp_dir=folder)
serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
import replicas

serve.run(replicas.app)
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""

OWN = {
    "IRKIT_REPLICAS": "2",
    "IRKIT_CPUS": "1",
    "IRKIT_API_KEY": KEY,
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray takes 127.0.0.1 for the address that other machines know this one by, unless it is not to have others.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # It ends processes of its own where the machine's memory, whoever takes it, is nearly full.
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),  # it would write one into the home directory
}


@pytest.fixture(scope="module")
def ray(model_path: Path) -> Iterator[tuple[str, int]]:
    """Where two replicas answer, which have one core each, and the process that started them."""
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # the names of sockets must be short
        process = next(filter(None, (start(port, folder) for _ in range(TRIES))), None)
        assert process, "Ray did not start"
        assert process.stdin
        with process:
            yield f"http://127.0.0.1:{port}", process.pid
            process.stdin.close()


def start(port: int, folder: str) -> "subprocess.Popen[str] | None":
    """The process, once the replicas answer; None if Ray gave up.

    It does where its own helpers take more than 15 seconds to start, as on a busy machine, whatever it is told.
    """
    path = os.pathsep.join([str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])])
    command, pipe = [sys.executable, "-c", RUN, str(port), folder], subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | OWN | {"PYTHONPATH": path})
    assert process.stdout
    if any(line == "ready\n" for line in process.stdout):
        return process
    process.communicate()
    return None


@pytest.fixture(scope="module")
def address(ray: tuple[str, int]) -> str:
    return ray[0]


def ask(address: str, path: str, body: object) -> httpx.Response:
    return httpx.post(address + path, json=body, headers={"authorization": f"Bearer {KEY}"}, timeout=300)


def test_replicas_answer_like_one_server(address: str) -> None:
    assert httpx.post(f"{address}/api/generate", json=QUESTION, timeout=60).status_code == 401
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda _: ask(address, "/api/generate", QUESTION), range(8)))
    assert [reply.status_code for reply in replies] == [200] * 8
    texts = {reply.json()["response"] for reply in replies}
    assert len(texts) == 1
    assert "Paris" in texts.pop()
    body = {"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "stream": True}
    lines = [line for line in ask(address, "/v1/chat/completions", body).text.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[0].removeprefix("data: "))["choices"][0]["delta"]["role"] == "assistant"
    assert ask(address, "/api/generate", {"model": "nosuch", "prompt": "a"}).status_code == 404


def test_a_client_that_leaves_ends_its_answer(address: str) -> None:
    """Each replica goes on, and is not kept busy by what nobody reads."""
    body = {"model": "smollm2", "prompt": "1, 2, 3,", "raw": True, "options": {"temperature": 0, "num_predict": 4000}}
    headers = {"authorization": f"Bearer {KEY}"}
    for _ in range(4):
        with httpx.stream("POST", f"{address}/api/generate", json=body, headers=headers, timeout=300) as response:
            next(response.iter_lines())
    until, quiet = time.monotonic() + 60, 0
    while quiet < 8:  # each request is one of the replicas'
        metrics = httpx.get(f"{address}/metrics", headers=headers, timeout=60).text
        quiet = quiet + 1 if "irkit_slots_busy 0.0" in metrics else 0
        assert time.monotonic() < until
    assert ask(address, "/api/generate", QUESTION).status_code == 200


def test_nothing_listens_beyond_this_machine(ray: tuple[str, int]) -> None:
    started = psutil.Process(ray[1])
    listening = {
        (socket.laddr.ip, process.name())
        for process in (started, *started.children(recursive=True))
        for socket in process.net_connections("inet")
        if socket.status == psutil.CONN_LISTEN
    }
    # Ray Serve has a replica listen to others on every address, and asks nobody where (docs/scale.md).
    beyond = {(ip, name) for ip, name in listening if ip.removeprefix("::ffff:") not in ("127.0.0.1", "::1")}
    assert beyond <= {("::", name) for _, name in listening if name.startswith("ray::ServeRepl")}
    assert len(listening) > len(beyond)
