"""As on a GPU: several answers in one call without the CPU's kernels, and as on Apple's, drawn on another device."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ANOTHER = """
import sys, irkit, jax
session = irkit.Session(sys.argv[1])
options = dict(num_predict=6, top_k=20, seed=3, temperature=1.0)
fused = session.generate("The capital of France is", **options).text
runtime = session.model.load().result()
session.reset()
runtime._drawer = jax.devices("cpu")[1]
split = session.generate("The capital of France is", **options)
bias = runtime.settings(irkit.options.SamplingOptions(), 0).bias
print(fused == split.text, len(split.tokens), [device.id for device in bias.devices()])
"""

TOGETHER = """
import json, sys, threading, irkit, jax, numpy as np
from irkit.engine.runtime import BATCHES, Runtime

session = irkit.Session(sys.argv[1], num_ctx=512)
runtime = session.model.load().result()
assert runtime.batch_sizes == ()
runtime.batch_sizes, runtime._drawer = BATCHES, jax.devices("cpu")[int(sys.argv[2])]
several, decode, rows = session.pooled(), Runtime.decode, []
rest = dict(temperature=1.0, num_predict=30, logit_bias={257: -100.0})
tapped = {"capture": {"names": ["pattern", "resid_post"], "layers": [1]}, "edits": [irkit.ablate("attn_out", layers=0)]}
kinds = [
    {}, {"top_logprobs": 3}, {"top_k": 5}, {"format": "json", "num_predict": 12}, {"num_predict": 5}, {"min_p": 0.1},
    tapped, tapped,
]
def ask(i):
    return several.generate([7 + i, *range(20 + i, 30 + 3 * i)], seed=i, **(rest | kinds[i]))
def told(answer):
    captured = [token.captures for token in answer.tokens if token.captures]
    return answer.text, [token.logprob for token in answer.tokens], captured
alone = [told(ask(i).wait()) for i in range(len(kinds))]
for compiling in range(2):  # once to have the programs compiled, beside which answers take turns
    for ready in tuple(runtime._batched.values()):
        ready.result()
    several.reset()
    Runtime.decode = lambda self, cache, *how: (rows.append(len(cache.tokens)), decode(self, cache, *how))[1]
    held = threading.Event()
    session.model.submit(held.wait)
    made = [ask(i) for i in range(len(kinds))]
    held.set()
    found = [told(answer.wait()) for answer in made]
for (text, logprobs, captured), (same, others, caught) in zip(alone, found, strict=True):
    assert text == same
    np.testing.assert_allclose(logprobs, others, atol=1e-4)
    for one, other in zip(captured, caught, strict=True):
        assert list(one) == list(other)
        for name in one:
            np.testing.assert_allclose(one[name], other[name], atol=1e-4)
made = {"kernels": session.info().kernels, "rows": sorted(set(rows)), "captured": [len(c) for *_, c in found]}
print(json.dumps(made))
"""


def ran(code: str, *arguments: object, **variables: str) -> str:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"} | variables
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_same_text_is_drawn_on_another_device(model_path: Path) -> None:
    assert ran(ANOTHER, model_path) == "True 6 [1]\n"


@pytest.mark.parametrize("drawer", [0, 1])
def test_answers_are_decoded_together_as_on_a_gpu(
    drawer: int, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    found = json.loads(ran(TOGETHER, write_model(tmp_path / "small.gguf"), drawer, IRKIT_KERNELS="xla"))
    assert found["kernels"].startswith("xla")
    assert found["rows"] == [1, 4, 8]
    assert found["captured"] == [0] * 6 + [30] * 2
