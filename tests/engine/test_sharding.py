"""One model on several devices says what it says on one: on virtual devices, and in two processes.

How many devices a process has is decided when jax starts, so each test runs processes of its own.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import irkit

# A sum over the heads or columns of several devices is added up in another order: some units in the last place of
# float32, which two layers make more of.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def wide_path(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]) -> Path:
    """Eight key/value heads and 96 columns in the MLP, which eight devices divide; 258 tokens, which they do not."""
    return write_model(tmp_path_factory.mktemp("wide") / "wide.gguf", n_heads=16, n_kv_heads=8, biases=True)


def start(code: str, *words: object, devices: int) -> subprocess.Popen[str]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "NPROC": "2"}
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def result(process: subprocess.Popen[str], seconds: float = 240) -> Any:
    said, error = process.communicate(timeout=seconds)
    assert process.returncode == 0, error
    return json.loads(said.splitlines()[-1])


# 25 tokens fill a program by more than half: what is made after them needs one program more, not two.
TEXT = "a text of twenty-five ids"

ON_SEVERAL = """
import json, re, sys
import jax
import numpy as np
import irkit

path, text, kept, sizes = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
found = {}
for index, size in enumerate(sizes):
    with irkit.Session(path, precision="exact", mesh=size) as session:
        session.trace(text, names=("pattern", "resid_post")).save(f"{kept}/{size}.safetensors")
        found[size] = seen = {"kernels": session.info().kernels}
        runtime = session.model.load().result()
        shards = lambda array: array.addressable_shards[0].data.shape
        block = runtime.params["blocks"][1]
        seen["block"] = {name: shards(value) for name, value in block.items() if value is not None}
        seen["embed"] = shards(runtime.params["embed"])
        tracer = next(program.result() for key, program in runtime._programs.items() if key[0].__name__ == "trace")
        seen["gathered"] = re.findall(r"\\S+ = (\\S+) all-gather", tracer.as_text())
        seen["score"] = session.score(text).total
        seen["keys"] = shards(runtime.empty(512).keys[0])
        if index == 0:
            greedy, drawn = {"temperature": 0, "num_predict": 8}, {"temperature": 1, "seed": 7, "num_predict": 8}
            seen["texts"] = [session.generate(text, **how).text for how in (greedy, drawn)]
            session.cache.drop(0)
            seen["dropped"] = shards(session._cache.arrays.keys[0])
try:
    irkit.Session(path, mesh=99).score("hello")
except irkit.IrkitError as error:
    found["error"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def alone(wide_path: Path) -> Iterator[irkit.Session]:
    """The same model on one device."""
    with irkit.Session(wide_path, precision="exact") as session:
        yield session


def answers(session: irkit.Session) -> list[str]:
    greedy: dict[str, Any] = {"temperature": 0, "num_predict": 8}
    drawn: dict[str, Any] = {"temperature": 1, "seed": 7, "num_predict": 8}
    return [session.generate(TEXT, **how).text for how in (greedy, drawn)]


def apart(session: irkit.Session, kept: Path) -> float:
    """The largest difference of a trace, and of its logits, from one on several devices; of large numbers, as a part.

    In the default model, one dimension of the first position has tens of thousands.
    """
    one, other = session.trace(TEXT, names=("pattern", "resid_post")), irkit.load_trace(kept)
    pairs = [(one.logits, other.logits), *((one[name], other[name]) for name in one)]
    return max((np.abs(a - b) / np.maximum(np.abs(a), 1)).max() for a, b in pairs)


def test_eight_devices_say_what_one_says(wide_path, alone, tmp_path):
    found = result(start(ON_SEVERAL, wide_path, TEXT, tmp_path, [8, 3], devices=8))
    eight, three = found["8"], found["3"]
    assert eight["texts"] == answers(alone)
    for size in (8, 3):
        assert apart(alone, tmp_path / f"{size}.safetensors") < TOLERANCE
        assert np.isclose(found[str(size)]["score"], alone.score(TEXT).total, atol=TOLERANCE)
    assert eight["kernels"] == "xla, on 8 devices"
    # Heads and columns are divided: each device has an eighth.
    shapes = {name: eight["block"][name] for name in ("q", "k", "v", "o", "gate", "up", "down", "q_bias", "o_bias")}
    assert shapes == {
        "q": [32, 64], "k": [16, 64], "v": [16, 64], "o": [64, 32],
        "gate": [12, 64], "up": [12, 64], "down": [64, 12], "q_bias": [32], "o_bias": [64],
    }  # fmt: skip
    assert eight["keys"] == eight["dropped"] == [1, 1, 512, 16]
    assert eight["embed"] == [258, 64]  # which eight do not divide
    assert {shape.partition("{")[0] for shape in eight["gathered"]} == {"f32[1,16,32,32]"}  # the patterns shown
    # Three divide the columns and the vocabulary, but not eight heads.
    assert (three["block"]["gate"], three["embed"]) == ([32, 64], [86, 64])
    assert (three["block"]["q"], three["keys"]) == ([256, 64], [1, 8, 512, 16])
    assert found["error"].startswith("mesh 99: cpu has 8 devices")


IN_TWO_PROCESSES = """
import json, sys
import jax
path, text, port, rank = *sys.argv[1:4], int(sys.argv[4])
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
import irkit

with irkit.Session(path, precision="exact", mesh=2) as session:
    greedy = session.generate(text, temperature=0, num_predict=8).text
    drawn = [session.generate(text, temperature=1, num_predict=8).text for _ in range(2)]
    mine = session.model.load().result().params["blocks"][0]["q"].addressable_shards
    print(json.dumps([greedy, drawn, session.score(text).total, [shard.data.shape for shard in mine]]))
"""


@pytest.mark.skipif(jax.__version_info__ < (0, 6), reason="jax 0.5.0 cannot compute in several processes on CPUs")
def test_two_processes_say_what_one_says(wide_path, alone):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    both = [start(IN_TWO_PROCESSES, wide_path, TEXT, port, rank, devices=1) for rank in range(2)]
    try:
        first, second = map(result, both)
    finally:
        for process in both:
            process.kill()
    assert first == second  # what is drawn without a seed too
    greedy, drawn, total, shards = first
    assert drawn[0] != drawn[1]
    assert shards == [[128, 64]]
    assert greedy == answers(alone)[0]
    assert np.isclose(total, alone.score(TEXT).total, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_default_model_on_three_devices(model_path, exact_session, tmp_path):
    found = result(start(ON_SEVERAL, model_path, TEXT, tmp_path, [3], devices=3), seconds=600)
    assert found["3"]["texts"] == answers(exact_session)
    assert found["3"]["keys"] == [1, 1, 512, 64]
    assert apart(exact_session, tmp_path / "3.safetensors") < 1e-3
