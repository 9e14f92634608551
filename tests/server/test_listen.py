"""`irkit serve`, as a process."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

SERVE = [sys.executable, "-c", "from irkit.cli import main; main()", "serve"]


@pytest.fixture
def served(model_path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with subprocess.Popen([*SERVE, "--port", "0"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        line = process.stderr.readline()
        found = re.fullmatch(r"irkit serves on (http://127\.0\.0\.1:\d+)\n", line)
        assert found, line
        yield process, found[1]
        process.kill()


def test_ctrl_c_ends_streams_and_the_server(served):
    process, url = served
    options = {"num_predict": 3000, "temperature": 0}
    body = {"model": "smollm2", "prompt": "1, 2, 3, 4, 5, 6, 7, 8, 9,", "raw": True, "options": options}
    with httpx.stream("POST", f"{url}/api/generate", json=body, timeout=120) as response:
        lines = response.iter_lines()
        assert '"done":false' in next(lines)
        process.send_signal(signal.SIGINT)
        *_, last = lines
        assert last == '{"error":"the answer was cancelled"}'
    assert process.wait(20) == 0
    assert process.stderr.read() == ""


def test_an_address_in_use_is_one_line(served):
    port = served[1].rpartition(":")[2]
    done = subprocess.run([*SERVE, "--port", port], capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(rf"irkit: cannot listen on 127\.0\.0\.1 port {port}: .*\n", done.stderr)


def test_a_host_that_does_not_exist():
    done = subprocess.run([*SERVE, "--host", "256.0.0.1"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("irkit: cannot listen on 256.0.0.1")
