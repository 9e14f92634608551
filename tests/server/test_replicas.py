"""The recipe for several machines, on one: docs/examples/replicas.py under Ray Serve."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from real import QUESTION

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
KEY = "sk-example"

RUN = """
import sys
import ray
from ray import serve

ray.init("local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1")
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
import replicas

serve.run(replicas.app)
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""


@pytest.fixture(scope="module")
def address(model_path: Path) -> Iterator[str]:
    """Where two replicas answer, which have one core each."""
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = os.pathsep.join([str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"IRKIT_REPLICAS": "2", "IRKIT_CPUS": "1", "IRKIT_API_KEY": KEY, "PYTHONPATH": path}
    # A busy machine takes longer to start than Ray waits.
    own |= {"RAY_raylet_start_wait_time_s": "300", "RAY_agent_register_timeout_ms": "300000"}
    own |= {"RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-c", RUN, str(port)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | own) as process:
        assert process.stdout
        assert process.stdin
        assert any("ready" in line for line in process.stdout)
        yield f"http://127.0.0.1:{port}"
        process.stdin.close()


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
