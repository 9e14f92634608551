"""Drawing on another device than the forward pass runs on, as with Apple's backends."""

import os
import subprocess
import sys
from pathlib import Path

CODE = """
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


def test_the_same_text_is_drawn_on_another_device(model_path: Path) -> None:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    ran = subprocess.run(
        [sys.executable, "-c", CODE, str(model_path)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert ran.stdout == "True 6 [1]\n", ran.stderr
